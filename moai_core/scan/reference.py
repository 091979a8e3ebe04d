"""The selective scan and the causal convolution of Mamba-1, as their definition reads: a loop over time in plain torch.

Every other backend is tested against this one. It runs on every device, autograd differentiates it, and it computes
in float32, or in float64 when `u` is float64. It leaves out speed: each time step is a handful of small torch
operations.

Source: Mamba, arXiv 2312.00752, algorithm 2 (S6) and section 3.4 (the convolution and the SiLU in front of it).

Letters: B batch, L tokens, I channels (the paper's D, expand * hidden), N states a channel, K convolution width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(device: torch.device, dtype: torch.dtype, **needs: object) -> str | None:
    """The reference refuses nothing but integers."""
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


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
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) silu(z_t)`; see `moai_core.scan.scan`."""
    work = _work_dtype(u)
    real, fresh = _marks(u, seq_idx)
    u_, dt_, B_, C_ = (_hide(x.to(work), real) for x in (u, dt, B, C))
    A_ = A.to(work)
    dt_ = F.softplus(dt_ if dt_bias is None else dt_ + dt_bias.to(work))
    h = u_.new_zeros(u.shape[0], *A.shape) if state is None else state.to(work)

    ys = []
    for t in range(u.shape[1]):
        before = h if fresh is None else torch.where(fresh[:, t, None, None], 0, h)
        decay = torch.exp(dt_[:, t, :, None] * A_)  # (B, I, N)
        after = decay * before + (dt_[:, t] * u_[:, t])[:, :, None] * B_[:, t, None, :]
        h = after if real is None else torch.where(real[:, t, None, None], after, h)
        ys.append((h * C_[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(u_)

    if D is not None:
        y = y + D.to(work) * u_
    if z is not None:
        y = y * F.silu(_hide(z.to(work), real))
    return _hide(y, real).to(u.dtype), h


def conv(
    u: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`y_t = silu(bias + sum_k weight_k u_(t-K+1+k))`, channel by channel; see `moai_core.scan.conv`."""
    work = _work_dtype(u)
    batch, length, channels = u.shape
    past = weight.shape[-1] - 1
    real, fresh = _marks(u, seq_idx)
    u_ = _hide(u.to(work), real)
    before = u_.new_zeros(batch, past, channels) if state is None else state.to(work).transpose(1, 2)
    x = torch.cat([before, u_], 1)  # (B, K-1+L, I): what came before stands in front, oldest first

    # Documents of this call, numbered from 0, per position of x; what lies before the call belongs to document 0.
    document = None if fresh is None else F.pad(fresh.cumsum(1), (past, 0))

    y = torch.zeros_like(u_) if bias is None else bias.to(work).expand_as(u_)
    for k in range(past + 1):
        tap = x[:, k : k + length]
        if document is not None:  # a tap must not reach into an earlier document
            tap = torch.where((document[:, k : k + length] == document[:, past:])[:, :, None], tap, 0)
        y = y + tap * weight[:, 0, k].to(work)
    y = _hide(F.silu(y), real)

    if document is None or real is None:
        last = x[:, length:]
    else:
        count = real.sum(1, keepdim=True)  # the window that ends at the last real token: (B, K-1) positions in x
        where = count + torch.arange(past, device=u.device)
        same = document.gather(1, where) == document.gather(1, (count + past - 1).clamp_min(0))
        last = torch.where(same[:, :, None], x.gather(1, where[:, :, None].expand(-1, -1, channels)), 0)
    return y.to(u.dtype), last.transpose(1, 2).to(u.dtype)


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
) -> tuple[Tensor, Tensor]:
    """`scan` for one token: u, dt, z (B, I); B, C (B, N)."""
    gate = None if z is None else z[:, None]
    y, state = scan(u[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, state=state)
    return y[:, 0], state


def conv_step(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """`conv` for one token: u (B, I)."""
    y, state = conv(u[:, None], weight, bias, state=state)
    return y[:, 0], state


def _work_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _hide(x: Tensor, real: Tensor | None) -> Tensor:
    """Zero at padding, by selection: a NaN that stands there spreads neither forward nor backward."""
    return x if real is None else torch.where(real[:, :, None], x, 0)


def _marks(u: Tensor, seq_idx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(real, fresh), both (B, L): real is false at padding, fresh is true where a new document begins inside this call.

    The first real token of a call is never fresh: it continues the state whatever its number.
    """
    if seq_idx is None:
        return None, None
    real = seq_idx >= 0
    highest = F.pad(seq_idx.cummax(1).values[:, :-1], (1, 0), value=-1)
    return real, real & (highest >= 0) & (seq_idx > highest)
