"""What stands between the matrix products of a layer, each as one pass over memory: norms, the sum with the residual
stream before them, SwiGLU's product, cross-entropy.

On a CUDA device these are kernels of moai_core/cuda (arithmetic in fp32, no atomics on floats, no synchronisation,
registered as PyTorch operators, so that `torch.compile`, FSDP and CUDA graphs work); elsewhere, and for what the
kernels don't know (float64, rows of more than 32768), the same mathematics in torch's own operations. What a function
saves for its backward pass are its arguments and results (and a number a row), so that a `saved_tensors_hooks` that
recognises a norm's result can drop and recompute it.

    rms_norm(x, weight, eps) -> y
    add_rms_norm(residual, x, weight, eps) -> (residual + x, rms_norm(residual + x))
    small_norms(x, weights, eps) -> [rms_norm of each slice of x's last axis]
    swiglu(gate, up) -> silu(gate) * up
    cross_entropy(logits, targets), cross_entropy_gradient(logits, targets, scale): for loss.py, without autograd

Left out: everything that a matrix product could take into its own epilogue; second derivatives.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import cuda

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}

# What one row of a norm may have: a block holds it in registers.
_WIDEST = 32768
_WIDEST_SMALL = 512


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in fp32 or wider (arXiv 1910.07467).

    x (..., size) in any floating dtype; its rows may be slices of longer ones. weight (size,). Returns (..., size) in
    the weight's dtype. Saves x, weight and the scale of each row (fp32).
    """
    if x.shape[-1] <= _WIDEST and usable(x, weight):
        return torch.ops.moai.rms_norm(x, weight, eps)[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(weight.dtype)


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after a block, and its norm for the next one: (residual + x, rms_norm(residual + x)).

    residual (..., size) and x (..., size) in any floating dtypes, or x None where nothing is to be added (the first
    layer): then the stream comes back as it is. The sum has the wider dtype of the two, the norm the weight's. Saves
    the sum, weight and the scale of each row (fp32). The gradients of the sum that come back through both results are
    added in the same pass.
    """
    if x is None:
        return residual, rms_norm(residual, weight, eps)
    if residual.shape == x.shape and x.shape[-1] <= _WIDEST and usable(residual, x, weight):
        total, y, _ = torch.ops.moai.add_rms_norm(residual.to(_wider(residual, x)), x, weight, eps)
        return total, y
    total = residual + x
    return total, rms_norm(total, weight, eps)


def small_norms(x: Tensor, weights: list[Tensor], eps: float) -> list[Tensor]:
    """rms_norm of adjacent slices of x's last axis, each with its own weight: the norms of dt, B and C in one pass.

    x (..., sum of sizes), not split; weights (size_i,). Returns contiguous tensors (..., size_i) in the weights' dtype.
    """
    same = len({weight.dtype for weight in weights}) == 1
    if len(weights) == 3 and same and x.shape[-1] <= _WIDEST_SMALL and usable(x, *weights):
        return list(torch.ops.moai.small_norms(x, *weights, eps)[:3])
    parts = x.split([weight.shape[0] for weight in weights], dim=-1)
    return [rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), same shapes and dtypes. Saves gate and up only."""
    if gate.shape == up.shape and gate.dtype == up.dtype and usable(gate, up):
        return torch.ops.moai.swiglu(gate, up)
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (rows,) in fp32 of logits (rows, V) against targets (rows,) int64: 0 where a target is -100, NaN
    where it is no token. Only for what is `usable`; no gradient.
    """
    return torch.ops.moai.cross_entropy(logits, targets)


def cross_entropy_gradient(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    """As `cross_entropy`, and overwrites the logits (contiguous) with the gradient of the sum of the losses, times
    scale (one fp32 number on their device, None for 1).
    """
    return torch.ops.moai.cross_entropy_gradient(logits, targets, scale)


def scale_in_place(x: Tensor, by: Tensor) -> None:
    """x *= by, an fp32 number on x's device; costs nothing where that is 1. x contiguous and `usable`. Not seen by
    autograd's count of changes: for a tensor that its caller knows to be nobody else's.
    """
    v = _vector(x.numel(), x)
    grid = min(-(-x.numel() // (256 * v)), 8 * _multiprocessors(x.device))
    _cross_entropy_kernel("scale_in_place", x, v, 1024)(grid, 256, x, by, x.numel())


def usable(*tensors: Tensor) -> bool:
    """Whether moai's kernels can work on these tensors: they are not empty, on a device that has kernels, of a dtype
    that they know.
    """
    return all(t.dtype in _NAMES and t.numel() > 0 for t in tensors) and _has_kernels(tensors[0].device)


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    return cuda.why_not(device) is None


def _wider(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


# ---- The operators. A norm's rows may lie apart; everything else that isn't contiguous is made so.


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
    shape = _team(_vector(rows.shape[1], rows, weight, d_y, d_total), rows.shape[1])
    macros = {"R": _NAMES[total.dtype], "X": _NAMES[dtype], "W": _NAMES[weight.dtype], **shape.macros}
    grid = min(-(-len(rows) // shape.teams), _multiprocessors(total.device) * -(-512 // shape.block))
    partial = rstd.new_empty(grid, rows.shape[1])
    cuda.kernel("norm.cu", "norm_backward", total.device, **macros)(
        grid, shape.block, d_y, d_total, rows, weight, rstd, d, narrow if narrow.numel() else None, partial,
        len(rows), rows.shape[1], rows.stride(0),
    )  # fmt: skip
    cuda.kernel("norm.cu", "norm_sum", total.device, **macros)(
        -(-rows.shape[1] // 32), 1024, partial, d_weight, grid, rows.shape[1]
    )
    return d, narrow, d_weight


@_rms_norm_backward.register_fake
def _(d_y, d_total, total, weight, rstd, dtype):  # type: ignore[no-untyped-def]
    return _norm_gradients(total, weight, dtype)


def _norm_forward(
    residual: Tensor, x: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, rstd: Tensor, eps: float
) -> None:
    residual, x, weight = _rows(residual), None if x is None else _rows(x), weight.contiguous()
    shape = _team(_vector(residual.shape[1], residual, weight, x), residual.shape[1])
    types = {"R": residual.dtype, "X": residual.dtype if x is None else x.dtype, "W": weight.dtype}
    macros = {**{key: _NAMES[dtype] for key, dtype in types.items()}, **shape.macros}
    cuda.kernel("norm.cu", "norm_forward", residual.device, **macros)(
        -(-len(residual) // shape.teams), shape.block, residual, x, weight, total, y, rstd, len(residual),
        residual.shape[1], residual.stride(0), 0 if x is None else x.stride(0), eps,
    )  # fmt: skip


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
    sizes = [len(weight) for weight in weights]
    cuda.kernel("small_norms.cu", "small_norms_forward", x.device, **_small_macros(rows, weights))(
        -(-len(rows) // 8), 256, rows, *weights, *ys, len(rows), *sizes, rows.stride(0), eps
    )
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
    sizes = [len(weight) for weight in weights]
    grid = min(-(-len(rows) // 8), 4 * _multiprocessors(x.device))
    partial = rstd.new_empty(grid, sum(sizes))
    macros = _small_macros(rows, [*weights, *d_ys])
    cuda.kernel("small_norms.cu", "small_norms_backward", x.device, **macros)(
        grid, 256, *d_ys, rows, *weights, rstd, d_x, partial, len(rows), *sizes, rows.stride(0)
    )
    cuda.kernel("small_norms.cu", "small_norms_sum", x.device, **macros)(
        -(-sum(sizes) // 32), 1024, partial, *d_weights, grid, *sizes
    )
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
    kernel = cuda.kernel("swiglu.cu", "swiglu_forward", gate.device, T=_NAMES[gate.dtype], V=v)
    kernel(-(-out.numel() // (256 * v)), 256, gate, up, out, out.numel())
    return out


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return _like(gate)


@torch.library.custom_op("moai::swiglu_backward", mutates_args=())
def _swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _like(gate), _like(up)
    d_out, gate, up = d_out.contiguous(), gate.contiguous(), up.contiguous()
    v = _vector(gate.numel(), d_out, gate, up)
    kernel = cuda.kernel("swiglu.cu", "swiglu_backward", gate.device, T=_NAMES[gate.dtype], V=v)
    kernel(-(-gate.numel() // (256 * v)), 256, d_out, gate, up, d_gate, d_up, gate.numel())
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


def _cross_entropy_kernel(name: str, x: Tensor, v: int, block: int) -> Any:
    return cuda.kernel("cross_entropy.cu", name, x.device, T=_NAMES[x.dtype], V=v, BLOCK=block)


# ---- Shapes of results, and how the work is divided


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


def _small_macros(rows: Tensor, others: list[Tensor]) -> dict[str, str | int]:
    v = min(_vector(weight.shape[-1], rows, weight) for weight in others)
    per = -(-rows.shape[1] // (32 * v))
    return {"X": _NAMES[rows.dtype], "W": _NAMES[others[0].dtype], "V": v, "PER": per}


def _rows(x: Tensor) -> Tensor:
    """x as (rows, size) with values of a row side by side; rows may lie apart. Copies only where it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _vector(size: int, *tensors: Tensor | None) -> int:
    """Values that a thread moves at once: 16 bytes of the narrowest dtype, fewer where a row's size, the distance of
    rows or an address doesn't allow it.
    """
    given = [t for t in tensors if t is not None]
    v = 16 // min(t.element_size() for t in given)
    while v > 1 and not all(_aligned(t, v, size) for t in given):
        v //= 2
    return v


def _aligned(x: Tensor, v: int, size: int) -> bool:
    step = x.stride(-2) if x.dim() > 1 and x.shape[-2] > 1 else 0
    return size % v == 0 and step % v == 0 and x.data_ptr() % min(16, v * x.element_size()) == 0


class _Team(NamedTuple):
    """How norm.cu divides a row: `team` threads, `per` vectors of v values each; `teams` of them in a block."""

    macros: dict[str, int]
    teams: int
    block: int


@lru_cache(maxsize=256)
def _team(v: int, size: int) -> _Team:
    vectors = -(-size // v)
    if vectors <= 32:
        team = 1 << (vectors - 1).bit_length()
    else:
        team = min(512, 32 * -(-vectors // 64))
    block = team if team > 32 else 128
    return _Team({"V": v, "TEAM": team, "PER": -(-vectors // team)}, block // team, block)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
