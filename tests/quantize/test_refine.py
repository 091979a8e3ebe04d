"""Coordinate descent and the fit of scales: never worse, optimal in each coordinate, and the same format."""

from __future__ import annotations

import pytest
import torch

from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quantize import gptq, refine, search

SPECS = [Spec("int4", 32), Spec("int4", 64, symmetric=False), Spec("int8", 0), Spec("int4", 0)]


def problem(out=12, size=192, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(900, size, generator=make, dtype=torch.float64)
    x = x @ (torch.randn(size, size, generator=make, dtype=torch.float64) * torch.logspace(0, -2, size))
    x[:, ::17] *= 6
    return torch.randn(out, size, generator=make, dtype=torch.float64).to(dtype), x.T @ x / 900


def losses(weight, made, H, damp=gptq.DAMP):
    """By row, under the damped moments."""
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    error = made.double() - weight.double()
    return ((error @ H) * error).sum(1)


@pytest.mark.parametrize("spec", SPECS)
def test_error_falls_in_every_row_with_every_sweep(spec):
    weight, H = problem()
    first = gptq.quantize(spec, weight, H, name="w")
    before = losses(weight, first.weight, H)
    for sweeps in (1, 2, 4):
        made = refine.refine(spec, weight, H, first, sweeps=sweeps)
        after = losses(weight, made.weight, H)
        assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < float(before.sum())
        before = after
        assert torch.equal(decode(spec, made.tensors), made.weight)
        layout = FORMATS[spec.format].tensors(spec, *weight.shape)
        assert {n: (tuple(t.shape), t.dtype) for n, t in made.tensors.items()} == layout
    # By how much depends on how many levels there are to choose among.
    bound = 0.98 if spec.format == "int4" else 0.9999
    assert float(before.sum()) < bound * float(losses(weight, first.weight, H).sum())


def test_no_single_change_of_a_code_helps_where_it_has_settled():
    spec, (weight, H) = Spec("int4", 32), problem(3, 64)
    made = refine.refine(spec, weight, H, gptq.quantize(spec, weight, H, name="w"), sweeps=1)
    for _ in range(30):  # without fits of the scales until nothing changes
        before = made.weight
        made = refine.refine(spec, weight, H, made, sweeps=1)
    assert torch.equal(before, made.weight)
    least, step = losses(weight, made.weight, H), made.tensors["scales"].double().repeat_interleave(32, 1)
    for column in range(64):
        for change in (-1, 1):
            other = made.weight.double().clone()
            other[:, column] += change * step[:, column]
            code = (other / step)[:, column].round()
            allowed = (code >= -8) & (code <= 7)
            assert bool((losses(weight, other, H) >= least * (1 - 1e-6))[allowed].all())


def test_scales_solve_the_least_squares_problem():
    spec, (weight, H) = Spec("int4", 32), problem(4, 96)
    start = gptq.encoded(spec, weight, *search.clip(spec, weight))
    H = H / H.diagonal().mean() + 0.05 * torch.eye(96, dtype=H.dtype)
    columns = start.weight.double().T.contiguous()
    scales, fitted = refine._fit(spec, weight, H, columns, start.tensors["scales"])
    root = torch.linalg.cholesky(H).T
    codes = (start.weight.double().unflatten(1, (-1, 32)) / start.tensors["scales"].double()[..., None]).round()
    for row in range(4):
        basis = torch.zeros(96, 3, dtype=torch.float64)
        for g in range(3):
            basis[g * 32 : (g + 1) * 32, g] = codes[row, g]
        best = torch.linalg.lstsq(root @ basis, root @ weight[row]).solution
        torch.testing.assert_close(scales[row].double(), best, rtol=2e-3, atol=0)
        torch.testing.assert_close(fitted[:, row], basis @ scales[row].double())


def test_groups_of_zeros_and_unused_inputs_stay():
    spec, (weight, H) = Spec("int4", 32), problem(4, 96, dtype=torch.float32)
    weight[:, 32:64] = 0
    weight[1] = 0
    H[70:], H[:, 70:] = 0, 0
    made = refine.refine(spec, weight, H, gptq.quantize(spec, weight, H, name="w"))
    assert bool(torch.isfinite(made.weight).all()) and bool((made.weight[1] == 0).all())
    nothing = gptq.quantize(spec, weight, torch.zeros_like(H), name="w")
    assert refine.refine(spec, weight, torch.zeros_like(H), nothing) is nothing
