"""The kernels of fused.py as operators of PyTorch, so that autograd, `torch.compile`, FSDP and CUDA graphs know them,
and how their work is divided. A norm's rows may lie apart; everything else that isn't contiguous is made so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_core import cuda

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}

# What one row of a norm may have: a block holds it in registers, or a warp.
WIDEST = 32768
WIDEST_SMALL = 512


@torch.library.custom_op("moai::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): y (..., size) in the weight's dtype, rstd (...) fp32."""
    y, rstd = _norm_outputs(x, weight)
    _norm_forward(x, None, weight, None, y, rstd, eps)
    return y, rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm_outputs(x, weight)


@torch.library.custom_op("moai::add_rms_norm", mutates_args=())
def _add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total, y, rstd): total = residual + x in residual's dtype, which is the wider one."""
    total, (y, rstd) = _like(residual), _norm_outputs(residual, weight)
    _norm_forward(residual, x, weight, total, y, rstd, eps)
    return total, y, rstd


@_add_rms_norm.register_fake
def _(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return (_like(residual), *_norm_outputs(residual, weight))


@torch.library.custom_op("moai::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    d_y: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(d, d in `dtype`, d_weight): d, the gradient of total, through y and through total itself. The second is empty
    where total has that dtype already.
    """
    d, narrow, d_weight = _norm_gradients(total, weight, dtype)
    rows, weight = _rows(total), weight.contiguous()
    d_y, d_total = d_y.contiguous(), None if d_total is None else d_total.contiguous()
    count, size = rows.shape
    v = _vector(size, rows, weight, d_y, d_total)
    k = _norm_kernels(total.device, total.dtype, dtype, weight.dtype, v, size)
    partial = rstd.new_empty(min(-(-count // k.teams), k.resident), size)
    second = None if dtype == total.dtype else narrow
    k.backward(len(partial), k.block, d_y, d_total, rows, weight, rstd, d, second, partial, count, rows.stride(0))
    k.sum(-(-size // 32), 1024, partial, d_weight, len(partial))
    return d, narrow, d_weight


@_rms_norm_backward.register_fake
def _(d_y, d_total, total, weight, rstd, dtype):  # type: ignore[no-untyped-def]
    return _norm_gradients(total, weight, dtype)


def _norm_forward(
    residual: Tensor, x: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, rstd: Tensor, eps: float
) -> None:
    residual, x, weight = _rows(residual), None if x is None else _rows(x), weight.contiguous()
    count, size = residual.shape
    v, added = _vector(size, residual, weight, x), residual if x is None else x
    k = _norm_kernels(residual.device, residual.dtype, added.dtype, weight.dtype, v, size)
    strides = residual.stride(0), added.stride(0)
    k.forward(-(-count // k.teams), k.block, residual, x, weight, total, y, rstd, count, *strides, eps)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward_of_rms_norm(ctx: Any, d_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    if d_y is None:
        return None, None, None
    d, _, d_weight = torch.ops.moai.rms_norm_backward(d_y, None, x, weight, rstd, x.dtype)
    return d, d_weight, None


def _save_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(output[0], inputs[2], output[2])


def _backward_of_add_rms_norm(
    ctx: Any, d_total: Tensor | None, d_y: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    total, weight, rstd = ctx.saved_tensors
    if d_y is None:
        return d_total, None if d_total is None else d_total.to(ctx.dtype), None, None
    d, narrow, d_weight = torch.ops.moai.rms_norm_backward(d_y, d_total, total, weight, rstd, ctx.dtype)
    return d, d if ctx.dtype == d.dtype else narrow, d_weight, None


_rms_norm.register_autograd(_backward_of_rms_norm, setup_context=_save_rms_norm)
_add_rms_norm.register_autograd(_backward_of_add_rms_norm, setup_context=_save_add_rms_norm)


@torch.library.custom_op("moai::small_norms", mutates_args=())
def _small_norms(
    x: Tensor, weight0: Tensor, weight1: Tensor, weight2: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norms of three slices and rstd (..., 3) fp32."""
    weights = [weight.contiguous() for weight in (weight0, weight1, weight2)]
    ys, rows = _small_outputs(x, weights), _rows(x)
    sizes = [weight.shape[0] for weight in weights]
    forward, _, _ = _small_kernels(x.device, x.dtype, weights[0].dtype, _small_vector(rows, weights), sum(sizes))
    forward(-(-len(rows) // 8), 256, rows, *weights, *ys, len(rows), *sizes, rows.stride(0), eps)
    return ys


@_small_norms.register_fake
def _(x, weight0, weight1, weight2, eps):  # type: ignore[no-untyped-def]
    return _small_outputs(x, [weight0, weight1, weight2])


@torch.library.custom_op("moai::small_norms_backward", mutates_args=())
def _small_norms_backward(
    d_y0: Tensor, d_y1: Tensor, d_y2: Tensor, x: Tensor, weight0: Tensor, weight1: Tensor, weight2: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the three weights."""
    weights = [weight.contiguous() for weight in (weight0, weight1, weight2)]
    d_ys = [d_y.contiguous() for d_y in (d_y0, d_y1, d_y2)]
    rows, (d_x, *d_weights) = _rows(x), _small_gradients(x, weights)
    sizes, v = [weight.shape[0] for weight in weights], _small_vector(rows, [*weights, *d_ys])
    _, backward, add = _small_kernels(x.device, x.dtype, weights[0].dtype, v, sum(sizes))
    grid = min(-(-len(rows) // 8), 4 * _multiprocessors(x.device))
    partial = rstd.new_empty(grid, sum(sizes))
    backward(grid, 256, *d_ys, rows, *weights, rstd, d_x, partial, len(rows), *sizes, rows.stride(0))
    add(-(-sum(sizes) // 32), 1024, partial, *d_weights, grid, *sizes)
    return (d_x, *d_weights)  # type: ignore[return-value]


@_small_norms_backward.register_fake
def _(d_y0, d_y1, d_y2, x, weight0, weight1, weight2, rstd):  # type: ignore[no-untyped-def]
    return _small_gradients(x, [weight0, weight1, weight2])


def _save_small_norms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], output[3])


def _backward_of_small_norms(ctx: Any, *d_ys: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.moai.small_norms_backward(*d_ys[:3], *ctx.saved_tensors), None)


_small_norms.register_autograd(_backward_of_small_norms, setup_context=_save_small_norms)


@torch.library.custom_op("moai::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = _like(gate)
    gate, up = gate.contiguous(), up.contiguous()
    v = _vector(out.numel(), gate, up)
    forward, _ = _swiglu_kernels(gate.device, gate.dtype, v)
    forward(-(-out.numel() // (256 * v)), 256, gate, up, out, out.numel())
    return out


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return _like(gate)


@torch.library.custom_op("moai::swiglu_backward", mutates_args=())
def _swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _like(gate), _like(up)
    d_out, gate, up = d_out.contiguous(), gate.contiguous(), up.contiguous()
    v = _vector(gate.numel(), d_out, gate, up)
    _, backward = _swiglu_kernels(gate.device, gate.dtype, v)
    backward(-(-gate.numel() // (256 * v)), 256, d_out, gate, up, d_gate, d_up, gate.numel())
    return d_gate, d_up


@_swiglu_backward.register_fake
def _(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _like(gate), _like(up)


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_swiglu(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.moai.swiglu_backward(d_out, *ctx.saved_tensors)


_swiglu.register_autograd(_backward_of_swiglu, setup_context=_save_swiglu)


@torch.library.custom_op("moai::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return _launch_cross_entropy(logits.contiguous(), targets, None, write=False)


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("moai::cross_entropy_gradient", mutates_args={"logits"})
def _cross_entropy_gradient(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    assert logits.is_contiguous()
    return _launch_cross_entropy(logits, targets, scale, write=True)


@_cross_entropy_gradient.register_fake
def _(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _launch_cross_entropy(logits: Tensor, targets: Tensor, scale: Tensor | None, *, write: bool) -> Tensor:
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    v = _vector(vocabulary, logits)
    vectors, width = vocabulary // v, v * logits.element_size()
    block = next((b for b in (128, 256, 512) if vectors <= 4 * b), 1024)
    # As much of the row as fits beside the block's own few numbers stays on the multiprocessor between its two passes.
    kept = min(vectors, (_shared_memory(logits.device) - 512) // width) if write else 0
    _cross_entropy_kernel("cross_entropy", logits, v, block)(
        rows, block, logits, targets.contiguous(), scale, losses, vocabulary, kept, int(write), shared=kept * width
    )
    return losses


def scale_in_place(x: Tensor, by: Tensor) -> None:
    """See fused.scale_in_place."""
    v = _vector(x.numel(), x)
    grid = min(-(-x.numel() // (256 * v)), 8 * _multiprocessors(x.device))
    _cross_entropy_kernel("scale_in_place", x, v, 1024)(grid, 256, x, by, x.numel())


def _cross_entropy_kernel(name: str, x: Tensor, v: int, block: int) -> Any:
    return cuda.kernel("cross_entropy.cu", name, x.device, T=NAMES[x.dtype], V=v, BLOCK=block)


# ---- Shapes of results, and what of a tensor a thread moves


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _norm_outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _norm_gradients(total: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    second = (0,) if dtype == total.dtype else total.shape
    return _like(total), total.new_empty(second, dtype=dtype), weight.new_empty(weight.shape)


def _small_outputs(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c = (weight.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights)
    return a, b, c, x.new_empty(*x.shape[:-1], 3, dtype=torch.float32)


def _small_gradients(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c = (weight.new_empty(weight.shape) for weight in weights)
    return _like(x), a, b, c


def _rows(x: Tensor) -> Tensor:
    """x as (rows, size) with values of a row side by side; rows may lie apart. Copies only where it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _vector(size: int, *tensors: Tensor | None) -> int:
    """Values that a thread moves at once: 16 bytes of the narrowest dtype, fewer where a row's size, the distance of
    rows or an address doesn't allow it.
    """
    most, steps = 4, size
    for t in tensors:
        if t is None:
            continue
        width, past = t.element_size(), t.data_ptr() & 15
        if width == 2 and most == 4:
            most = 8
        if t.dim() > 1 and t.shape[-2] > 1:
            steps |= t.stride(-2)
        if past:
            steps |= (past & -past) // width
    return min(most, steps & -steps)


def _small_vector(rows: Tensor, others: list[Tensor]) -> int:
    return min(_vector(t.shape[-1], rows, t) for t in others)


# ---- Kernels, and how they divide the work


class _NormKernels(NamedTuple):
    """norm.cu for rows of one size: blocks of `block` threads take `teams` rows at once; `resident` of them run."""

    forward: cuda.Kernel
    backward: cuda.Kernel
    sum: cuda.Kernel
    teams: int
    block: int
    resident: int


@lru_cache(maxsize=256)
def _norm_kernels(
    device: torch.device, stream: torch.dtype, added: torch.dtype, weight: torch.dtype, v: int, size: int
) -> _NormKernels:
    vectors = -(-size // v)
    if vectors <= 32:
        team = 1 << (vectors - 1).bit_length()
    else:
        # Two vectors a thread: loads under way enough with few threads to meet at the barrier.
        team = min(1024, 32 * -(-vectors // 64))
    block = team if team > 32 else 128
    macros = {"R": NAMES[stream], "X": NAMES[added], "W": NAMES[weight]}
    sizes = {"SIZE": size, "V": v, "TEAM": team, "PER": -(-vectors // team)}
    forward, backward, add = (
        cuda.kernel("norm.cu", f"norm_{name}", device, **macros, **sizes) for name in ("forward", "backward", "sum")
    )
    return _NormKernels(forward, backward, add, block // team, block, _multiprocessors(device) * -(-512 // block))


@lru_cache(maxsize=256)
def _small_kernels(
    device: torch.device, row: torch.dtype, weight: torch.dtype, v: int, size: int
) -> tuple[cuda.Kernel, cuda.Kernel, cuda.Kernel]:
    macros = {"X": NAMES[row], "W": NAMES[weight]}
    names = ("small_norms_forward", "small_norms_backward", "small_norms_sum")
    a, b, c = (cuda.kernel("small_norms.cu", name, device, **macros, V=v, PER=-(-size // (32 * v))) for name in names)
    return a, b, c


@lru_cache(maxsize=64)
def _swiglu_kernels(device: torch.device, dtype: torch.dtype, v: int) -> tuple[cuda.Kernel, cuda.Kernel]:
    a, b = (cuda.kernel("swiglu.cu", f"swiglu_{way}", device, T=NAMES[dtype], V=v) for way in ("forward", "backward"))
    return a, b


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
