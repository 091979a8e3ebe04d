"""Fake quantization: the same bits as the packed format, and gradients as the definition gives them in float64."""

from __future__ import annotations

import pytest
import torch

from moai_core import MoaiMambaForCausalLM, checkpoint
from moai_core.errors import UsageError
from moai_core.quant import fake, formats, linear
from moai_core.quant.formats import FORMATS, Spec

SPECS = [Spec("int4", 32), Spec("int4", 32, False), Spec("int4", 0), Spec("int8", 0), Spec("int8", 32)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_same_bits_as_packed(spec):
    layer = fake.FakeQuantLinear(64, 24, spec).start(torch.randn(24, 64))
    with torch.no_grad():  # as after some steps: scales off their start, weights that are cut off
        layer.scales.mul_(1 + 0.3 * torch.randn_like(layer.scales))
        layer.weight.add_(torch.randn_like(layer.weight))
        if layer.zeros is not None:
            layer.zeros.add_(torch.randn_like(layer.zeros))
    packed = linear.QuantLinear(64, 24, spec)
    packed.load_state_dict(layer.state_dict())
    linear.set_kernel(packed, "dequantize")
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), packed(x))
    assert {n: t.dtype for n, t in layer.state_dict().items()} == {n: d for n, (_, d) in packed.stored.items()}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients(spec):
    """LSQ's equations, written out once more with plain loops over groups in float64."""
    layer = fake.FakeQuantLinear(64, 3, spec).start(torch.randn(3, 64))
    with torch.no_grad():
        layer.scales.mul_(0.6)  # so that some weights are cut off
    wanted = torch.randn(3, 64)
    fake.fake_quantize(layer.weight, layer.scales, layer.zeros, spec).backward(wanted)
    low, high, levels = (-127, 127, 127) if spec.format == "int8" else (0, 15, 7)
    size = spec.group_size or 64
    for row in range(3):
        for group in range(64 // size):
            columns = slice(group * size, (group + 1) * size)
            s = float(layer.scales[row, group].detach().half())
            z = (
                float(layer.zeros[row, group].detach().half())
                if layer.zeros is not None
                else 8.0
                if spec.format == "int4"
                else 0.0
            )
            v = layer.weight[row, columns].detach().double() / s
            inside = ((v + z).round() >= low) & ((v + z).round() <= high)
            assert 0 < inside.sum() < size
            q = (v + z).round().clamp(low, high) - z
            g = wanted[row, columns].double()
            factor = (size * levels) ** -0.5
            assert torch.equal(layer.weight.grad[row, columns], torch.where(inside, wanted[row, columns], 0.0))
            assert float(layer.scales.grad[row, group]) == pytest.approx(
                float((g * (q - v * inside)).sum() * factor), rel=1e-4, abs=1e-6
            )
            if layer.zeros is not None:
                assert float(layer.zeros.grad[row, group]) == pytest.approx(
                    float((g * ~inside).sum() * -s * factor), rel=1e-4, abs=1e-6
                )


@pytest.mark.parametrize("symmetric", [True, False])
def test_trained_scales(symmetric):
    """Gradients of x, scales and zeros against autograd through the plain formula."""
    spec = Spec("int4", 32, symmetric)
    source = linear.QuantLinear(64, 7, spec)
    source.load_state_dict(FORMATS["int4"].encode(spec, torch.randn(7, 64)))
    source.kernel = "dequantize"  # what is trained is compared with the exact product
    source.kernel = "dequantize"
    layer = fake.ScaledQuantLinear(source)
    x = torch.randn(2, 5, 64, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, linear.QuantLinear.multiply(source, x.detach()))
    gradient = torch.randn_like(out)
    out.backward(gradient)
    s = layer.scales.detach().double().requires_grad_()
    z = (
        (layer.zeros.detach() if layer.zeros is not None else torch.full_like(layer.scales, 8.0))
        .double()
        .requires_grad_()
    )
    x64 = x.detach().double().requires_grad_()
    q = formats.unpack4(source.qweight).double().reshape(7, 2, 32)
    (x64 @ ((q - z[..., None]) * s[..., None]).flatten(1).T).backward(gradient.double())
    for ours, theirs in [(x.grad, x64.grad), (layer.scales.grad, s.grad)] + (
        [] if symmetric else [(layer.zeros.grad, z.grad)]
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "scales"])
def test_a_model_saved_while_trained_is_the_packed_one(tiny_model, tmp_path, mode):
    model = tiny_model(hidden_size=32, intermediate_size=64, time_step_rank=4)
    modules = {
        n: {"format": "int4", "group_size": 32, "symmetric": False}
        for n in ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
    }
    config = type(model.config)(**{**model.config.to_dict(), "quantization": {"method": "rtn", "modules": modules}})
    start = MoaiMambaForCausalLM(config)
    state = model.state_dict()
    for name, layer in linear.quantized(start).items():
        state |= {f"{name}.{n}": t for n, t in FORMATS["int4"].encode(layer.spec, state.pop(f"{name}.weight")).items()}
    start.load_state_dict(state)
    fake.trainable(start, mode)
    optimizer = torch.optim.AdamW([p for p in start.parameters() if p.requires_grad], lr=3e-3)
    ids = torch.randint(0, 97, (2, 16))
    losses = []
    for _ in range(12):
        loss = start.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    if mode == "scales":
        assert {n.rpartition(".")[2] for n, p in start.named_parameters() if p.requires_grad} == {"scales", "zeros"}
    start.eval()
    checkpoint.save_model(tmp_path / "moai", start)
    start.save_pretrained(tmp_path / "hf")
    for loaded in (checkpoint.load_model(tmp_path / "moai"), MoaiMambaForCausalLM.from_pretrained(tmp_path / "hf")):
        linear.set_kernel(loaded, "dequantize")
        assert torch.equal(loaded(ids).logits, start(ids).logits)


def test_refusals():
    with pytest.raises(UsageError, match="can't be trained"):
        fake.FakeQuantLinear(64, 4, Spec("fp8"))
    with pytest.raises(UsageError, match="has no scales to train"):
        fake.ScaledQuantLinear(linear.QuantLinear(64, 4, Spec("int8", 0)))
