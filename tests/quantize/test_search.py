"""The searched grid: what it stores, never worse than the whole range, and which errors it weighs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_core.errors import CheckpointError, UsageError
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quantize import search

SPECS = [Spec("int4", 32), Spec("int4", 32, symmetric=False), Spec("int8", 32), Spec("int4", 0), Spec("int8", 0)]


def stored(spec, weight, scales, zeros):
    parts = (scales,) if zeros is None else (scales, zeros)
    return decode(spec, FORMATS[spec.format].encode_with(spec, weight, *parts))


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), out=st.integers(1, 9), scale=st.sampled_from([1e-9, 1e-3, 1.0, 3000.0]))
def test_never_worse_than_the_whole_range(spec, seed, out, scale):
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 96, generator=make).pow(3) * scale
    found = stored(spec, weight, *search.clip(spec, weight))
    whole = stored(spec, weight, *search.clip(spec, weight, steps=1))
    nearest = decode(spec, FORMATS[spec.format].encode(spec, weight))
    error, first, plain = (float((q - weight).square().sum()) for q in (found, whole, nearest))
    # A scale that fp16 barely holds is coarse: only rounding to it can differ.
    assert error <= first * (1 + 1e-5) and (scale < 1e-6 or error <= plain * 1.02)
    # The grid that the search rounds to is the one that is stored.
    assert torch.equal(search.rounded(spec, weight, *search.clip(spec, weight)), found)


def test_all_sixteen_levels_are_used():
    weight = torch.linspace(-0.7, 0.8, 32)[None]
    for sign in (1, -1):
        scales, _ = search.clip(Spec("int4", 32), sign * weight, steps=1)
        whole = (sign * weight / scales.float()).round()
        assert whole.min() == -8 and whole.max() == 7 and float(scales) * sign < 0
    scales, _ = search.clip(Spec("int4", 32), weight, signed=False)
    assert float(scales) > 0


def test_importance_decides_what_is_clipped():
    weight = torch.full((1, 32), 0.1)
    weight[0, ::2], weight[0, 3] = 0.05, 1.0
    spec, importance = Spec("int4", 32), torch.ones(32)
    errors = []
    for loud in (1e-6, 1e6):
        importance[3] = loud
        found = stored(spec, weight, *search.clip(spec, weight, importance))
        errors.append(float((found - weight)[0, 3].abs()))
    assert errors[0] > 0.2 and errors[1] < 0.04


def test_blocks_measure_the_error_of_the_output():
    """With the second moments of each group's inputs the best of the tried ranges is the one of least output error."""
    make = torch.Generator().manual_seed(3)
    weight, x = torch.randn(6, 64, generator=make), torch.randn(500, 64, generator=make)
    x[:, 1] = x[:, 0] * 0.9
    x[:, 40] *= 20
    spec, blocks = Spec("int4", 32), torch.stack([p.T @ p for p in x.split(32, 1)])
    found = stored(spec, weight, *search.clip(spec, weight, blocks))
    others = [
        stored(spec, weight, *search.clip(spec, weight)),
        stored(spec, weight, *search.clip(spec, weight, steps=1)),
    ]

    def error(made):
        pairs = zip((made - weight).split(32, 1), x.split(32, 1), strict=True)
        return torch.stack([(e @ p.T).square().sum(1) for e, p in pairs])

    for other in others:
        assert bool((error(found) <= error(other) * (1 + 1e-4)).all())
    assert float(error(found).sum()) < 0.95 * float(error(others[1]).sum())


def test_zeros_and_constants():
    for spec in SPECS:
        for value in (0.0, 0.25, -3.0):
            weight = torch.full((2, 64), value)
            found = stored(spec, weight, *search.clip(spec, weight))
            assert float((found - weight).abs().max()) <= abs(value) * 2e-3


def test_refusals():
    with pytest.raises(UsageError, match="fp8 has no evenly spaced levels"):
        search.clip(Spec("fp8", 0), torch.ones(2, 32))
    with pytest.raises(CheckpointError, match=r"a\.b: 2 of 4 values are NaN or infinite"):
        search.check_weight("a.b", torch.tensor([1.0, float("nan"), float("inf"), 0.0]))
    with pytest.raises(UsageError, match="beyond the range of fp16"):
        search.check_weight("a.b", torch.tensor([1e5]))
