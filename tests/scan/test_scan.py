"""The selective scan of every backend against float64 loops: values, states, gradients, packing, chunks, odd sizes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_core.scan import BACKENDS, reference, scan, step

HERE = [name for name, backend in BACKENDS.items() if backend.why_not(torch.device("cpu"), torch.float32) is None]
SHAPES = [  # batch, length, channels, states: one channel, one state, a tile and one more, odd everything
    (1, 1, 1, 1),
    (1, 2, 3, 8),
    (3, 3, 16, 16),
    (1, 5, 129, 33),
    (3, 17, 5, 1),
    (1, 63, 32, 16),
    (2, 64, 128, 4),
    (3, 65, 20, 16),
    (1, 257, 24, 16),
    (1, 9, 6, 128),
]
TIGHT = 2e-6  # relative norm error that float32 arithmetic earns against float64


def gradients(function, inputs, seq_idx, dtype, weights):
    """(y, state, {name: gradient}) of a random weighting of both results."""
    given = {
        name: None if x is None else torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in inputs.items()
    }
    state = given.pop("state")
    y, final = function(**given, state=state, seq_idx=None if seq_idx is None else torch.tensor(seq_idx))
    loss = sum((x * torch.tensor(w, dtype=x.dtype)).sum() for x, w in zip((y, final), weights, strict=True))
    leaves = {name: x for name, x in (*given.items(), ("state", state)) if x is not None}
    return y, final, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", HERE)
def test_values_and_final_state(backend, shape, packed, oracle, poison):
    for state in (False, True):
        inputs, seq_idx = oracle.problem(*shape, packed=packed, state=state)
        y, final = oracle.scan(**inputs, seq_idx=seq_idx)
        given = oracle.tensors(inputs)
        with torch.no_grad():
            ours = scan(**given, seq_idx=None if seq_idx is None else torch.tensor(seq_idx), backend=backend)
        assert oracle.relative(ours[0], y) < TIGHT
        assert oracle.relative(ours[1], final) < TIGHT
        assert ours[0].dtype == ours[1].dtype == torch.float32
        if seq_idx is not None:
            assert not ours[0][torch.tensor(seq_idx) < 0].any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [name for name in HERE if name != "reference"])
def test_every_gradient(backend, shape, packed, oracle, poison):
    inputs, seq_idx = oracle.problem(*shape, packed=packed)
    rng = np.random.default_rng()
    weights = rng.standard_normal(shape[:3]), rng.standard_normal((shape[0], shape[2], shape[3]))
    wanted = gradients(reference.scan, inputs, seq_idx, torch.float64, weights)[2]
    found = gradients(BACKENDS[backend].scan, inputs, seq_idx, torch.float32, weights)[2]
    assert set(found) == set(oracle.names)
    for name, gradient in found.items():
        assert oracle.relative(gradient, wanted[name]) < 5 * TIGHT, name


def test_reference_gradients_by_complex_steps(oracle):
    """The reference's gradient of each input along a random direction against the differentiated oracle."""
    shape = (2, 9, 4, 3)
    inputs, seq_idx = oracle.problem(*shape, packed=True)
    rng = np.random.default_rng()
    weights = rng.standard_normal(shape[:3]), rng.standard_normal((2, 4, 3))
    found = gradients(reference.scan, inputs, seq_idx, torch.float64, weights)[2]
    for name in oracle.names:
        direction = rng.standard_normal(inputs[name].shape)
        nudged = {**inputs, name: inputs[name] + 1e-30j * direction}
        y, final = oracle.scan(**nudged, seq_idx=seq_idx)
        slope = ((y * weights[0]).sum() + (final * weights[1]).sum()).imag / 1e-30
        assert (found[name].numpy() * direction).sum() == pytest.approx(slope, rel=1e-9), name


@pytest.mark.parametrize("missing", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias", "state")])
@pytest.mark.parametrize("backend", HERE)
def test_optional_inputs(backend, missing, oracle):
    shape = (2, 19, 7, 5)
    inputs, _ = oracle.problem(*shape)
    inputs.update(dict.fromkeys(missing))
    y, final = oracle.scan(**inputs)
    weights = np.random.default_rng().standard_normal(shape[:3]), np.zeros((2, 7, 5))
    wanted = gradients(reference.scan, inputs, None, torch.float64, weights)[2]
    ours = gradients(BACKENDS[backend].scan, inputs, None, torch.float32, weights)
    assert oracle.relative(ours[0], y) < TIGHT and oracle.relative(ours[1], final) < TIGHT
    assert not set(missing) & set(ours[2])
    for name, gradient in ours[2].items():
        assert oracle.relative(gradient, wanted[name]) < 5 * TIGHT, name


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 70), cuts=st.lists(st.integers(0, 70), max_size=4))
def test_chunks_equal_the_whole(backend, oracle, seed, length, cuts):
    """Any split into chunks, states handed on, gives the values and gradients of one call (packed rows too)."""
    inputs, seq_idx = oracle.problem(2, length, 5, 4, seed=seed, packed=bool(seed % 2))
    given_inputs = oracle.tensors(inputs, grad=True)
    numbers = None if seq_idx is None else torch.tensor(seq_idx)
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    if numbers is not None:  # a chunk continues its state: cut only inside documents
        edges = [
            e
            for e in edges
            if e in (0, length) or bool(((numbers[:, e] == numbers[:, e - 1]) | (numbers[:, e] < 0)).all())
        ]
    timed = ("u", "dt", "B", "C", "z")

    def run(pieces):
        state, ys = given_inputs["state"], []
        for start, stop in pieces:
            part = {n: x[:, start:stop] if n in timed else x for n, x in given_inputs.items() if n != "state"}
            y, state = scan(
                **part, state=state, seq_idx=None if numbers is None else numbers[:, start:stop], backend=backend
            )
            ys.append(y)
        y = torch.cat(ys, 1)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + state.sin().sum()
        return y, state, *torch.autograd.grad(loss, list(given_inputs.values()))

    whole, split = run([(0, length)]), run(list(pairwise(edges)))
    for a, b in zip(split, whole, strict=True):
        assert oracle.relative(a, b) < 5 * TIGHT


@pytest.mark.parametrize("backend", HERE)
def test_packed_documents_equal_each_alone(backend, oracle):
    inputs, _ = oracle.problem(1, 40, 9, 16, state=False)
    whole = oracle.tensors(inputs)
    numbers = torch.tensor([[7] * 11 + [8] + [12] * 28], dtype=torch.int32)
    y, final = scan(**whole, seq_idx=numbers, backend=backend)
    for start, stop in ((0, 11), (11, 12), (12, 40)):
        part = {n: x[:, start:stop] if n in ("u", "dt", "B", "C", "z") else x for n, x in whole.items()}
        alone, last = scan(**part, backend=backend)
        assert oracle.relative(y[:, start:stop], alone) < TIGHT
    assert oracle.relative(final, last) < TIGHT


@pytest.mark.parametrize("backend", HERE)
def test_padding_is_inert(backend, oracle):
    """NaN in padding reaches neither results nor gradients, and a row of padding hands on its state's bits."""
    inputs, _ = oracle.problem(2, 20, 6, 4)
    for name in ("u", "dt", "B", "C", "z"):
        inputs[name][0, 13:] = np.nan
        inputs[name][1] = np.nan
    numbers = torch.zeros(2, 20, dtype=torch.int32)
    numbers[0, 13:] = -1
    numbers[1] = -1
    given_inputs = oracle.tensors(inputs, grad=True)
    y, final = scan(**given_inputs, seq_idx=numbers, backend=backend)
    assert torch.equal(final[1], given_inputs["state"][1]) and not y[1].any()
    for name, gradient in zip(
        given_inputs, torch.autograd.grad(y.sum() + final.sum(), list(given_inputs.values())), strict=True
    ):
        assert gradient.isfinite().all(), name
        if name in ("u", "dt", "B", "C", "z"):
            assert not gradient[0, 13:].any() and not gradient[1].any(), name


@pytest.mark.parametrize("backend", HERE)
def test_step_is_a_scan_of_one_token(backend, oracle):
    for shape in ((1, 1, 1, 1), (3, 1, 130, 16), (2, 1, 7, 33)):
        inputs, _ = oracle.problem(*shape)
        y, final = oracle.scan(**inputs)
        given_inputs = {n: x[:, 0] if n in ("u", "dt", "B", "C", "z") else x for n, x in oracle.tensors(inputs).items()}
        kept = given_inputs["state"].clone()
        ours = step(**given_inputs, backend=backend)
        assert oracle.relative(ours[0], y[:, 0]) < TIGHT and oracle.relative(ours[1], final) < TIGHT
        assert torch.equal(given_inputs["state"], kept), "the state passed in was modified"


@pytest.mark.parametrize("backend", HERE)
def test_step_differentiates(backend, oracle):
    inputs, _ = oracle.problem(2, 1, 5, 3)
    flat = {n: x[:, 0] if n in ("u", "dt", "B", "C", "z") else x for n, x in inputs.items()}
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        leaves = oracle.tensors(flat, dtype, grad=True)
        y, final = step(**leaves, backend=name)
        results.append(torch.autograd.grad(y.sum() + final.square().sum(), list(leaves.values())))
    for a, b in zip(*reversed(results), strict=True):
        assert oracle.relative(a, b) < 5 * TIGHT


@pytest.mark.parametrize("backend", HERE)
def test_slow_states_keep_their_memory(backend):
    """A decay of 1 - 1e-6 a token over 20000 tokens: what was stored at first must still be there, and no more."""
    length = 20000
    rate = 1e-6
    raw = float(np.log(np.expm1(rate)))  # softplus(raw) = rate
    u = torch.zeros(1, length, 1)
    u[0, 0] = 1e6
    ones = torch.ones(1, length, 1)
    with torch.no_grad():
        _, final = scan(u, torch.full_like(u, raw), torch.full((1, 1), -1.0), ones, ones, backend=backend)
    # each step's decay is a float32, at most half a unit (3e-8) away from exp(-1e-6)
    assert final.item() == pytest.approx(np.exp(-rate * (length - 1)), rel=length * 3e-8)


@pytest.mark.parametrize("backend", HERE)
def test_fast_decays_and_large_steps_stay_finite(backend, oracle):
    inputs, _ = oracle.problem(1, 30, 8, 4)
    inputs["dt"] = np.random.default_rng().uniform(-120, 60, inputs["dt"].shape)
    inputs["A"] *= 50
    inputs["z"] *= 40
    y, final = oracle.scan(**inputs)
    leaves = oracle.tensors(inputs, grad=True)
    ours = scan(**leaves, backend=backend)
    assert oracle.relative(ours[0], y) < TIGHT and oracle.relative(ours[1], final) < TIGHT
    for gradient in torch.autograd.grad(ours[0].sum(), [x for n, x in leaves.items()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ["u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state"])
def test_nan_is_seen(backend, name, oracle):
    """The non-finite guard of training relies on it: a NaN anywhere comes out somewhere."""
    inputs, _ = oracle.problem(1, 20, 3, 2)
    inputs[name][(0,) * inputs[name].ndim] = np.nan
    y, _ = scan(**oracle.tensors(inputs), backend=backend)
    assert y.isnan().any()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend, dtype, oracle):
    """Rounded at the door and at the end only: the state is float32 all the way."""
    inputs, _ = oracle.problem(2, 33, 20, 16)
    halves = oracle.tensors(inputs, torch.float64)
    for name in ("u", "dt", "B", "C", "z"):
        halves[name] = halves[name].to(dtype).requires_grad_()
    wanted_y, wanted_final = oracle.scan(**{n: x.detach().double().numpy() for n, x in halves.items()})
    given_inputs = {n: x if x.dtype == dtype else x.float() for n, x in halves.items()}
    y, final = scan(**given_inputs, backend=backend)
    assert y.dtype == dtype and final.dtype == torch.float32
    assert oracle.relative(final, wanted_final) < TIGHT
    assert oracle.relative(y, wanted_y) < torch.finfo(dtype).eps
    gradient = torch.autograd.grad(y.float().sum(), given_inputs["u"])[0]
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_no_tokens(backend):
    state = torch.randn(2, 3, 4)
    empty = torch.empty(2, 0, 3)
    y, final = scan(
        empty, empty, -torch.ones(3, 4), torch.empty(2, 0, 4), torch.empty(2, 0, 4), state=state, backend=backend
    )
    assert y.shape == (2, 0, 3) and torch.equal(final, state)
