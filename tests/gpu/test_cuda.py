"""The model, training and generation on a CUDA GPU, against the CPU. Run on a machine with one: `pytest -m gpu
tests/gpu`.

Whatever scan backend `auto` picks there is the one under test; its name is in the ids of the output of `moai doctor`.
"""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def relative(got, want) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm())


def gradients(model, ids, seq_idx):
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, seq_idx=seq_idx).loss.backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [{}, {"ffn": "none", "dt_bc_norm": False}], ids=["jamba-like", "mamba"])
def test_logits_and_gradients_equal_the_cpu(tiny_model, dtype, tolerance, shape):
    model = tiny_model(hidden_size=64, intermediate_size=128, state_size=16, **shape)
    ids = torch.randint(5, 97, (3, 67))
    seq_idx = torch.tensor([[0] * 30 + [1] * 37, [0] * 67, [0] * 10 + [1] * 50 + [-1] * 7])
    real = seq_idx >= 0
    with torch.no_grad():
        want = model(ids, seq_idx=seq_idx).logits[real]
    want_gradients = gradients(model, ids, seq_idx)
    model.to("cuda", dtype)
    assert model.model.layers[0].mamba.A_log.dtype == torch.float32
    with torch.no_grad():
        got = model(ids.cuda(), seq_idx=seq_idx.cuda()).logits[real.cuda()]
    assert relative(got, want) < tolerance
    assert relative(gradients(model, ids.cuda(), seq_idx.cuda()), want_gradients) < 2 * tolerance


def test_chunks_padding_and_steps_on_the_gpu(tiny_model):
    model = tiny_model(hidden_size=64, state_size=16).cuda()
    ids = torch.randint(5, 97, (2, 41)).cuda()
    with torch.no_grad():
        whole = model(ids)
        state, parts = None, []
        for chunk in ids.split([20, 1, 1, 19], dim=1):
            out = model(chunk, state=state)
            state = out.state
            parts.append(out.logits)
        assert relative(torch.cat(parts, 1), whole.logits) < 1e-5
        mask = torch.ones_like(ids)
        mask[1, :11] = 0
        padded = model(ids, attention_mask=mask)
        assert relative(padded.logits[1, 11:], model(ids[1:, 11:]).logits[0]) < 1e-5
        assert padded.state.seen.tolist() == [41, 30]


def test_greedy_tokens_equal_the_cpus(tiny_model):
    model = tiny_model(hidden_size=64, state_size=16)
    ids = torch.randint(5, 97, (2, 9))
    want = model.generate(ids, do_sample=False, max_new_tokens=32, eos_token_id=None)
    got = model.cuda().generate(ids.cuda(), do_sample=False, max_new_tokens=32, eos_token_id=None)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(
    "settings",
    [["train.precision=fp32"], ["train.precision=bf16-mixed"], ["train.precision=bf16", "optim.name=adamw_bf16"]],
    ids=["fp32", "bf16-mixed", "bf16"],
)
def test_training_learns_and_resumes(tmp_path, settings):
    from moai_core import recipe
    from moai_core.training.loop import train

    overrides = [
        "hardware.gpu=null", "train.steps=24", "train.batch_size=4", "data.max_length=64", "train.eval_every=12", "train.eval_batches=4",
        "train.sample_every=0", "train.save_every=12", "optim.warmup_steps=4", "model.num_hidden_layers=2", f"data.cache={tmp_path / 'cache'}", *settings,
    ]  # fmt: skip
    made = recipe.load("cpu-tiny", overrides)
    first = train(made, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 24 and losses[-1] < losses[0] - 0.3
    longer = recipe.load("cpu-tiny", [*overrides, "train.steps=30"])
    second = train(longer, output=tmp_path / "run")
    assert (first.step, second.step, second.resumed_from) == (24, 30, 24)
