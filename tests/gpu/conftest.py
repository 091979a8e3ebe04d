"""What the GPU tests share: the device, random scan problems, the float64 reference to judge by, poisoned memory.

`pytest -m gpu tests/gpu` runs all. They need a CUDA GPU, or another device that the environment variable
MOAI_TEST_DEVICE names, where the backend under test doesn't refuse it.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from moai_core.scan import reference

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test, with its index."""
    name = os.environ.get("MOAI_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


@pytest.fixture
def scans(device):
    """Helpers to run and judge the scan backend "cuda"; skips with its reason where it refuses the device."""
    from moai_core import scan

    if "cuda" not in scan.BACKENDS:
        pytest.skip("moai_core.scan has no backend 'cuda'")
    reason = scan.BACKENDS["cuda"].why_not(device, torch.float32)
    if reason:
        pytest.skip(reason)
    return SimpleNamespace(
        problem=problem,
        run=run,
        ours=ours,
        reference=reference.scan,
        judge=judge,
        check=check,
        relative=relative,
        poisoned=_poisoned,
        small=device.type != "cuda",
    )


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _poisoned():
    """Memory that torch hands out is full of NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def poisoned():
    """`with poisoned():` memory that torch hands out is full of NaN."""
    return _poisoned


def problem(batch, length, channels, states, dtype, device, *, seed=0, without=(), bias=None, decay=None, seq_idx=None):
    """Inputs of a scan by name and the gradients of its results (`g_y`, `g_state`), rounded to `dtype` where the scan
    has them in it.

    without: names that are None; bias: what every dt_bias is near (-20: steps of almost 0); decay: every A;
    seq_idx: (B, L); whatever is padding holds NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = {
        "u": normal(batch, length, channels),
        "dt": normal(batch, length, channels) * 2 - 3,
        "A": -torch.exp(normal(channels, states)),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": 2 * normal(batch, length, channels),
        "dt_bias": normal(channels),
        "state": normal(batch, channels, states),
        "g_y": normal(batch, length, channels),
        "g_state": normal(batch, channels, states),
    }
    if bias is not None:
        x["dt"], x["dt_bias"] = x["dt"] * 0.1, x["dt_bias"] * 0.1 + bias
    if decay is not None:
        x["A"] = torch.full_like(x["A"], decay)
    for name in ("u", "dt", "B", "C", "z", "g_y"):
        x[name] = x[name].to(dtype)
        if seq_idx is not None:
            x[name][seq_idx.cpu() < 0] = float("nan")
    return {name: None if name in without else value.to(device) for name, value in x.items()}


def ours(*inputs, **options):
    from moai_core import scan

    with _poisoned():
        return scan.scan(*inputs, **options, backend="cuda")


def run(function, inputs, seq_idx=None, *, dtype=None):
    """{name: y, last and the gradient of each input} of a scan; `dtype` is what it computes in, all inputs cast."""
    x = {n: v if v is None or dtype is None else v.to(dtype) for n, v in inputs.items()}
    leaves = {n: None if x[n] is None else x[n].detach().requires_grad_() for n in NAMES}
    before = {n: v.detach().clone() for n, v in leaves.items() if v is not None}
    tensors = [leaves[n] for n in NAMES[:-1]]
    y, last = function(*tensors, state=leaves["state"], seq_idx=seq_idx)
    present = [n for n in NAMES if leaves[n] is not None]
    g_y = x["g_y"] if dtype is None else x["g_y"].to(y.dtype)
    with _poisoned():
        found = torch.autograd.grad((y, last), [leaves[n] for n in present], (g_y, x["g_state"].to(last.dtype)))
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), leaves[name].detach().nan_to_num()), f"the scan changed its input {name}"
    return {"y": y.detach(), "last": last.detach(), **{f"d_{n}": g for n, g in zip(present, found, strict=True)}}


def relative(found, wanted, dim=None):
    """||found - wanted|| / ||wanted||, a number, or one for each index of dimension `dim`. NaN where `found` has one.

    Below 1e-30 a result counts as 0: fp32 has no room for a gradient that decayed to 1e-100.
    """
    assert found.shape == wanted.shape
    if dim is not None:
        found, wanted = (x.movedim(dim, 0).flatten(1) for x in (found, wanted))
    distance = torch.linalg.vector_norm(found.double() - wanted.double(), dim=-1 if dim == 0 else None)
    return distance / torch.linalg.vector_norm(wanted.double(), dim=-1 if dim == 0 else None).clamp(min=1e-30)


def judge(found, wanted, plain, tolerance):
    """Names of the results beyond their tolerance: `tolerance`, or twice the error of the plain fp32 loop `plain`
    (a function that returns its results), which is only asked where it matters.

    A few numbers whose sum cancels show the rounding of what was summed: in 16 bits tensors of less than 256 numbers
    may have twice the tolerance.
    """
    bad, loop = {}, None
    for name, want in wanted.items():
        limit = tolerance * (2 if tolerance > 1e-4 and want.numel() < 256 else 1)
        error = float(relative(found[name], want))
        if not error <= limit:
            if tolerance < 1e-4:
                loop = plain() if loop is None else loop
                limit = max(limit, 2 * float(relative(loop[name], want)))
            if not error <= limit:
                bad[name] = f"{error:.2e} > {limit:.2e}"
    return bad


def check(inputs, dtype, seq_idx=None, function=ours):
    """Runs the backend and the reference, and asserts that no result is beyond its tolerance. Returns both."""
    found = run(function, inputs, seq_idx)
    wanted = run(reference.scan, inputs, seq_idx, dtype=torch.float64)
    for name, value in found.items():
        same = inputs["u"].dtype if name == "y" else torch.float32 if name == "last" else inputs[name[2:]].dtype
        assert value.dtype == same, f"{name} is {value.dtype}"
    bad = judge(found, wanted, lambda: run(reference.scan, inputs, seq_idx, dtype=torch.float32), TOLERANCE[dtype])
    assert not bad, bad
    return found, wanted
