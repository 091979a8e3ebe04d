"""Schedules against transformers' formulas, optimizers against torch's AdamW."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.optimization import (
    _get_cosine_with_min_lr_schedule_with_warmup_lr_rate_lambda as hf_cosine,
)
from transformers.optimization import _get_wsd_scheduler_lambda as hf_wsd

from moai_core import checkpoint
from moai_core.errors import UsageError
from moai_core.training import optim


def rate(step, schedule, *, total=100, warmup=10, ratio=0.1, fraction=0.2):
    return optim.learning_rate(
        step, total=total, peak=2.0, schedule=schedule, warmup=warmup, min_ratio=ratio, decay_fraction=fraction
    )


def settings(name="adamw", **values):
    return SimpleNamespace(**{"name": name, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **values})


class Small(nn.Module):
    """A matrix, a norm-like vector and the scan's fp32 parameters."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(37, 29, bias=True)
        self.A_log = nn.Parameter(torch.randn(8, 4))
        self.D = nn.Parameter(torch.randn(8))
        self.linear.to(dtype)


def give_gradients(model, step):
    noise = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=noise).to(parameter.dtype)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_cosine_is_transformers_cosine_with_a_floor(warmup):
    for step in range(1, 101):
        expected = hf_cosine(step - 1, num_warmup_steps=warmup, num_training_steps=100, num_cycles=0.5, min_lr_rate=0.1)
        assert rate(step, "cosine", warmup=warmup) == pytest.approx(2.0 * expected, rel=1e-12), step
    assert rate(100, "cosine", warmup=warmup) == pytest.approx(0.2)


def test_wsd_is_transformers_wsd():
    for step in range(11, 101):
        expected = hf_wsd(
            step, num_warmup_steps=10, num_stable_steps=70, num_decay_steps=20, warmup_type="linear",
            decay_type="1-sqrt", min_lr_ratio=0.1, num_cycles=0.5,
        )  # fmt: skip
        assert rate(step, "wsd") == pytest.approx(2.0 * expected, rel=1e-12), step
    assert rate(80, "wsd") == 2.0
    assert rate(100, "wsd") == pytest.approx(0.2)


def test_constant_and_linear_warm_up():
    assert [rate(s, "constant", warmup=4) for s in (1, 2, 3, 4, 5, 100)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total,warmup,fraction", [(1, 0, 0.1), (1, 1, 1.0), (5, 10, 0.5), (3, 3, 1.0), (7, 0, 0.0)])
def test_odd_lengths_stay_between_zero_and_the_peak(schedule, total, warmup, fraction):
    for step in range(1, total + 3):
        assert 0 < rate(step, schedule, total=total, warmup=warmup, fraction=fraction) <= 2.0


def test_an_unknown_schedule_is_named():
    with pytest.raises(UsageError, match="unknown schedule 'linear'"):
        rate(50, "linear")


def test_what_decays():
    groups = optim.parameter_groups(Small(), 0.1)
    assert [(g["weight_decay"], [n for n, _ in g["params"]]) for g in groups] == [
        (0.1, ["linear.weight"]),
        (0.0, ["A_log", "D", "linear.bias"]),
    ]


def test_what_decays_in_the_model():
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    config = MoaiMambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, state_size=4, time_step_rank=2
    )
    decayed, spared = optim.parameter_groups(MoaiMambaForCausalLM(config), 0.1)
    kinds = {name.rpartition("mamba.")[2].rpartition("model.")[2] for name, _ in spared["params"]}
    assert {"A_log", "D", "dt_bias", "conv1d.bias", "dt_layernorm.weight", "final_layernorm.weight"} <= kinds
    assert all(p.ndim >= 2 and not n.endswith("A_log") for n, p in decayed["params"])
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {n for n, _ in decayed["params"]}


def test_adamw_is_torchs():
    assert type(optim.make_optimizer(Small(), settings(), lr=1e-3, seed=0)) is torch.optim.AdamW


def reference(model, steps, lr=1e-2):
    """torch's plain (not fused) AdamW in fp32 on the same gradients."""
    groups = [{**g, "params": [p for _, p in g["params"]]} for g in optim.parameter_groups(model, 0.1)]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(steps):
        give_gradients(model, step)
        adam.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_bf16_optimizer_on_fp32_weights_is_torchs_adamw(monkeypatch):
    monkeypatch.setattr(optim, "_CHUNK", 100)  # several chunks a matrix, the last one short
    expected = reference(Small(), 5)
    model = Small()
    own = optim.make_optimizer(model, settings("adamw_bf16"), lr=1e-2, seed=0)
    for step in range(5):
        give_gradients(model, step)
        own.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=2e-6, atol=1e-7)


def test_adamw_on_bf16_weights_keeps_fp32_masters():
    model = Small(torch.bfloat16)
    as_fp32 = Small()
    as_fp32.load_state_dict(model.state_dict())
    own = optim.make_optimizer(model, settings("adamw"), lr=1e-3, seed=0)
    noise = torch.Generator().manual_seed(7)
    groups = [{**g, "params": [p for _, p in g["params"]]} for g in optim.parameter_groups(as_fp32, 0.1)]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(20):
        for p, q in zip(model.parameters(), as_fp32.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=noise).to(p.dtype)
            q.grad = p.grad.float()
        own.step()
        adam.step()
    torch.testing.assert_close(own.state[model.linear.weight]["master"], as_fp32.linear.weight, rtol=2e-6, atol=1e-7)
    assert torch.equal(model.linear.weight, own.state[model.linear.weight]["master"].bfloat16())
    torch.testing.assert_close(model.A_log, as_fp32.A_log, rtol=2e-6, atol=1e-7)
    assert "master" not in own.state[model.A_log]


def test_stochastic_rounding_is_exact_on_average():
    value = torch.tensor([1.001, -3.14159, 1e-20, 7.0, -0.0]).repeat(40_000, 1)
    rounded = optim.round_stochastic(value, torch.Generator().manual_seed(0)).float()
    low, high = torch.nextafter(value.bfloat16(), -value.bfloat16().abs() - 1).float(), None
    gap = (rounded - value).abs() / value.abs().clamp(min=1e-30)
    assert gap.max() <= 2**-7  # one of the two neighbours
    assert torch.equal(rounded[:, 3:], value[:, 3:])  # what bf16 can say stays
    error = (rounded.double().mean(0) - value[0].double()).abs() / value[0].double().abs().clamp(min=1e-30)
    assert error[:3].max() < 5e-5, (error, low, high)


def test_small_updates_survive_in_bf16():
    """Updates of a sixteenth of a bf16 step: rounding to the nearest would lose every one."""
    model = Small(torch.bfloat16)
    nn.init.constant_(model.linear.weight, 1.0)
    own = optim.make_optimizer(model, settings("adamw_bf16", weight_decay=0.0), lr=2**-12, seed=3)
    for _ in range(64):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        own.step()
    moved = 1.0 - model.linear.weight.float().mean().item()
    assert moved == pytest.approx(64 * 2**-12, rel=0.05)


def run_bf16(seed, steps, model=None, own=None, first=0):
    model = model or Small(torch.bfloat16)
    own = own or optim.make_optimizer(model, settings("adamw_bf16"), lr=1e-2, seed=seed)
    for step in range(first, steps):
        give_gradients(model, step)
        own.step()
    return model, own


def test_the_noise_depends_on_seed_and_update_alone():
    first, _ = run_bf16(1, 4)
    torch.manual_seed(99)  # the global generator has no part in it
    again, _ = run_bf16(1, 4)
    other, _ = run_bf16(2, 4)
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)


@pytest.mark.parametrize("name,dtype", [("adamw", "float32"), ("adamw", "bfloat16"), ("adamw_bf16", "bfloat16"),
                                        ("adamw_8bit", "float32")])  # fmt: skip
def test_a_saved_optimizer_goes_on_exactly(name, dtype, tmp_path):
    dtype = getattr(torch, dtype)

    def fresh():
        model = Small(dtype)
        return model, optim.make_optimizer(model, settings(name), lr=1e-2, seed=5)

    whole, own = fresh()
    for step in range(6):
        give_gradients(whole, step)
        own.step()
    half, own = fresh()
    for step in range(3):
        give_gradients(half, step)
        own.step()
    state = checkpoint.optimizer_state(half, own)
    resumed, own = fresh()
    resumed.load_state_dict(half.state_dict())
    checkpoint.load_optimizer_state(resumed, own, state)
    for step in range(3, 6):
        give_gradients(resumed, step)
        own.step()
    for (n, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_8bit_follows_adamw_closely():
    expected = reference(Small(), 5, lr=1e-3)
    model = Small()
    own = optim.make_optimizer(model, settings("adamw_8bit"), lr=1e-3, seed=0)
    for step in range(5):
        give_gradients(model, step)
        own.step()
    change = expected["linear.weight"] - Small().linear.weight.detach()
    error = model.linear.weight.detach() - expected["linear.weight"]
    assert error.norm() < 0.1 * change.norm()


def test_8bit_without_bitsandbytes_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UsageError, match="needs bitsandbytes") as caught:
        optim.make_optimizer(Small(), settings("adamw_8bit"), lr=1e-3, seed=0)
    assert caught.value.hint == "pip install 'moai[quant]'"


def test_8bit_refuses_bf16_weights():
    with pytest.raises(UsageError, match="loses small updates"):
        optim.make_optimizer(Small(torch.bfloat16), settings("adamw_8bit"), lr=1e-3, seed=0)


def test_grad_norm_is_fp32_and_sees_every_nan():
    model = Small(torch.bfloat16)
    give_gradients(model, 0)
    total = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    assert float(optim.grad_norm(list(model.parameters()))) == pytest.approx(total, rel=1e-6)
    model.D.grad[3] = math.nan
    assert math.isnan(float(optim.grad_norm(list(model.parameters()))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_clipping_is_torchs(dtype, clip):
    """The scale is folded into the update; in bf16 the gradients aren't rounded again, so fp32 masters show the same."""
    model, other = Small(dtype), Small()
    other.load_state_dict(model.state_dict())
    name = "adamw" if dtype == torch.bfloat16 else "adamw_bf16"
    own = optim.make_optimizer(model, settings(name), lr=1e-2, seed=0)
    adam = optim.make_optimizer(other, settings(), lr=1e-2, seed=0)
    assert type(own) is optim.AdamWBF16 and type(adam) is torch.optim.AdamW
    for step in range(4):
        give_gradients(model, step)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.float().clone()
        grads = [p.grad.clone() for p in model.parameters()]
        for optimizer, one in ((own, model), (adam, other)):
            parameters = list(one.parameters())
            optim.clip_and_step(optimizer, parameters, optim.grad_norm(parameters), clip)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.state[p].get("master", p), q, rtol=2e-6, atol=1e-7, msg=n)
