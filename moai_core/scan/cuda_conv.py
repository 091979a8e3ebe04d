"""The causal convolution of Mamba-1 on NVIDIA GPUs: `cuda/conv.cu` as PyTorch operators.

bfloat16, float16 and float32 in and out, everything computed in float32; a state to continue and its gradient, packed
documents and padding, the same bits every time. The backward pass keeps nothing but the inputs. Registered as
operators, so that `torch.compile`, FSDP and CUDA graphs work; nothing waits for the GPU. Leaves out second derivatives
and float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.scan import reference

WIDTHS = range(2, 9)

# As in conv.cu.
_THREADS = 128
_RUNS_OF_A_BLOCK = 4

# A run is as long as possible, for each one reads a few steps of its neighbours, but there are enough to fill a GPU. It
# depends on the shape alone, so that sums over time have the same order on every GPU.
_RUNS = (128, 64, 32, 16)
_ENOUGH_THREADS = 32768


def why_not(channels: int, width: int) -> str | None:
    """What these kernels refuse beyond the device and the dtype: (I, K) of a convolution."""
    if channels % 8:
        return f"it needs a multiple of 8 channels (this model has {channels})"
    if width not in WIDTHS:
        return f"its convolution is {WIDTHS[0]} to {WIDTHS[-1]} wide (this model's is {width})"
    return None


def conv(
    u: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.conv`. A state in another dtype than u's is rounded to it, as the result's is."""
    if u.numel() == 0:
        return reference.conv(u, weight, bias, state=state, seq_idx=seq_idx)
    weight, bias = _filter(u, weight, bias)
    state = None if state is None else state.to(u.dtype)
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32)
    return conv_forward(u, weight, bias, state, seq_idx)


def conv_of_half(
    xz: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`conv` of the first half of xz's last axis, and the second half as it is: (u, its state, z), of xz (B, L, 2I).

    The gradients of the two halves need no putting together where that of z lies in memory for both, as the scan's
    backward pass returns it: the convolution's writes the first half there.
    """
    if xz.numel() == 0:
        half, z = xz.chunk(2, dim=-1)
        return *reference.conv(half, weight, bias, state=state, seq_idx=seq_idx), z
    weight, bias = _filter(xz, weight, bias)
    state = None if state is None else state.to(xz.dtype)
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32)
    return _ConvOfHalf.apply(xz, weight, bias, state, seq_idx)  # type: ignore[no-any-return]


def conv_step(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.conv_step`."""
    if u.numel() == 0 or _differentiable(u, weight, bias, state):
        y, last = conv(u[:, None], weight, bias, state=state)
        return y[:, 0], last
    weight, bias = _filter(u, weight, bias)
    return conv_step_forward(u, weight, bias, state.to(u.dtype))


class _Conv(Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with ops.below():
            y, last = conv_forward(u, weight, bias, state, seq_idx)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, weight, bias, state, seq_idx)
        return y, last

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        u, weight, bias, state, seq_idx = ctx.saved_tensors
        if d_y is None:
            d_y = torch.zeros_like(u)
        d_u, d_weight, d_bias, d_state = conv_backward(u, weight, bias, state, seq_idx, d_y, d_last)
        return d_u, d_weight, None if bias is None else d_bias, None if state is None else d_state, None


class _ConvOfHalf(Function):
    @staticmethod
    def forward(
        ctx: Any, xz: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        half, z = xz.chunk(2, dim=-1)
        y, last = conv_forward(half, weight, bias, state, seq_idx)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(xz, weight, bias, state, seq_idx)
        return y, last, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_last: Tensor | None, d_z: Tensor | None) -> tuple[Tensor | None, ...]:
        xz, weight, bias, state, seq_idx = ctx.saved_tensors
        half, _ = xz.chunk(2, dim=-1)
        d_y = torch.zeros_like(half) if d_y is None else d_y
        whole = None if d_z is None else _whole(d_z)
        if whole is None:
            whole = ops.dense(xz)
            whole[..., half.shape[-1] :] = 0 if d_z is None else d_z
        place = whole[..., : half.shape[-1]]
        d_weight, d_bias, d_state = conv_backward_into(half, weight, bias, state, seq_idx, d_y, d_last, place)
        return whole, d_weight, None if bias is None else d_bias, None if state is None else d_state, None


def _whole(half: Tensor) -> Tensor | None:
    """The tensor of which `half` is the second half of the last axis, if its storage holds that tensor and no more."""
    width = half.shape[-1]
    if half.storage_offset() != width or half.untyped_storage().nbytes() != 2 * half.nbytes:
        return None
    whole = half.as_strided((*half.shape[:-1], 2 * width), half.stride(), 0)
    return whole if whole.is_contiguous() else None


def _conv_forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y (B, L, I), final state (B, I, K-1)). Weight and bias in one dtype, fp32 or u's; the state in u's."""
    batch, length, channels = u.shape
    width = weight.shape[-1]
    y, last = _outputs(u, weight)
    u = rows(u)
    weight, bias, state, seq_idx = (solid(x) for x in (weight, bias, state, seq_idx))
    run, groups = _division(u, width)
    items = batch * -(-length // run) * groups
    _kernel("conv_forward", u, weight)(
        -(-items // _THREADS), _THREADS, u, weight, bias, state, seq_idx, y, last, batch, length, channels, run,
        *u.stride()[:2],
    )  # fmt: skip
    return y, last


def _conv_backward(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    d_y: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, weight, bias and the first state; the last two are empty where there is none."""
    d_u = ops.dense(u)
    return d_u, *_conv_backward_into(u, weight, bias, state, seq_idx, d_y, d_last, d_u)


def _conv_backward_into(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    d_y: Tensor,
    d_last: Tensor | None,
    d_u: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_conv_backward`, with the gradient of u written to `d_u`, whose rows are dense and begin at multiples of 16
    bytes."""
    batch, length, channels = u.shape
    width = weight.shape[-1]
    d_weight, d_bias, d_state = _gradients(u, weight, bias, state)
    assert rows(d_u) is d_u
    u, d_y = rows(u), rows(d_y)
    weight, bias, state, seq_idx, d_last = (solid(x) for x in (weight, bias, state, seq_idx, d_last))
    run, groups = _division(u, width)
    shares = batch * -(-length // (run * _RUNS_OF_A_BLOCK))
    partial = u.new_empty(shares, width + 1, channels, dtype=torch.float32)
    _kernel("conv_backward", u, weight)(
        shares * -(-groups // 32), _THREADS, u, weight, bias, state, seq_idx, d_y, d_last, d_u,
        None if state is None else d_state, partial, length, channels, run, *u.stride()[:2], *d_y.stride()[:2],
        *d_u.stride()[:2],
    )  # fmt: skip
    _kernel("conv_sum", u, weight)(
        -(-(width + 1) * channels // 32), 256, partial, d_weight, None if bias is None else d_bias, shares, channels
    )
    return d_weight, d_bias, d_state


def _conv_step(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """(y (B, I), new state (B, I, K-1)), dtypes as in `conv_forward`."""
    batch, channels = u.shape
    y, last = ops.dense(u), ops.dense(state)
    u = rows(u)
    weight, bias, state = (solid(x) for x in (weight, bias, state))
    items = batch * (channels // _vector(u, weight.shape[-1]))
    _kernel("conv_step", u, weight)(
        -(-items // _THREADS), _THREADS, u, weight, bias, state, y, last, batch, channels, u.stride(0)
    )
    return y, last


def _outputs(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, channels = u.shape
    return ops.dense(u), u.new_empty(batch, channels, weight.shape[-1] - 1)


def _gradients(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        ops.dense(weight),
        weight.new_empty(0) if bias is None else ops.dense(bias),
        u.new_empty(0) if state is None else ops.dense(state),
    )


def _kernel(name: str, u: Tensor, weight: Tensor) -> cuda.Kernel:
    return cuda.kernel("conv.cu", name, u.device, T=cuda.TYPES[u.dtype], W=cuda.TYPES[weight.dtype], K=weight.shape[-1])


def _vector(u: Tensor, width: int) -> int:
    """Channels of a thread, `C` of conv.cu."""
    return 8 if width <= 4 and u.element_size() == 2 else 4


def _division(u: Tensor, width: int) -> tuple[int, int]:
    """Steps of a run, and threads that stand side by side over the channels."""
    batch, length, channels = u.shape
    groups = channels // _vector(u, width)
    for run in _RUNS:
        threads = batch * -(-length // run) * groups
        if threads >= _ENOUGH_THREADS:
            break
    assert threads < 2**32, "the kernel counts its threads in 32 bits"
    return run, groups


def _filter(u: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in one dtype that the kernels know beside u's."""
    if weight.dtype in (u.dtype, torch.float32) and (bias is None or bias.dtype == weight.dtype):
        return weight, bias
    return weight.float(), None if bias is None else bias.float()


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def rows(x: Tensor) -> Tensor:
    """x (..., width) itself, if its rows are dense and begin at multiples of 16 bytes, else a copy of which that holds
    (the width must be a multiple of 16 bytes).
    """
    *apart, beside = x.stride()
    past, size = x.data_ptr(), x.element_size()
    for stride in apart:
        past |= stride * size
    return x if beside == 1 and not past & 15 else x.clone(memory_format=torch.contiguous_format)


def solid(x: Any) -> Any:
    """x itself, if it is None, or contiguous and begins at a multiple of 16 bytes, else a copy."""
    if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


conv_forward = ops.define(
    "conv_forward(Tensor u, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx) -> (Tensor, Tensor)",
    _conv_forward,
    lambda u, weight, bias, state, seq_idx: _outputs(u, weight),
    _Conv,
)
conv_backward = ops.define(
    "conv_backward(Tensor u, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx, Tensor d_y, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _conv_backward,
    lambda u, weight, bias, state, seq_idx, d_y, d_last: (ops.dense(u), *_gradients(u, weight, bias, state)),
)
conv_backward_into = ops.define(
    "conv_backward_into(Tensor u, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx, Tensor d_y,"
    " Tensor? d_last, Tensor(a!) d_u) -> (Tensor, Tensor, Tensor)",
    _conv_backward_into,
    lambda u, weight, bias, state, seq_idx, d_y, d_last, d_u: _gradients(u, weight, bias, state),
)
conv_step_forward = ops.define(
    "conv_step(Tensor u, Tensor weight, Tensor? bias, Tensor state) -> (Tensor, Tensor)",
    _conv_step,
    lambda u, weight, bias, state: (ops.dense(u), ops.dense(state)),
)
