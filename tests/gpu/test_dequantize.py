"""Stored matrices as numbers by a kernel against the formats' own decoding, bit for bit; gradients of scales and zeros
against float64."""

from __future__ import annotations

import pytest
import torch

from moai_core import cuda
from moai_core.quant import dequantize
from moai_core.quant.formats import FORMATS, Spec, pack4

pytestmark = pytest.mark.gpu
SPECS = [
    Spec("int4", 32),
    Spec("int4", 128),
    Spec("int4", 64, False),
    Spec("int4", 0),
    Spec("int8", 0),
    Spec("int8", 64),
]
SPECS += [Spec(name, 0) for name in ("fp8", "nvfp4", "mxfp4", "nf4", "nf4_double", "bnb8")]


def same(found, want):
    kind = {2: torch.int16, 4: torch.int32}[want.element_size()]
    assert found.dtype == want.dtype and torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.nan_to_num().view(kind), want.nan_to_num().view(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format}-{s.group_size}-{s.symmetric}")
def test_values(device, spec, dtype):
    if reason := cuda.why_not(device):
        pytest.skip(reason)
    for rows, columns in ((37, 384), (1, 128), (260, 256)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        weight *= torch.logspace(-3, 1, rows)[:, None]
        weight[0, 5:40] = 0
        stored = {name: t.to(device) for name, t in FORMATS[spec.format].encode(spec, weight).items()}
        same(dequantize.decoded(spec, stored, dtype), FORMATS[spec.format].decode(spec, stored).to(dtype))


def test_every_code(device):
    if reason := cuda.why_not(device):
        pytest.skip(reason)
    codes = torch.arange(256, dtype=torch.uint8, device=device)[None]
    one = torch.ones(1, 1, device=device)
    fp8 = {"qweight": codes.view(torch.float8_e4m3fn), "scales": one}
    same(dequantize.decoded(Spec("fp8", 0), fp8, torch.float32), FORMATS["fp8"].decode(Spec("fp8", 0), fp8))
    int8 = {"qweight": codes.view(torch.int8), "scales": one.half()}
    same(dequantize.decoded(Spec("int8", 0), int8, torch.float32), codes.view(torch.int8).float())


def test_what_the_kernel_does_not_know_is_decoded_all_the_same(device):
    spec = Spec("int4", 0)
    stored = {name: t.to(device) for name, t in FORMATS["int4"].encode(spec, torch.randn(5, 12)).items()}
    same(dequantize.decoded(spec, stored, torch.float32), FORMATS["int4"].decode(spec, stored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_scales_and_zeros(device, dtype, group, symmetric):
    if reason := cuda.why_not(device):
        pytest.skip(reason)
    rows, columns = 37, 512
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    scales, zeros = torch.rand(2, rows, columns // group, generator=generator) + 0.1
    zeros = None if symmetric else 15 * zeros
    gradient = torch.randn(rows, columns, generator=generator).to(dtype)
    found = dequantize.gradients(
        *(None if t is None else t.to(device) for t in (gradient, pack4(codes), scales, zeros)), group
    )
    leaves = [t.double().requires_grad_() for t in (scales, zeros) if t is not None]
    zero = 8.0 if symmetric else leaves[1][..., None]
    made = (codes.double().unflatten(1, (-1, group)) - zero) * leaves[0][..., None]
    made.flatten(1).backward(gradient.double())
    assert (found[1] is None) == symmetric
    for got, leaf in zip(found, leaves, strict=False):
        assert got.dtype == torch.float32
        assert float((got.cpu().double() - leaf.grad).norm() / leaf.grad.norm()) < 1e-6
    assert dequantize.gradients(gradient.to(device), pack4(codes).to(device), scales.to(device), None, 0) is None
