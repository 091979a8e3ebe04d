"""The scan on NVIDIA GPUs: kernels of moai's own, compiled on the user's machine at first use.

bfloat16, float16 and float32 in and out, everything computed in float32; a state to continue and its gradient, packed
documents and padding at no cost in the recurrence, the same bits every time. For the backward pass the state before
every tile of 16 steps is kept (2 bytes a step and channel for 16-bit inputs, 4 for float32, at 16 states), nothing
else. Registered as PyTorch operators, so that `torch.compile`, FSDP and CUDA graphs work. Leaves out second
derivatives and float64.

How the kernels divide the work: `moai_core/cuda/scan_forward.cu`, `scan_backward.cu`. This file chooses how many
warps share the states of a channel (from the shape and the GPU alone, so that results are reproducible), reserves
memory and launches.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.scan import cuda_conv, reference
from moai_core.scan.cuda_conv import conv, conv_step, rows
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
    _kernel("scan_forward", shape, u, A, B, GATED=int(z is not None))(
        batch * shape.segments * _blocks(channels), 32 * shape.warps, u, dt, A, B, C, D, z, dt_bias, state, seq_idx,
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
    blocks = _blocks(channels)
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
    ends, sums = _summary(shape, True, g_y, dt, A, C, z, dt_bias, seq_idx)
    _kernel("scan_backward", shape, u, A, B, GATED=int(z is not None))(
        count * blocks, 32 * shape.warps, u, dt, A, B, C, D, z, dt_bias, seq_idx, kept, g_y, g_last, ends, sums,
        d_u, d_dt, None if z is None else d_z, part_A, parts, part_D, part_bias, d_first if continues else None, length,
        channels, shape.segments, shape.span, *_strides(u, dt, z, B, C, g_y, None if z is None else d_z),
        shared=shape.shared,
    )  # fmt: skip
    _kernel("scan_reduce", shape, u, A, B, GATED=int(z is not None))(
        -(-parts[0].nbytes // 4096), 256, parts, d_B, d_C, blocks, batch, length
    )
    if count > 1:
        for part, total in ((part_A, d_A), (part_D, d_D), (part_bias, d_bias)):
            if part is not None:
                torch.sum(part, 0, out=total)
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
    beside it (`cuda_conv.conv_of_half`)."""
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
    """(ends (B, segments, I, N), sums of dt (B, segments, I)) of the segments of time, None where there is only one."""
    if shape.segments == 1:
        return None, None
    batch, length, channels = x.shape
    N = A.shape[1]
    warps = _warps(N)
    shared = shared_bytes("summary", warps, shape.tile, x.itemsize, states.itemsize, N)
    ends, sums = A.new_empty(batch, shape.segments, channels, N), A.new_empty(batch, shape.segments, channels)
    own = shape._replace(warps=warps, shared=shared)
    _kernel("scan_summary", own, x, A, states, GATED=int(z is not None), REVERSE=int(reverse))(
        batch * shape.segments * _blocks(channels), 32 * warps, x, dt, A, states, z, dt_bias, seq_idx, ends, sums,
        length, channels, shape.segments, shape.span, *_strides(x, dt, z, states), shared=shared,
    )  # fmt: skip
    return ends, sums


def _kernel(name: str, shape: Division, u: Tensor, A: Tensor, B: Tensor, **macros: int) -> cuda.Kernel:
    file = "scan_backward.cu" if name == "scan_reduce" else f"{name}.cu"
    return cuda.kernel(
        file, name, u.device, T=cuda.TYPES[u.dtype], TB=cuda.TYPES[B.dtype], N=A.shape[1], WARPS=shape.warps,
        TILE=shape.tile, SHARED=shape.shared, **macros,
    )  # fmt: skip


def _divide(direction: str, u: Tensor, A: Tensor, B: Tensor) -> Division:
    return _division(u.device.index, direction, u.itemsize, B.itemsize, *u.shape, A.shape[1])


# ---- The division of the work


class Division(NamedTuple):
    """warps that share the states of 32 channels; steps of a tile, which is also the distance of the kept states;
    tiles of a segment of time, and segments of a row; bytes of shared memory a block."""

    warps: int
    tile: int
    span: int
    segments: int
    shared: int


@lru_cache(maxsize=1024)
def _division(
    index: int, direction: str, size: int, states_size: int, batch: int, length: int, channels: int, states: int
) -> Division:
    """How much of a call a block, a warp and a thread do; from the shape and the GPU alone, so that the same call has
    the same bits. Raises LookupError where no block fits the GPU's shared memory.

    A row's 32 channels are one block's: two warps, each with half of the states, keep a GPU busy if there are 4 blocks
    a multiprocessor. Where there are fewer than 3, time is cut into segments, 8 blocks a multiprocessor, which costs a
    pass of its own (`scan_summary`).
    """
    properties = torch.cuda.get_device_properties(index)
    limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    tile = tile_of(states)
    tiles, blocks = -(-length // tile), batch * _blocks(channels)
    warps = _warps(states) if direction == "forward" else 2
    segments = 1
    if blocks < 3 * properties.multi_processor_count:
        segments = max(1, min(8 * properties.multi_processor_count // blocks, tiles // 4))
    span = -(-tiles // segments)
    shared = shared_bytes(direction, warps, tile, size, states_size, states)
    if shared > limit:
        raise LookupError(f"it needs {shared} bytes of shared memory a block, and this GPU has {limit}")
    return Division(warps, tile, span, -(-tiles // span), shared)


def _warps(states: int) -> int:
    """As few as leave a thread no more states than its registers hold."""
    return next(w for w in (2, 4, 8) if states // w <= 32)


def tile_of(states: int) -> int:
    """Steps of a tile: fewer where a tile of many states would fill the shared memory."""
    return 16 if states <= 32 else 8


def shared_bytes(direction: str, warps: int, tile: int, size: int, states_size: int, states: int) -> int:
    """sizeof(Pool) of scan_forward.cu, scan_summary.cu or scan_backward.cu, which check that it is enough."""
    wide, narrow, marks = 32 * tile * 4, 32 * tile * size, tile * 4 + 16
    one = tile * (states + 16 // states_size) * states_size  # B or C of a tile
    both = tile * (2 * states + 16 // states_size) * states_size
    if direction == "summary":
        return 2 * (3 * narrow + one + marks) + 2 * wide + states * tile * 4
    if direction == "forward":
        return 2 * (3 * narrow + both + marks) + (2 + warps) * wide + 2 * states * tile * 4
    slot = 4 * narrow + both + states * 32 * (4 if size == 4 else 2) + marks
    rates = states if states <= 32 else 1
    return 2 * slot + (3 + 3 * warps) * wide + 2 * states * tile * 4 + (2 * states + rates) * 32 * 4


def _too_large(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    try:
        for direction in ("forward", "backward"):
            _division(index, direction, dtype.itemsize, 4, 1, 1, 32, states)
    except LookupError as refusal:
        return str(refusal)
    return None


def _blocks(channels: int) -> int:
    return -(-channels // 32)


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
