"""The selective scan of Mamba-1 and the causal convolution before it, behind one signature for every backend.

Why a package: the recurrence is the one operation that no library offers for all devices with initial states, packing
and gradients, so each device gets its own file and all of them answer to `reference`, the definition. A backend is a
module with `scan`, `conv`, `step`, `conv_step` and `why_not`; `BACKENDS` lists them in the order of preference. One
named by the user is used or refused with its reason, never replaced. Leaves out Mamba-2 and Mamba-3, whose chunked
form is made of matrix products.

Letters: B batch, L tokens, I channels (expand * hidden), N states a channel, K convolution width. Everything is
channel-last.
Source: Mamba, arXiv 2312.00752, algorithm 2.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from moai_core.errors import UsageError
from moai_core.scan import cpu, cuda, mamba_ssm, reference

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "cpu": cpu, "mamba_ssm": mamba_ssm, "reference": reference}

__all__ = ["BACKENDS", "conv", "conv_step", "documents", "explain", "fallback", "pick", "scan", "step"]


def documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """The seq_idx (1, L), int32, of documents that lie one behind the other in one row.

    cu_seqlens: (documents + 1,), integers, where each begins and where the last ends, as FlashAttention has it; what
    lies behind the last, up to `length`, is padding (-1). Raises UsageError when it has no such shape.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        got = f"{tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
        raise UsageError(f"cu_seqlens must be integers of the shape (documents + 1,) (got {got})")
    at = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    number = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)
    return torch.where(at < cu_seqlens[-1], number, -1).to(torch.int32)[None]


def explain(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    op: str = "scan",
    I: int = 64,
    N: int = 16,
    K: int = 4,
    state: bool = False,
    seq_idx: bool = False,
) -> list[tuple[str, str | None]]:
    """Every backend in the order of preference with the reason why it can't do this call, or None if it can.

    op: "scan", "conv", "step" or "conv_step"; state: the call continues a given state;
    seq_idx: it has packed documents or padding.
    """
    device = torch.device(device)
    return [
        (name, backend.why_not(device, dtype, op=op, I=I, N=N, K=K, state=state, seq_idx=seq_idx))
        for name, backend in BACKENDS.items()
    ]


def fallback(
    device: torch.device | str, dtype: torch.dtype = torch.float32, *, I: int = 64, N: int = 16, K: int = 4
) -> str | None:
    """One line for a CUDA device on which moai's own kernels refuse to train on packed rows: what runs in their place,
    and why. None where they run, and for other devices.
    """
    reasons = dict(explain(device, dtype, I=I, N=N, K=K, seq_idx=True))
    refusal = reasons.get("cuda")
    if torch.device(device).type != "cuda" or refusal is None:
        return None
    taker = next(name for name, reason in reasons.items() if reason is None)
    slow = ", a loop over time, slow" if BACKENDS[taker] is reference else ""
    return f"the scan on {device} falls back to '{taker}'{slow}; the backend 'cuda' refuses: {refusal}"


@lru_cache(maxsize=256)
def pick(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
    op: str = "scan",
    I: int = 64,
    N: int = 16,
    K: int = 4,
    state: bool = False,
    seq_idx: bool = False,
) -> ModuleType:
    """The backend for such a call: the first of `BACKENDS` that doesn't refuse it, or the one named.

    Raises UsageError when the name is unknown or the backend named refuses the call; the message gives its reason.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"unknown scan backend '{backend}'", hint=f"choose one of: auto, {', '.join(BACKENDS)}")
    reasons = explain(device, dtype, op=op, I=I, N=N, K=K, state=state, seq_idx=seq_idx)
    for name, reason in reasons:
        if reason is None and backend in ("auto", name):
            return BACKENDS[name]
        if backend == name:
            raise UsageError(f"scan backend '{name}' can't be used here: {reason}", hint="auto lets moai choose")
    refusals = "; ".join(f"{name}: {reason}" for name, reason in reasons)
    raise UsageError(f"no scan backend works on {device} with {dtype} ({refusals})")


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The selective scan over a whole chunk of tokens, differentiable in every tensor through both results.

        dt = softplus(dt + dt_bias);  h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) * silu(z_t)

    u, dt, z: (B, L, I); B, C: (B, L, N); A: (I, N), negative, fp32; D, dt_bias: (I,), fp32.
    state: (B, I, N), fp32, the result of the call that came before, or None for zeros; it isn't modified.
    seq_idx: (B, L), int32, the number of each token's document, non-decreasing in a row. The state begins anew where
    it grows inside the call, never at the first token. A number below 0 is padding: the state passes it unchanged and
    y is 0 there.

    Returns (y, state): y (B, L, I) in u's dtype, state (B, I, N) in fp32. Raises UsageError when the backend named
    can't do it.
    """
    chosen = pick(
        u.device,
        u.dtype,
        backend=backend,
        op="scan",
        I=u.shape[-1],
        N=A.shape[1],
        state=state is not None,
        seq_idx=seq_idx is not None,
    )
    return chosen.scan(u, dt, A, B, C, D, z, dt_bias, state=state, seq_idx=seq_idx)


def conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, then SiLU, differentiable in every tensor through both results.

    u: (B, L, I); weight: (I, 1, K), as `nn.Conv1d` keeps it; bias: (I,) or None.
    state: (B, I, K-1), the last K-1 real inputs before this call, oldest first, or None for zeros; it isn't modified.
    seq_idx: as in `scan`; no tap reaches into an earlier document, and padding (y is 0 there) may stand only at the
    end of a row.

    Returns (y, state): y (B, L, I) and state (B, I, K-1), both in u's dtype. Raises UsageError when the backend named
    can't do it.
    """
    chosen = pick(
        u.device,
        u.dtype,
        backend=backend,
        op="conv",
        I=u.shape[-1],
        K=weight.shape[-1],
        state=state is not None,
        seq_idx=seq_idx is not None,
    )
    return chosen.conv(u, weight, bias, state=state, seq_idx=seq_idx)


def step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`scan` for one token a row: u, dt, z (B, I); B, C (B, N); state (B, I, N). Returns (y (B, I), the new state)."""
    chosen = pick(u.device, u.dtype, backend=backend, op="step", I=u.shape[-1], N=A.shape[1], state=True)
    return chosen.step(u, dt, A, B, C, D, z, dt_bias, state)


def conv_step(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`conv` for one token a row: u (B, I); state (B, I, K-1). Returns (y (B, I), the new state)."""
    chosen = pick(u.device, u.dtype, backend=backend, op="conv_step", I=u.shape[-1], K=weight.shape[-1], state=True)
    return chosen.conv_step(u, weight, bias, state)
