"""The causal convolution of every backend against float64 loops: values, states, gradients, packing, chunks, widths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_core.scan import BACKENDS, conv, conv_step

HERE = [name for name, backend in BACKENDS.items() if backend.why_not(torch.device("cpu"), torch.float32) is None]
SHAPES = [  # batch, length, channels, width
    (1, 1, 1, 1),
    (1, 1, 5, 4),
    (2, 2, 3, 4),
    (3, 5, 129, 3),
    (1, 17, 128, 2),
    (2, 33, 20, 7),
    (3, 65, 40, 4),
]
TIGHT = 1e-6


def problem(oracle, shape, *, packed=False, state=True, seed=None):
    batch, length, channels, width = shape
    rng = np.random.default_rng(seed)
    # A result of one number may cancel to nearly nothing, and has no others whose norm it could be measured by.
    draw = (lambda *size: np.abs(rng.standard_normal(*size))) if shape == (1, 1, 1, 1) else rng.standard_normal
    inputs = {
        "u": draw((batch, length, channels)),
        "weight": draw((channels, 1, width)),
        "bias": draw(channels),
        "state": rng.standard_normal((batch, channels, width - 1)) if state else None,
    }
    return inputs, oracle.numbering(rng, batch, length) if packed else None


def run(inputs, seq_idx, backend, dtype, weights, oracle):
    leaves = oracle.tensors(inputs, dtype, grad=True)
    y, final = conv(**leaves, seq_idx=None if seq_idx is None else torch.tensor(seq_idx), backend=backend)
    loss = (y * torch.tensor(weights[0], dtype=dtype)).sum() + (final * torch.tensor(weights[1], dtype=dtype)).sum()
    live = [x for x in leaves.values() if x is not None]
    return y, final, *torch.autograd.grad(loss, live, allow_unused=True)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", HERE)
def test_values_states_and_gradients(backend, shape, packed, state, oracle, poison):
    inputs, seq_idx = problem(oracle, shape, packed=packed, state=state)
    y, final = oracle.conv(**inputs, seq_idx=seq_idx)
    rng = np.random.default_rng()
    weights = rng.standard_normal(y.shape), rng.standard_normal(final.shape)
    wanted = run(inputs, seq_idx, "reference", torch.float64, weights, oracle)
    found = run(inputs, seq_idx, backend, torch.float32, weights, oracle)
    assert oracle.relative(found[0], y) < TIGHT and oracle.relative(found[1], final) < TIGHT
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert oracle.relative(a, b) < 3 * TIGHT


def test_reference_gradients_by_complex_steps(oracle):
    inputs, seq_idx = problem(oracle, (2, 11, 3, 4), packed=True)
    rng = np.random.default_rng()
    weights = rng.standard_normal((2, 11, 3)), rng.standard_normal((2, 3, 3))
    found = run(inputs, seq_idx, "reference", torch.float64, weights, oracle)[2:]
    for name, gradient in zip(inputs, found, strict=True):
        direction = rng.standard_normal(inputs[name].shape)
        y, final = oracle.conv(**{**inputs, name: inputs[name] + 1e-30j * direction}, seq_idx=seq_idx)
        slope = ((y * weights[0]).sum() + (final * weights[1]).sum()).imag / 1e-30
        assert (gradient.numpy() * direction).sum() == pytest.approx(slope, rel=1e-9), name


@pytest.mark.parametrize("backend", HERE)
def test_it_is_torchs_convolution(backend, oracle):
    inputs, _ = problem(oracle, (2, 30, 12, 4), state=False)
    u, weight, bias, _ = oracle.tensors(inputs).values()
    theirs = torch.nn.functional.conv1d(u.transpose(1, 2), weight, bias, padding=3, groups=12)[..., :30]
    y, _ = conv(u, weight, bias, backend=backend)
    assert oracle.relative(y, torch.nn.functional.silu(theirs).transpose(1, 2)) < TIGHT
    unbiased, _ = conv(u, weight, None, backend=backend)
    theirs = torch.nn.functional.conv1d(u.transpose(1, 2), weight, None, padding=3, groups=12)[..., :30]
    assert oracle.relative(unbiased, torch.nn.functional.silu(theirs).transpose(1, 2)) < TIGHT


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), length=st.integers(1, 40), width=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)  # fmt: skip
def test_chunks_equal_the_whole(backend, oracle, seed, length, width, cuts):
    inputs, _ = problem(oracle, (2, length, 3, width), seed=seed)
    leaves = oracle.tensors(inputs, grad=True)
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})

    def chain(edges):
        state, ys = leaves["state"], []
        for start, stop in pairwise(edges):
            y, state = conv(leaves["u"][:, start:stop], leaves["weight"], leaves["bias"], state=state, backend=backend)
            ys.append(y)
        y = torch.cat(ys, 1)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + state.sin().sum()
        return y, state, *torch.autograd.grad(loss, list(leaves.values()))

    # Two fp32 sums in another order: the gradient of the bias may cancel to a fraction of what it sums.
    for a, b in zip(chain(edges), chain([0, length]), strict=True):
        assert oracle.relative(a, b) < 1e-5


@pytest.mark.parametrize("backend", HERE)
def test_padding_is_inert(backend, oracle):
    inputs, _ = problem(oracle, (3, 21, 5, 4))
    numbers = torch.zeros(3, 21, dtype=torch.int32)
    for row, real in ((0, 13), (1, 0), (2, 1)):
        numbers[row, real:] = -1
        inputs["u"][row, real:] = np.nan
    leaves = oracle.tensors(inputs, grad=True)
    y, final = conv(**leaves, seq_idx=numbers, backend=backend)
    assert torch.equal(final[1], leaves["state"][1])
    assert torch.equal(final[2], torch.cat([leaves["state"][2, :, 1:], leaves["u"][2, :1].T], 1))
    assert not y[numbers < 0].any()
    for name, gradient in zip(leaves, torch.autograd.grad(y.sum() + final.sum(), list(leaves.values())), strict=True):
        assert gradient.isfinite().all(), name
    alone, last = conv(
        leaves["u"][:1, :13], leaves["weight"], leaves["bias"], state=leaves["state"][:1], backend=backend
    )
    assert oracle.relative(y[:1, :13], alone) < TIGHT and torch.equal(final[:1], last)


@pytest.mark.parametrize("backend", HERE)
def test_step_is_a_convolution_of_one_token(backend, oracle):
    for shape in ((1, 1, 1, 1), (3, 1, 130, 4), (2, 1, 7, 2)):
        inputs, _ = problem(oracle, shape)
        y, final = oracle.conv(**inputs)
        u, weight, bias, state = oracle.tensors(inputs).values()
        kept = state.clone()
        ours = conv_step(u[:, 0], weight, bias, state, backend=backend)
        assert oracle.relative(ours[0], y[:, 0]) < TIGHT and oracle.relative(ours[1], final) < TIGHT
        assert torch.equal(state, kept), "the state passed in was modified"


@pytest.mark.parametrize("backend", HERE)
def test_half_precision_inputs(backend, oracle):
    inputs, _ = problem(oracle, (2, 12, 6, 4))
    leaves = oracle.tensors(inputs, torch.bfloat16)
    wanted, _ = oracle.conv(**{n: x.double().numpy() for n, x in leaves.items()})
    y, final = conv(**leaves, backend=backend)
    assert y.dtype == final.dtype == torch.bfloat16
    assert oracle.relative(y, wanted) < torch.finfo(torch.bfloat16).eps
    assert torch.equal(final, leaves["u"][:, -3:].transpose(1, 2))
