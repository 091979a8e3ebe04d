"""Adapters: the sum they stand for, their files read by peft, merged, and refused where they don't fit."""

from __future__ import annotations

import json

import pytest
import torch

from moai_core import MoaiMambaForCausalLM, checkpoint
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import linear, lora
from moai_core.quant.formats import FORMATS

peft = pytest.importorskip("peft")
INT4 = {"format": "int4", "group_size": 32}
IDS = torch.arange(18).reshape(2, 9) * 5 % 97


@pytest.fixture
def quantized(tiny_model):
    plain = tiny_model(hidden_size=32, intermediate_size=64, time_step_rank=4)
    modules = {name: INT4 for name in ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")}
    config = type(plain.config)(**{**plain.config.to_dict(), "quantization": {"method": "int4", "modules": modules}})
    model, state = MoaiMambaForCausalLM(config), plain.state_dict()
    for name, layer in linear.quantized(model).items():
        state |= {f"{name}.{n}": t for n, t in FORMATS["int4"].encode(layer.spec, state.pop(f"{name}.weight")).items()}
    model.load_state_dict(state)
    linear.set_kernel(model, "dequantize")
    return model.eval()


def trained(model):
    """Adapters that do something."""
    lora.attach(model, rank=4, alpha=8)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def test_fresh_ones_change_nothing_and_alone_are_trained(quantized):
    want = quantized(IDS).logits
    lora.attach(quantized, rank=4)
    assert torch.equal(quantized.eval()(IDS).logits, want)
    quantized.train()(IDS, labels=IDS).loss.backward()
    touched = {name for name, p in quantized.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in quantized.named_parameters() if ".lora_" in name}
    assert {name.split(".")[4] for name in touched} == set(lora.TARGETS)


def test_the_sum_that_they_stand_for(quantized):
    layer = trained(quantized).model.layers[1].mamba.in_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32)
    want = x.double() @ (layer.base_layer.weight_values().double() + 8 / 4 * b.double() @ a.double()).T
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(quantized, tmp_path):
    want = trained(quantized)(IDS).logits
    folder = checkpoint.save_model(tmp_path / "어댑터 1", quantized)
    loaded = checkpoint.load_model(folder)
    linear.set_kernel(loaded, "dequantize")
    assert torch.equal(loaded(IDS).logits, want)
    # peft reads its half by itself.
    config = peft.LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha) == (4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_merged(quantized, dtype):
    want = trained(quantized)(IDS).logits.detach()
    lora.merge(quantized, dtype=dtype)
    linear.set_kernel(quantized, "dequantize")
    assert not lora.adapted(quantized) and not [n for n in quantized.state_dict() if "lora" in n or "base_layer" in n]
    if dtype == torch.bfloat16:
        quantized.to(dtype)
    got = quantized(IDS).logits.detach().float()
    error = float((got - want).norm() / want.norm())
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.03, None: 0.5}[dtype]


def test_refusals(quantized, tmp_path):
    with pytest.raises(UsageError, match="rank"):
        lora.attach(quantized, rank=0)
    with pytest.raises(UsageError, match="no module to adapt"):
        lora.attach(quantized, targets=["q_proj"])
    folder = checkpoint.save_model(tmp_path / "a", trained(quantized))
    (folder / "manifest.json").unlink()
    good = json.loads((folder / lora.CONFIG).read_text())
    for change, why in [({"r": 3}, "the model needs"), ({"r": "x"}, "must be numbers"), ({"target_modules": ["q"]}, "target_modules"),
                        ({"peft_type": "IA3"}, "not the configuration"), ({"target_modules": ["in_proj"]}, "unexpected tensor")]:  # fmt: skip
        (folder / lora.CONFIG).write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=why):
            checkpoint.load_model(folder)
