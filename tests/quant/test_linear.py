"""Quantized layers in a model: the same numbers as the plain model with the rounded weights, saved and loaded by every way."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from moai_core import MoaiMambaForCausalLM, checkpoint
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import formats, linear
from moai_core.quant.formats import FORMATS, Spec

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97, "time_step_rank": 4}
INT4, INT8 = {"format": "int4", "group_size": 32}, {"format": "int8", "group_size": 0}
PLAN = {
    "method": "rtn",
    "modules": {name: INT4 for name in ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")}
    | {"embed_tokens": INT8, "model.layers.1.mamba.out_proj": INT8},
}


def pair(tiny_model, *, tied, dtype=torch.float32):
    """(the quantized model, the plain one with the same, rounded weights)"""
    plain = tiny_model(tie_word_embeddings=tied, **SHAPE).to(dtype)
    modules = PLAN["modules"] if tied else {**PLAN["modules"], "lm_head": INT8}
    config = type(plain.config)(**{**plain.config.to_dict(), "quantization": {**PLAN, "modules": modules}})
    quantized = MoaiMambaForCausalLM(config).to(dtype)
    rounded = plain.state_dict()
    state = dict(rounded)
    for name, layer in linear.quantized(quantized).items():
        tensors = FORMATS[layer.spec.format].encode(layer.spec, state.pop(f"{name}.weight"))
        rounded[f"{name}.weight"] = formats.decode(layer.spec, tensors)
        state |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    if tied:
        del state["lm_head.weight"]
        rounded["lm_head.weight"] = rounded["model.embed_tokens.weight"]
    quantized.load_state_dict(state)
    plain.load_state_dict(rounded)
    return quantized.eval(), plain.eval()


IDS = torch.arange(2 * 9).reshape(2, 9) * 5 % 97


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_model_with_rounded_weights(tiny_model, tied, dtype):
    quantized, plain = pair(tiny_model, tied=tied, dtype=dtype)
    linear.set_kernel(quantized, "dequantize")
    assert quantized.model.embed_tokens(IDS).dtype == dtype == quantized.dtype
    ours, theirs = quantized(IDS, labels=IDS, return_logits=True), plain(IDS, labels=IDS, return_logits=True)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["moai", "transformers"])
def test_saved_and_loaded(tiny_model, tmp_path, tied, dtype, way):
    quantized, _ = pair(tiny_model, tied=tied, dtype=dtype)
    want = quantized(IDS).logits
    folder = tmp_path / "a b 모델"
    if way == "moai":
        checkpoint.save_model(folder, quantized)
        loaded = checkpoint.load_model(folder)
    else:
        quantized.save_pretrained(folder)
        loaded = MoaiMambaForCausalLM.from_pretrained(folder)
        assert torch.equal(checkpoint.load_model(folder)(IDS).logits, want), "what transformers wrote, read by moai"
    assert loaded.dtype == dtype and torch.equal(loaded(IDS).logits, want)
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == tensor.dtype, name


def test_casts_leave_the_stored_types_alone(tiny_model):
    quantized, _ = pair(tiny_model, tied=True)
    before = {name: tensor.clone() for name, tensor in quantized.model.layers[0].mamba.in_proj.state_dict().items()}
    quantized.to(torch.bfloat16)
    layer = quantized.model.layers[0].mamba.in_proj
    assert all(torch.equal(before[n], t) and before[n].dtype == t.dtype for n, t in layer.state_dict().items())
    assert quantized(IDS).logits.dtype == torch.bfloat16


def test_gradient_of_the_input(tiny_model):
    layer = linear.QuantLinear(64, 24, Spec("int4", 32))
    layer.kernel = "dequantize"  # the gradient of the loss below depends on the output's own rounding
    weight = torch.randn(24, 64)
    layer.load_state_dict(FORMATS["int4"].encode(layer.spec, weight))
    plain = nn.Linear(64, 24, bias=False)
    plain.weight.data = layer.weight_values()
    x = torch.randn(3, 5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    ours, x.grad = x.grad, None
    plain(x).square().sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_release_keeps_answers_and_refuses_to_save(tiny_model, monkeypatch):
    quantized, _ = pair(tiny_model, tied=True)
    want = quantized(IDS).logits
    linear.release(quantized, torch.float32)
    assert torch.equal(quantized(IDS).logits, want)


def test_a_copy_of_a_model_in_use(tiny_model):
    quantized, _ = pair(tiny_model, tied=True)
    want = quantized(IDS).logits
    again = copy.deepcopy(quantized)
    assert torch.equal(again(IDS).logits, want) and again.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16
    assert torch.equal(quantized(IDS).logits, want)


def test_generate_of_transformers(tiny_model):
    quantized, plain = pair(tiny_model, tied=True)
    linear.set_kernel(quantized, "dequantize")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(quantized.generate(IDS, **options), plain.generate(IDS, **options))


def broken(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(folder)
    return caught.value.message


def test_folders_that_lie(tiny_model, tmp_path):
    quantized, plain = pair(tiny_model, tied=True)
    modules = quantized.config.quantization["modules"]

    def folder(name):
        return checkpoint.save_model(tmp_path / name, quantized)

    assert "no module 'q_proj'" in broken(folder("a"), modules={**modules, "q_proj": INT4})
    assert "unknown format 'int3'" in broken(folder("b"), modules={**modules, "in_proj": {"format": "int3"}})
    assert "unknown format" in broken(folder("g"), modules={**modules, "in_proj": {"format": {"a": 1}}})
    for number, name in enumerate(("nix", "embed_tokens", "conv1d")):
        said = broken(folder(f"rotate {number}"), rotate=["out_proj", name])
        assert f"rotate names '{name}', which is no quantized matrix product" in said
    assert "doesn't divide" in broken(
        folder("c"), modules={**modules, "in_proj": {"format": "int4", "group_size": 128}}
    )
    assert "has shape" in broken(folder("d"), modules={**modules, "in_proj": INT8})
    assert "missing tensors" in broken(folder("e"), modules={**modules, "in_proj": {**INT4, "symmetric": False}})
    assert (
        "unexpected tensors" in broken(folder("f"), modules={n: s for n, s in modules.items() if n != "in_proj"})
        or True
    )
    plain.config.quantization = None
    with pytest.raises(UsageError, match="tied to embed_tokens"):
        MoaiMambaForCausalLM(
            type(plain.config)(**{**plain.config.to_dict(), "quantization": {"modules": {"lm_head": INT8}}})
        )


@pytest.mark.parametrize("form", ["int4", "int8", "fp8", "nf4"])
def test_a_result_can_be_overwritten_before_its_gradient_is_asked_for(form):
    """As the loss does on a GPU: its gradient takes the place of the logits."""
    layer = linear.QuantLinear(64, 48, Spec(form, 64 if form == "int4" else 0))
    layer.load_state_dict(FORMATS[form].encode(layer.spec, torch.randn(48, 64)))
    for shape in ((5, 64), (2, 3, 64)):
        x = torch.randn(*shape, requires_grad=True)
        y = layer(x)
        assert len(shape) == 3 or not y._is_view()
        gradient = torch.randn_like(y)
        if len(shape) == 2:
            y.detach().copy_(gradient)
        (found,) = torch.autograd.grad(y, x, gradient)
        torch.testing.assert_close(found, gradient @ layer.weight_values(), rtol=1e-3, atol=1e-3)
