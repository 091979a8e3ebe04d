"""The kernels of floating-point formats on a GPU: torch's fp8 product, bitsandbytes, and the exact one for fp4."""

from __future__ import annotations

import pytest
import torch

from moai_core.quant import bitsandbytes, formats, kernels, scaled_mm
from moai_core.quant.formats import FORMATS, Spec
from moai_core.quant.linear import QuantLinear

pytestmark = pytest.mark.gpu
# 2b's in_proj and down_proj, and sizes that aren't multiples of 16.
SHAPES = [(8192, 2048), (2048, 5632), (100, 70)]


def layer(spec, out, columns, device):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    made = QuantLinear(columns, out, spec)
    made.load_state_dict(FORMATS[spec.format].encode(spec, weight))
    return made.to(device)


def inputs(rows, columns, device, dtype):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def error(y, x, made):
    exact = x.double() @ made.weight_values().double().T
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_fp8(shape, rows, device):
    spec = Spec("fp8", 0)
    if reason := scaled_mm.why_not(spec, device, torch.bfloat16):
        pytest.skip(reason)
    made = layer(spec, *shape, device)
    assert kernels.pick(spec, device, torch.bfloat16) is scaled_mm
    for dtype in (torch.bfloat16, torch.float16):
        x = inputs(rows, shape[1], device, dtype)
        y = made(x)
        assert y.dtype == dtype and torch.isfinite(y).all()
        assert error(y, x, made) < 0.04, "inputs are rounded to e4m3, 2.6 % a number"
    # Rounded inputs are all that differs from the exact product: with inputs that e4m3 holds nothing is left but bf16.
    x = inputs(rows, shape[1], device, torch.bfloat16)
    x = (x / x.abs().amax(-1, keepdim=True) * 448).to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert error(made(x), x, made) < 5e-3


def test_fp8_of_zeros_in_a_graph(device):
    spec = Spec("fp8", 0)
    if reason := scaled_mm.why_not(spec, device, torch.bfloat16):
        pytest.skip(reason)
    made = layer(spec, 256, 128, device)
    x = torch.zeros(4, 128, device=device, dtype=torch.bfloat16)
    made(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = made(x)
    graph.replay()
    assert torch.equal(y, torch.zeros_like(y))
    x.copy_(inputs(4, 128, device, torch.bfloat16))
    graph.replay()
    assert error(y, x, made) < 0.04


@pytest.mark.parametrize("name", ["nf4", "nf4_double", "bnb8"])
@pytest.mark.parametrize("rows", [1, 33])
def test_bitsandbytes(name, rows, device):
    spec = Spec(name, 0)
    if reason := bitsandbytes.why_not(spec, device, torch.bfloat16):
        pytest.skip(reason)
    made = layer(spec, 512, 256, device)
    assert kernels.pick(spec, device, torch.bfloat16) is bitsandbytes
    for dtype, limit in ((torch.bfloat16, 5e-3), (torch.float16, 2e-3)):
        x = inputs(rows, 256, device, dtype)
        assert error(made(x), x, made) < (0.02 if name == "bnb8" else limit)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_fp4_is_decoded(name, device):
    spec = Spec(name, 0)
    made = layer(spec, 256, 128, device)
    x = inputs(5, 128, device, torch.bfloat16)
    assert error(made(x), x, made) < 5e-3
    assert torch.equal(
        made.weight_values().cpu(), formats.decode(spec, {n: t.cpu() for n, t in made.tensors().items()})
    )
