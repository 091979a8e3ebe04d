"""The scan on NVIDIA GPUs: kernels of moai's own, compiled on the user's machine at first use.

bfloat16, float16 and float32 in and out, everything computed in float32; a state to continue and its gradient, packed
documents and padding at no cost in the recurrence, the same bits every time. For the backward pass the state before
every tile of 16 steps is kept (2 bytes a step and channel for 16-bit inputs, 4 for float32, at 16 states), nothing
else. Registered as PyTorch operators, so that `torch.compile`, FSDP and CUDA graphs work. Leaves out second
derivatives and float64.

How the kernels divide the work: `moai_core/cuda/scan_forward.cu`, `scan_backward.cu`. `cuda_division` chooses how much
of it each block and warp does; this file reserves memory and launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.scan import cuda_conv, reference
from moai_core.scan.cuda_conv import conv, conv_step, rows
from moai_core.scan.cuda_division import Division, blocks_of, divide, shared_bytes, tile_of, too_large
from moai_core.scan.cuda_step import step

__all__ = ["conv", "conv_step", "scan", "step", "why_not"]

STATES = (8, 16, 32, 64, 128)


def why_not(
    device: torch.device,
    dtype: torch.dtype,
    *,
    op: str = "scan",
    I: int = 64,
    N: int = 16,
    K: int = 4,
    state: bool = False,
    seq_idx: bool = False,
) -> str | None:
    """Why these kernels can't do such a call, or None."""
    if (reason := cuda.why_not(device)) is not None:
        return reason
    if dtype not in cuda.TYPES:
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    if op in ("conv", "conv_step"):
        return cuda_conv.why_not(I, K)
    if I % 8:
        return f"it needs a multiple of 8 channels (this model has {I})"
    if N not in STATES:
        return f"it needs {', '.join(map(str, STATES[:-1]))} or {STATES[-1]} states a channel (this model has {N})"
    return _too_large(device, dtype, N) if op == "scan" else None


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
    """See `moai_core.scan.scan`."""
    if u.numel() == 0:
        return reference.scan(u, dt, A, B, C, D, z, dt_bias, state=state, seq_idx=seq_idx)
    dt = dt.to(u.dtype)
    z = None if z is None else z.to(u.dtype)
    if B.dtype != C.dtype or B.dtype not in (u.dtype, torch.float32):
        B, C = B.float(), C.float()
    D, dt_bias, state = (None if x is None else x.float() for x in (D, dt_bias, state))
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32)
    inputs = (u, dt, A.float(), B, C, D, z, dt_bias, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = scan_forward(*inputs, seq_idx, keep)
    return y, last


class _Scan(Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        seq_idx: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with ops.below():
            y, last, kept = scan_forward(u, dt, A, B, C, D, z, dt_bias, state, seq_idx, keep)
        ctx.set_materialize_grads(False)
        ctx.continues = state is not None
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, seq_idx, kept)
        return y, last, kept

    @staticmethod
    def backward(ctx: Any, g_y: Tensor | None, g_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, seq_idx, kept = ctx.saved_tensors
        if g_y is None:
            g_y = torch.zeros_like(u)
        d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_bias, d_first = scan_backward(
            u, dt, A, B, C, D, z, dt_bias, seq_idx, kept, g_y, g_last, ctx.continues
        )
        return (
            d_u, d_dt, d_A, d_B, d_C, None if D is None else d_D, None if z is None else d_z,
            None if dt_bias is None else d_bias, d_first if ctx.continues else None, None, None,
        )  # fmt: skip


def _scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (B, L, I), final state (B, I, N) fp32, kept states (B, tiles, N, I), empty unless `keep`)."""
    batch, length, channels = u.shape
    y, last, kept = _outputs(u, A, keep)
    u, dt, B, C, z = (_rows(x) for x in (u, dt, B, C, z))
    A, D, dt_bias, state, seq_idx = (_solid(x) for x in (A, D, dt_bias, state, seq_idx))
    shape = _divide("forward", u, A, B)
    ends, sums = _summary(shape, False, u, dt, A, B, None, dt_bias, seq_idx)
    _kernel("scan_forward", shape, u, A, B, GATED=int(z is not None), KEEPS=int(keep))(
        batch * shape.segments * blocks_of(channels), shape.threads, u, dt, A, B, C, D, z, dt_bias, state, seq_idx,
        ends, sums, y, last, kept if keep else None, length, channels, shape.segments, shape.span,
        *_strides(u, dt, z, B, C), shared=shape.shared,
    )  # fmt: skip
    return y, last, kept


def _scan_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    kept: Tensor,
    g_y: Tensor,
    g_last: Tensor | None,
    continues: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the first state; empty where the input was None (the first state:
    unless `continues`)."""
    batch, length, channels = u.shape
    blocks = blocks_of(channels)
    d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_bias, d_first = _gradients(u, A, B, D, z, dt_bias, continues)
    u, dt, B, C, z, g_y = (_rows(x) for x in (u, dt, B, C, z, g_y))
    A, D, dt_bias, seq_idx, g_last = (_solid(x) for x in (A, D, dt_bias, seq_idx, g_last))
    shape = _divide("backward", u, A, B)
    count = batch * shape.segments
    # What each segment of each row adds to the gradients of the parameters.
    part_A, part_D, part_bias = (
        None if x is None else d if count == 1 else d.new_empty(count, *d.shape)
        for x, d in ((A, d_A), (D, d_D), (dt_bias, d_bias))
    )
    parts = A.new_empty(blocks, batch, -(-length // shape.tile), 2 * A.shape[1], shape.tile, dtype=kept.dtype)
    ends, sums, chain = None, None, None
    if shape.chained:
        ends, chain = A.new_empty(count, A.shape[1], channels), A.new_zeros(1 + count * blocks, dtype=torch.int32)
    else:
        ends, sums = _summary(shape, True, g_y, dt, A, C, z, dt_bias, seq_idx)
    _kernel("scan_backward", shape, u, A, B, GATED=int(z is not None))(
        count * blocks, shape.threads, u, dt, A, B, C, D, z, dt_bias, seq_idx, kept, g_y, g_last, ends, sums, chain,
        d_u, d_dt, None if z is None else d_z, part_A, parts, part_D, part_bias, d_first if continues else None, length,
        channels, shape.segments, shape.span, *_strides(u, dt, z, B, C, g_y, None if z is None else d_z),
        shared=shape.shared,
    )  # fmt: skip
    # Of scan_reduce: 64 times 16 bytes of the sums are a block's, or 256 numbers of the parameters' gradients.
    reducing = -(-parts[0].nbytes // 1024) + (-(-A.numel() // 256) if count > 1 else 0)
    if count == 1:
        part_A = part_D = part_bias = None  # they are the gradients already
    _kernel("scan_reduce", shape, u, A, B, GATED=int(z is not None))(
        reducing, 256, parts, d_B, d_C, part_A, part_D, part_bias, d_A, d_D, d_bias, blocks, batch, length,
        channels, count,
    )  # fmt: skip
    return d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_bias, d_first


def _outputs(u: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    kept = (batch, -(-length // tile_of(states)), states, channels) if keep else (0,)
    return (
        ops.dense(u),
        u.new_empty(batch, channels, states, dtype=torch.float32),
        u.new_empty(*kept, dtype=torch.float32 if u.dtype == torch.float32 else torch.bfloat16),
    )


def _gradients(
    u: Tensor, A: Tensor, B: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, continues: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Results may not share memory: two absent ones are two tensors.
    return (
        ops.dense(u), ops.dense(u), ops.dense(A), ops.dense(B), ops.dense(B),
        A.new_empty(0) if D is None else ops.dense(D),
        u.new_empty(0) if z is None else _as_half(z),
        A.new_empty(0) if dt_bias is None else ops.dense(dt_bias),
        A.new_empty(u.shape[0], *A.shape) if continues else A.new_empty(0),
    )  # fmt: skip


def _as_half(z: Tensor) -> Tensor:
    """Memory for z's gradient. Where z is half of a wider tensor, so is this, for the other half's gradient to be put
    beside it (`moai_core.model.recompute.split_halves`)."""
    batch, length, channels = z.shape
    if z.stride() == (2 * length * channels, 2 * channels, 1) and z.storage_offset() == channels:
        return z.new_empty(batch, length, 2 * channels)[..., channels:]
    return ops.dense(z)


def _summary(
    shape: Division,
    reverse: bool,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    states: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(ends (B, segments, N, I), sums of dt (B, segments, groups of states, I)) of the segments of time, None where
    there is only one."""
    if shape.segments == 1:
        return None, None
    batch, length, channels = x.shape
    N, tile = A.shape[1], 2 * shape.tile
    groups = -(-N // 8)
    shared = shared_bytes("summary", 1, tile, x.itemsize, states.itemsize, N)
    ends = A.new_empty(batch, shape.segments, N, channels)
    sums = A.new_empty(batch, shape.segments, groups, channels)
    own = shape._replace(warps=1, teams=1, tile=tile, shared=shared)
    _kernel("scan_summary", own, x, A, states, GATED=int(z is not None), REVERSE=int(reverse))(
        batch * shape.segments * blocks_of(channels) * groups, 32, x, dt, A, states, z, dt_bias, seq_idx, ends, sums,
        length, channels, shape.segments, shape.span // 2, *_strides(x, dt, z, states), shared=shared,
    )  # fmt: skip
    return ends, sums


def _kernel(name: str, shape: Division, u: Tensor, A: Tensor, B: Tensor, **macros: int) -> cuda.Kernel:
    file = "scan_backward.cu" if name == "scan_reduce" else f"{name}.cu"
    return cuda.kernel(
        file, name, u.device, T=cuda.TYPES[u.dtype], TB=cuda.TYPES[B.dtype], N=A.shape[1], WARPS=shape.warps,
        TEAMS=shape.teams, TILE=shape.tile, SHARED=shape.shared, **macros,
    )  # fmt: skip


def _divide(direction: str, u: Tensor, A: Tensor, B: Tensor) -> Division:
    return divide(u.device.index, direction, u.itemsize, B.itemsize, *u.shape, A.shape[1])


def _too_large(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    for direction in ("forward", "backward"):
        if (reason := too_large(index, direction, dtype.itemsize, 4, states)) is not None:
            return reason
    return None


def _rows(x: Any) -> Any:
    """(B, L, width) whose rows are dense and begin at multiples of 16 bytes: as it is, or a copy."""
    return None if x is None else rows(x)


def _solid(x: Any) -> Any:
    return None if x is None else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    strides: list[int] = []
    for x in tensors:
        strides += (0, 0) if x is None else x.stride()[:2]
    return strides


_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
scan_forward = ops.define(
    f"scan_forward({_INPUTS}, Tensor? state, Tensor? seq_idx, bool keep) -> (Tensor, Tensor, Tensor)",
    _scan_forward,
    lambda u, dt, A, B, C, D, z, dt_bias, state, seq_idx, keep: _outputs(u, A, keep),
    _Scan,
)
scan_backward = ops.define(
    f"scan_backward({_INPUTS}, Tensor? seq_idx, Tensor kept, Tensor g_y, Tensor? g_last, bool continues)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward,
    lambda u, dt, A, B, C, D, z, dt_bias, seq_idx, kept, g_y, g_last, continues: _gradients(
        u, A, B, D, z, dt_bias, continues
    ),
)
