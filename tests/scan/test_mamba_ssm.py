"""The adapter to mamba_ssm: its refusals, its layout (with stand-ins), and on a GPU the real kernels."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from moai_core.errors import UsageError
from moai_core.scan import mamba_ssm, pick, reference

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    def clear():
        mamba_ssm._missing.cache_clear()
        mamba_ssm._function.cache_clear()
        pick.cache_clear()

    clear()
    yield
    clear()


def install(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (dict(device=torch.device("cpu")), "it runs on CUDA only, not on cpu"),
        (dict(dtype=torch.float64), "it computes float32, bfloat16 and float16, not torch.float64"),
        (dict(N=257), "its kernel holds at most 256 states a channel (this model has 257)"),
        (dict(op="conv", K=5), "its convolution is 2 to 4 wide (this model's is 5)"),
        (dict(state=True), "it starts every chunk from a zero state, and this call continues one"),
        (dict(op="conv", state=True), "it starts every chunk from a zero state, and this call continues one"),
        (dict(seq_idx=True), "it can't begin anew inside a row, which packed documents and padding need"),
    ],
)
def test_what_it_cannot_do_is_said_before_what_is_missing(call, reason):
    assert mamba_ssm.why_not(**{"device": CUDA, "dtype": torch.float32, **call}) == reason


def test_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mamba_ssm.why_not(CUDA, torch.float32) == "mamba_ssm isn't installed (pip install 'moai[cuda]')"
    assert "causal_conv1d isn't installed" in mamba_ssm.why_not(CUDA, torch.float32, op="conv")
    with pytest.raises(UsageError, match="scan backend 'mamba_ssm' can't be used here: mamba_ssm isn't installed"):
        pick(CUDA, backend="mamba_ssm")


def test_installed_without_the_kernel_of_mamba_1(monkeypatch):
    install(monkeypatch, "mamba_ssm")
    reason = mamba_ssm.why_not(CUDA, torch.float32)
    assert "without its CUDA kernel (selective_scan_cuda)" in reason and "MAMBA_KEEP_CUDA_BUILD=TRUE" in reason


def test_installed_but_broken(monkeypatch):
    install(monkeypatch, "mamba_ssm")
    install(monkeypatch, "selective_scan_cuda")
    assert mamba_ssm.why_not(CUDA, torch.float32).startswith(
        "mamba_ssm can't be imported (No module named 'mamba_ssm.ops"
    )


def test_layout_against_stand_ins(monkeypatch, oracle):
    """Functions with mamba_ssm's documented signatures and layouts, written with torch, get what they expect."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        delta = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
        h, ys = torch.zeros(u.shape[0], *A.shape), []
        for t in range(u.shape[2]):
            h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
            ys.append((h * C[:, None, :, t]).sum(-1))
        y = (torch.stack(ys, 2) + D[:, None] * u) * F.silu(z)
        return (y, h) if return_last_state else y

    def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        dt = F.softplus(dt + dt_bias)
        state.copy_(torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None])
        return ((state * C[:, None]).sum(-1) + D * x) * F.silu(z)

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert activation == "silu" and weight.ndim == 2
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1]))[
            ..., : x.shape[2]
        ]

    def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
        window = torch.cat([conv_state, x[:, :, None]], 2)
        conv_state.copy_(window[:, :, 1:])
        return F.silu((window * weight).sum(-1) + bias)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "selective_scan_cuda", "causal_conv1d_cuda"):
        install(monkeypatch, name)
    install(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    install(monkeypatch, "mamba_ssm.ops.triton.selective_state_update", selective_state_update=selective_state_update)
    install(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update)
    for op in ("scan", "conv", "step", "conv_step"):
        assert mamba_ssm.why_not(CUDA, torch.bfloat16, op=op) is None
        assert pick(CUDA, torch.bfloat16, op=op) is mamba_ssm
    assert pick(CUDA, torch.bfloat16, state=True) is reference

    inputs, _ = oracle.problem(2, 11, 6, 4)
    given = oracle.tensors(inputs)
    first = given.pop("state")
    check(mamba_ssm, given, first, oracle)


def check(module, given, first, oracle, tolerance=1e-5):
    for found, wanted in zip(module.scan(**given), reference.scan(**given), strict=True):
        assert oracle.relative(found.cpu(), wanted.cpu()) < tolerance
    token = {n: x[:, 0] if n in ("u", "dt", "B", "C", "z") else x for n, x in given.items()}
    kept = first.clone()
    for found, wanted in zip(module.step(**token, state=first), reference.step(**token, state=first), strict=True):
        assert oracle.relative(found.cpu(), wanted.cpu()) < tolerance
    assert torch.equal(first, kept)
    weight = torch.randn(given["u"].shape[-1], 1, 4, device=first.device)
    bias = torch.randn(given["u"].shape[-1], device=first.device)
    for length in (11, 2):
        u = given["u"][:, :length]
        for found, wanted in zip(module.conv(u, weight, bias), reference.conv(u, weight, bias), strict=True):
            assert oracle.relative(found.cpu(), wanted.cpu()) < tolerance
    state = torch.randn(given["u"].shape[0], given["u"].shape[-1], 3, device=first.device)
    kept = state.clone()
    pair = zip(
        module.conv_step(u[:, 0], weight, bias, state), reference.conv_step(u[:, 0], weight, bias, state), strict=True
    )
    for found, wanted in pair:
        assert oracle.relative(found.cpu(), wanted.cpu()) < tolerance
    assert torch.equal(state, kept)


@pytest.mark.gpu
def test_real_kernels(oracle):
    for op in ("scan", "step", "conv", "conv_step"):
        if (reason := mamba_ssm.why_not(CUDA, torch.float32, op=op)) is not None:
            pytest.skip(reason)
    inputs, _ = oracle.problem(2, 11, 64, 16)
    given = {n: x.cuda() for n, x in oracle.tensors(inputs).items()}
    first = given.pop("state")
    check(mamba_ssm, given, first, oracle)
