"""An oracle for the scan: float64 NumPy loops that know documents, not marks, and random problems to try it on.

It is written apart from moai_core.scan: each row is cut into its documents and each document is run alone. It also
takes complex inputs, so that a derivative along a direction is exact to rounding (the complex-step method).
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")


def _documents(numbers):
    """Lists of positions, one list a document, padding left out; the first one continues the state."""
    groups, last = [], None
    for t, number in enumerate(numbers):
        if number < 0:
            continue
        if last is None or number != last:
            groups.append([])
        groups[-1].append(t)
        last = number
    return groups


def oracle_scan(u, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, seq_idx=None):
    batch, length, _ = u.shape
    y = np.zeros(u.shape, np.result_type(u, dt, A, B, C, *(x for x in (D, z, dt_bias, state) if x is not None)))
    final = np.zeros((batch, *A.shape), y.dtype)
    for b in range(batch):
        h = np.zeros(A.shape, y.dtype) if state is None else state[b].astype(y.dtype)
        numbers = np.zeros(length, int) if seq_idx is None else seq_idx[b]
        for i, document in enumerate(_documents(numbers)):
            if i > 0:
                h = np.zeros(A.shape, y.dtype)
            for t in document:
                x = dt[b, t] if dt_bias is None else dt[b, t] + dt_bias
                step = np.log1p(np.exp(x))
                h = np.exp(step[:, None] * A) * h + np.outer(step * u[b, t], B[b, t])
                out = h @ C[b, t] + (0 if D is None else D * u[b, t])
                y[b, t] = out if z is None else out * z[b, t] / (1 + np.exp(-z[b, t]))
        final[b] = h
    return y, final


def oracle_conv(u, weight, bias=None, state=None, seq_idx=None):
    batch, length, channels = u.shape
    past = weight.shape[-1] - 1
    y = np.zeros(u.shape, np.result_type(u, weight, *(x for x in (bias, state) if x is not None)))
    final = np.zeros((batch, channels, past), y.dtype)
    for b in range(batch):
        window = np.zeros((channels, past), y.dtype) if state is None else state[b].astype(y.dtype)
        numbers = np.zeros(length, int) if seq_idx is None else seq_idx[b]
        for i, document in enumerate(_documents(numbers)):
            if i > 0:
                window = np.zeros((channels, past), y.dtype)
            for t in document:
                full = np.concatenate([window, u[b, t][:, None]], 1)
                pre = (full * weight[:, 0]).sum(1) + (0 if bias is None else bias)
                y[b, t] = pre / (1 + np.exp(-pre))
                window = full[:, 1:]
        final[b] = window
    return y, final


def scan_problem(batch, length, channels, states, *, seed=None, packed=False, state=True, extras=True):
    """Random float64 inputs of a scan (fresh ones unless a seed is given), decays from almost 1 to almost 0."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    inputs = {
        "u": normal((batch, length, channels)),
        "dt": normal((batch, length, channels)) * 2 - 3,
        "A": -np.exp(normal((channels, states))),
        "B": normal((batch, length, states)),
        "C": normal((batch, length, states)),
        "D": normal(channels) if extras else None,
        "z": normal((batch, length, channels)) if extras else None,
        "dt_bias": normal(channels) if extras else None,
        "state": normal((batch, channels, states)) if state else None,
    }
    return inputs, numbering(rng, batch, length) if packed else None


def numbering(rng, batch, length):
    """Document numbers that start anywhere, with gaps; odd rows may end in padding, the third row is nothing else."""
    grows = rng.random((batch, length)) < 0.2
    numbers = np.cumsum(grows * rng.integers(1, 4, (batch, length)), 1) + rng.integers(0, 5)
    for b in range(batch):
        pad = int(rng.integers(0, max(1, length // 2))) if b % 2 else 0
        if pad:
            numbers[b, length - pad :] = -1
    if batch > 2:
        numbers[2] = -1
    return numbers.astype(np.int32)


def relative(found, wanted):
    """||found - wanted|| / ||wanted||, of anything array-like; 0 for two zeros.

    A handful of numbers can cancel to almost nothing by chance; their rounding is judged beside what was summed, which
    is of order one here.
    """
    found, wanted = (np.asarray(x.detach().double() if isinstance(x, torch.Tensor) else x) for x in (found, wanted))
    assert found.shape == wanted.shape
    distance, size = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
    if wanted.size <= 4:
        size = max(size, 0.1)
    return distance / size if size else distance


def tensors(inputs, dtype=torch.float32, grad=False):
    return {name: None if x is None else torch.tensor(x, dtype=dtype, requires_grad=grad) for name, x in inputs.items()}


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(
        scan=oracle_scan,
        conv=oracle_conv,
        problem=scan_problem,
        numbering=numbering,
        relative=relative,
        tensors=tensors,
        names=NAMES,
    )


@pytest.fixture
def poison(monkeypatch):
    """Every fresh buffer holds NaN, so that an element nobody wrote shows."""
    plain_empty, plain_new, plain_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def spoil(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(plain_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: spoil(plain_new(*a, **k)))
