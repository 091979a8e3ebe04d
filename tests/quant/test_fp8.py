"""fp8: e4m3 rows against torch's cast, its product against one in float64, and who refuses where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moai_core.errors import UsageError
from moai_core.quant import scaled_mm
from moai_core.quant.formats import FORMATS, Spec

SPEC = Spec("fp8", 0)
FP8 = FORMATS["fp8"]


def every_value():
    """The finite non-negative values of e4m3, from its definition: 4 bits of exponent (bias 7), 3 of mantissa."""
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted([m / 8 * 2.0**-6 for m in range(8)] + normal), dtype=torch.float64)


def weight(rows=48, columns=96, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 2, rows)[:, None]


def test_every_number_is_the_nearest_e4m3_one():
    w = weight()
    stored = FP8.encode(SPEC, w)
    values = every_value()
    scaled = w.double() / stored["scales"].double()
    best = (scaled.abs()[..., None] - values).abs().amin(-1)
    taken = (scaled - stored["qweight"].double()).abs()
    # The quotient is rounded to fp32 first: half a step of that
    assert (taken <= best + 1e-4 * scaled.abs() * 2**-12).all()
    assert torch.equal(stored["qweight"].abs().float().amax(-1), torch.full((48,), 448.0))


def test_shapes_types_and_error_of_what_is_stored():
    w = weight()
    stored = FP8.encode(SPEC, w)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == FP8.tensors(SPEC, *w.shape)
    made = FP8.decode(SPEC, stored)
    assert made.dtype == torch.float32
    assert torch.equal(made, stored["qweight"].float() * stored["scales"])
    by_row = (made - w).norm(dim=-1) / w.norm(dim=-1)
    assert by_row.min() > 0.01 and by_row.max() < 0.035, "small rows are as exact as large ones"
    assert torch.equal(FP8.decode(SPEC, {n: t[3:5] for n, t in stored.items()}), made[3:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_the_weights_changes_nothing(dtype):
    w = weight().to(dtype)
    one, two = FP8.encode(SPEC, w), FP8.encode(SPEC, w.float())
    assert torch.equal(one["qweight"].view(torch.uint8), two["qweight"].view(torch.uint8))
    assert torch.equal(one["scales"], two["scales"])


def test_values_that_are_stored_come_back():
    values = torch.cat([every_value(), -every_value()]).float()[None]
    stored = FP8.encode(SPEC, values)
    assert torch.equal(FP8.decode(SPEC, stored), values)


def test_rows_of_zeros_and_of_next_to_nothing():
    w = torch.zeros(3, 32)
    w[1] = 1e-44
    w[2, 5] = 1e-30
    made = FP8.decode(SPEC, FP8.encode(SPEC, w))
    assert torch.equal(made[:2], torch.zeros(2, 32)) and torch.allclose(made[2], w[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    w = weight()
    w[3, 4] = bad
    with pytest.raises(UsageError, match="1 of 4608 weights are NaN or infinite"):
        FP8.encode(SPEC, w)


def test_other_groups_and_zero_points_are_refused():
    with pytest.raises(UsageError, match=r"one scale a row: group_size must be 0 \(got 128\)"):
        FP8.check(Spec("fp8", 128), 8, 256)
    with pytest.raises(UsageError, match="symmetric"):
        FP8.check(Spec("fp8", 0, symmetric=False), 8, 256)
    FP8.check(SPEC, 5, 7)


# ---- the kernel


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("shape", [(48, 96), (50, 70), (16, 16), (17, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product(rows, shape, dtype):
    """torch has the operator on processors, too: slow there, but the same numbers."""
    w = weight(*shape, seed=1)
    stored = FP8.encode(SPEC, w)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0] = 0
    y = scaled_mm.linear(SPEC, scaled_mm.prepare(SPEC, stored), x, shape[0])
    assert y.dtype == dtype and y.shape == (rows, shape[0]) and torch.isfinite(y).all()
    assert torch.equal(y[0], torch.zeros(shape[0], dtype=dtype))
    # What it says it computes: inputs rounded to e4m3 by row, in exact arithmetic.
    scales = (x.abs().amax(-1, keepdim=True).float() * (1 / 448)).clamp(min=1e-12)
    rounded = (x.float() * (1 / scales)).to(torch.float8_e4m3fn).double() * scales.double()
    expected = rounded @ FP8.decode(SPEC, stored).double().T
    assert torch.allclose(y.double(), expected, rtol=2**-7, atol=1e-5 * expected.abs().max())
    exact = x.double() @ FP8.decode(SPEC, stored).double().T
    if rows > 1:
        assert (y.double() - exact).norm() < 0.06 * exact.norm()


def test_it_says_where_it_can_not_run(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert "GPU with FP8 units" in scaled_mm.why_not(SPEC, cpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert scaled_mm.why_not(SPEC, gpu, torch.bfloat16).startswith("NVIDIA A100 has no FP8 units")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert scaled_mm.why_not(SPEC, gpu, torch.bfloat16) is None
    assert "float32" in scaled_mm.why_not(SPEC, gpu, torch.float32)
    assert "not int4" in scaled_mm.why_not(Spec("int4"), gpu, torch.bfloat16)
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="6.0"))
    assert "AMD" in scaled_mm.why_not(SPEC, gpu, torch.bfloat16)
