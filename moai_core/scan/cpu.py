"""The scan on processors: `cpu_kernels` and `cpu_conv_kernels` behind torch's tensors, autograd and threads.

float32 and, converted at the door, bfloat16 and float16; everything is computed in float32. Results are the same bits
for any number of threads. Leaves out float64 (the reference does it) and second derivatives.
Threads and compilation: moai_core/cpu.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moai_core import cpu
from moai_core.tracing import untraced

_SCAN, _CONV = "moai_core.scan.cpu_kernels", "moai_core.scan.cpu_conv_kernels"


def why_not(device: torch.device, dtype: torch.dtype, **needs: object) -> str | None:
    """Why this backend can't run on `device` in `dtype`, or None if it can; shapes and gradients don't matter to it."""
    if device.type != "cpu":
        return f"it runs on the CPU only, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, and {dtype} would lose precision" if dtype == torch.float64 else f"not {dtype}"
    return cpu.problem()


@untraced("its kernels are called by address")
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
    inputs = (u, dt, A, B, C, D, z, dt_bias, state, None if seq_idx is None else _marks(seq_idx))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        y, last = _Scan.apply(*inputs)
    else:
        y, last, _ = _scan_forward(*inputs, keep=False)
    return y.to(u.dtype), last


@untraced("its kernels are called by address")
def conv(
    u: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.conv`."""
    inputs = (u, weight, bias, state, None if seq_idx is None else _marks(seq_idx))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        y, last = _Conv.apply(*inputs)
    else:
        y, last = _conv_forward(*inputs)
    return y.to(u.dtype), last.to(u.dtype)


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
    """See `moai_core.scan.step`."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        gate = None if z is None else z[:, None]
        y, last = scan(u[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, state=state)
        return y[:, 0], last
    u_, dt_, B_, C_, z_ = (_rows(x) for x in (u, dt, B, C, z))
    A_, D_, bias_, first = (_solid(x) for x in (A, D, dt_bias, state))
    batch, channels = u.shape
    states = A.shape[1]
    y, last = torch.empty_like(u_, memory_format=torch.contiguous_format), torch.empty_like(first)
    cpu.run(
        _SCAN, "scan_step", batch * _tiles(channels), batch * channels * states, channels, states,
        *_at(u_, 1), *_at(dt_, 1), *_at(z_, 1), *_at(B_, 1), *_at(C_, 1),
        *map(_address, (A_, D_, bias_, first, last, y)),
    )  # fmt: skip
    return y.to(u.dtype), last


def conv_step(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.conv_step`."""
    y, last = conv(u[:, None], weight, bias, state=state)
    return y[:, 0], last


# What is saved is what was given: 16-bit inputs stay 16 bits wide until the backward pass.


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u, dt, A, B, C, D, z, dt_bias, state, marks):  # type: ignore[no-untyped-def]
        y, last, kept = _scan_forward(u, dt, A, B, C, D, z, dt_bias, state, marks, keep=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, marks, kept)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_last: Tensor | None):  # type: ignore[no-untyped-def]
        u, dt, A, B, C, D, z, dt_bias, marks, kept = ctx.saved_tensors
        u, dt, B, C, z = (_rows(x) for x in (u, dt, B, C, z))
        A, D, dt_bias = (_solid(x) for x in (A, D, dt_bias))
        batch, length, channels = u.shape
        states, tiles = A.shape[1], _tiles(channels)
        g_y = u.new_zeros(1, 1, channels).expand_as(u) if g_y is None else _rows(g_y)
        g_last = _solid(g_last)
        to_u, to_dt = u.new_empty(u.shape), u.new_empty(u.shape)
        to_z = None if z is None else u.new_empty(u.shape)
        to_A, to_first = u.new_empty(batch, channels, states), u.new_empty(batch, channels, states)
        to_B, to_C = u.new_empty(batch, tiles, length, states), u.new_empty(batch, tiles, length, states)
        to_D, to_bias = u.new_empty(batch, channels), u.new_empty(batch, channels)
        cpu.run(
            _SCAN, "scan_backward", batch * tiles, u.numel() * states, length, channels, states, _address(marks),
            *_at(u), *_at(dt), *_at(z), *_at(B), *_at(C), *map(_address, (A, D, dt_bias, kept)), *_at(g_y),
            *map(_address, (g_last, to_u, to_dt, to_z, to_A, to_B, to_C, to_D, to_bias, to_first)),
        )  # fmt: skip
        grads = (to_u, to_dt, to_A.sum(0), to_B.sum(1), to_C.sum(1), to_D.sum(0), to_z, to_bias.sum(0), to_first, None)
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u, weight, bias, state, marks):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, weight, bias, state, marks)
        return _conv_forward(u, weight, bias, state, marks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_last: Tensor | None):  # type: ignore[no-untyped-def]
        u, weight, bias, state, marks = ctx.saved_tensors
        u, weight, bias, state = _rows(u), _solid(weight), _solid(bias), _solid(state)
        batch, length, channels = u.shape
        width = weight.shape[-1]
        g_y = u.new_zeros(1, 1, channels).expand_as(u) if g_y is None else _rows(g_y)
        g_last = _solid(g_last)
        to_u, to_first = u.new_empty(u.shape), u.new_empty(batch, channels, width - 1)
        to_weight, to_bias = u.new_empty(batch, channels, width), u.new_empty(batch, channels)
        cpu.run(
            _CONV, "conv_backward", batch * _tiles(channels), u.numel() * width, length, channels, width,
            _address(marks),
            *_at(u), *map(_address, (weight, bias, state)), *_at(g_y),
            *map(_address, (g_last, to_u, to_weight, to_bias, to_first)),
        )  # fmt: skip
        grads = (to_u, to_weight.sum(0)[:, None], to_bias.sum(0), to_first, None)
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


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
    marks: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, last state, the states at the start of each chunk if they are to be kept for the backward pass)."""
    u, dt, B, C, z = (_rows(x) for x in (u, dt, B, C, z))
    A, D, dt_bias, state = (_solid(x) for x in (A, D, dt_bias, state))
    batch, length, channels = u.shape
    states, tiles, kernels = A.shape[1], _tiles(channels), _kernels()
    y, last = u.new_empty(u.shape), u.new_empty(batch, channels, states)
    kept = u.new_empty(batch * tiles, -(-length // kernels.T), states, kernels.W) if keep else None
    cpu.run(
        _SCAN, "scan_forward", batch * tiles, u.numel() * states, length, channels, states, _address(marks),
        *_at(u), *_at(dt), *_at(z), *_at(B), *_at(C), *map(_address, (A, D, dt_bias, state, last, y, kept)),
    )  # fmt: skip
    return y, last, kept


def _conv_forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None
) -> tuple[Tensor, Tensor]:
    u, weight, bias, state = _rows(u), _solid(weight), _solid(bias), _solid(state)
    batch, length, channels = u.shape
    width = weight.shape[-1]
    y, last = u.new_empty(u.shape), u.new_empty(batch, channels, width - 1)
    cpu.run(
        _CONV, "conv_forward", batch * _tiles(channels), u.numel() * width, length, channels, width,
        _address(marks),
        *_at(u), *map(_address, (weight, bias, state, last, y)),
    )  # fmt: skip
    return y, last


def _marks(seq_idx: Tensor) -> Tensor:
    """int8 (B, L): PADDING, FRESH where a document begins inside the call, else 0; kept for the next layer's call."""
    global _last_marks
    version = -1 if seq_idx.is_inference() else seq_idx._version  # inference tensors count no changes
    known, seen, marks = _last_marks
    if known() is seq_idx and seen == version >= 0:
        return marks
    kernels = _kernels()
    padding = seq_idx < 0
    highest = F.pad(seq_idx.cummax(1).values[:, :-1], (1, 0), value=-1)
    fresh = (highest >= 0) & (seq_idx > highest)
    marks = torch.where(padding, kernels.PADDING, torch.where(fresh, kernels.FRESH, 0)).to(torch.int8).contiguous()
    _last_marks = weakref.ref(seq_idx), version, marks
    return marks


_last_marks: tuple[Callable[[], Tensor | None], int, Any] = (lambda: None, 0, None)


def _rows(x: Tensor | None) -> Any:
    """float32 with adjacent channels; batch and time may have any stride."""
    if x is None:
        return None
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def _solid(x: Tensor | None) -> Any:
    return None if x is None else x.to(torch.float32).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _at(x: Tensor | None, axes: int = 2) -> tuple[int, ...]:
    """Address and the byte strides of batch and, with two axes, time."""
    return (0,) * (1 + axes) if x is None else (x.data_ptr(), *(4 * stride for stride in x.stride()[:axes]))


def _tiles(channels: int) -> int:
    return -(-channels // _kernels().W)


def _kernels() -> ModuleType:
    return cpu.load(_SCAN)
