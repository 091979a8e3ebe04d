"""GPTQ against the paper's column loop written plainly in float64, and what it is for: less error on correlated inputs."""

from __future__ import annotations

import pytest
import torch

from moai_core.errors import CheckpointError, NonFiniteError, UsageError
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quantize import gptq, search


def correlated(size, rows=4000, seed=0):
    """The second moments (size, size) of inputs that share a few directions, with a few loud channels."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=make, dtype=torch.float64) * torch.logspace(0, -2, size)
    x = torch.randn(rows, size, generator=make, dtype=torch.float64) @ mix.T
    x[:, :: max(1, size // 5)] *= 8
    return x.T @ x / rows


def weights(out, size, seed=1, dtype=torch.float64):
    return torch.randn(out, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss(weight, made, H):
    error = made.double() - weight.double()
    return float(((error @ H) * error).sum())


def plain(weight, H, damp, group, taken, low, high, scale_of):
    """The paper's algorithm 1 without blocks: one column at a time, the inverse Hessian by elimination."""
    W, size = weight.clone(), weight.shape[1]
    H = H + damp * H.diagonal().mean() * torch.eye(size, dtype=H.dtype)
    inverse = torch.linalg.inv(H[taken][:, taken])
    made, scales = torch.zeros_like(W), {}
    for step, column in enumerate(taken.tolist()):
        number = column // group
        if number not in scales:
            scales[number] = scale_of(W[:, number * group : (number + 1) * group], inverse, step, number, taken)
        scale = scales[number]
        made[:, column] = (W[:, column] / scale).round().clamp(low, high) * scale
        error = (W[:, column] - made[:, column]) / inverse[0, 0]
        later = taken[step + 1 :]
        W[:, later] -= error[:, None] * inverse[0, 1:]
        # Eliminate the column that is done from the inverse (the paper's equation 3).
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    return made


def whole_range(groups, *_):
    """The scale that just reaches both ends, of the sign that makes it smaller."""
    top, bottom = groups.amax(1), groups.amin(1)
    plus, minus = torch.maximum(top / 7, -bottom / 8), torch.maximum(top / 8, -bottom / 7)
    return torch.where(minus < plus, -minus, plus).half().double()


@pytest.mark.parametrize("order", gptq.ORDERS)
@pytest.mark.parametrize(("out", "size", "group"), [(24, 256, 32), (5, 192, 64), (1, 64, 0), (3, 320, 0)])
def test_equals_the_papers_loop(out, size, group, order):
    weight, H = weights(out, size), correlated(size)
    made = gptq.quantize(Spec("int4", group), weight, H, name="w", order=order, steps=1)
    diagonal, g = H.diagonal(), group or size
    if order == "none":
        taken = torch.arange(size)
    elif order == "columns":
        taken = torch.tensor(sorted(range(size), key=lambda i: -float(diagonal[i])))
    else:
        numbers = sorted(range(size // g), key=lambda n: -float(diagonal[n * g : (n + 1) * g].mean()))
        taken = torch.tensor(
            [i for n in numbers for i in sorted(range(n * g, n * g + g), key=lambda i: -float(diagonal[i]))]
        )
    scale_of = whole_range
    if order == "columns":  # static: from the weights as they were

        def scale_of(_, inverse, step, number, taken):
            return whole_range(weight[:, number * g : (number + 1) * g])

    expected = plain(weight, H, gptq.DAMP, g, taken, -8, 7, scale_of)
    assert torch.equal(made.weight, expected.float())


@pytest.mark.parametrize(
    "spec", [Spec("int4", 64), Spec("int4", 32, symmetric=False), Spec("int8", 64), Spec("int4", 0)]
)
@pytest.mark.parametrize("order", gptq.ORDERS)
def test_loses_less_than_rounding_on_correlated_inputs(spec, order):
    weight, H = weights(48, 256, dtype=torch.float32), correlated(256)
    nearest = gptq.encoded(spec, weight, *search.clip(spec, weight))
    made = gptq.quantize(spec, weight, H, name="w", order=order)
    assert loss(weight, made.weight, H) < 0.7 * loss(weight, nearest.weight, H)
    # What is reported is what is stored.
    assert torch.equal(decode(spec, made.tensors), made.weight)
    layout = FORMATS[spec.format].tensors(spec, 48, 256)
    assert {n: (tuple(t.shape), t.dtype) for n, t in made.tensors.items()} == layout


def test_inputs_without_correlation_round_to_nearest():
    spec, weight = Spec("int4", 64), weights(16, 128, dtype=torch.float32)
    made = gptq.quantize(spec, weight, torch.eye(128, dtype=torch.float64), name="w")
    nearest = gptq.encoded(spec, weight, *search.clip(spec, weight))
    assert torch.equal(made.weight, nearest.weight)


def test_unused_inputs_round_to_nearest_and_are_counted():
    spec, weight, H = Spec("int4", 64), weights(16, 128, dtype=torch.float32), correlated(128)
    H[5], H[:, 5], H[70:], H[:, 70:] = 0, 0, 0, 0
    made = gptq.quantize(spec, weight, H, name="w")
    assert made.report["unused"] == 59
    # Nothing is passed on to them: they stand on the grid point that is nearest to what they were.
    scales = made.tensors["scales"]
    assert torch.equal(made.weight[:, 70:], search.rounded(spec, weight, scales, None)[:, 70:])
    none = gptq.quantize(spec, weight, torch.zeros_like(H), name="w")
    assert torch.equal(none.weight, gptq.encoded(spec, weight, *search.clip(spec, weight)).weight)


def test_damping_is_raised_where_it_does_not_suffice():
    # Not positive definite, as rounding can leave the moments of almost dependent inputs: the least eigenvalue is -0.2.
    H = torch.full((64, 64), 1.2, dtype=torch.float64).fill_diagonal_(1.0)
    made = gptq.quantize(Spec("int4", 32), weights(4, 64), H, name="w", damp=0.01)
    assert made.report["damp"] == pytest.approx(1.0) and bool(torch.isfinite(made.weight).all())
    assert gptq.quantize(Spec("int4", 32), weights(4, 64), H, name="w", damp=0.3).report["damp"] == 0.3


def test_refusals():
    H, weight = torch.eye(64, dtype=torch.float64), weights(4, 64)
    with pytest.raises(UsageError, match="group size 128 doesn't divide 64"):
        gptq.quantize(Spec("int4", 128), weight, H, name="w")
    with pytest.raises(UsageError, match="order"):
        gptq.quantize(Spec("int4", 32), weight, H, name="w", order="random")
    with pytest.raises(UsageError, match="damp must be above 0"):
        gptq.quantize(Spec("int4", 32), weight, H, name="w", damp=0.0)
    weight[2, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.3\.x: 1 of 256 values are NaN"):
        gptq.quantize(Spec("int4", 32), weight, H, name="layers.3.x")
    with pytest.raises(NonFiniteError, match=r"layers\.3\.x"):
        gptq.quantize(Spec("int4", 32), weights(4, 64), H * float("inf"), name="layers.3.x")
