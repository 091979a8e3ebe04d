"""The kernels of fused.py as operators of PyTorch, so that autograd, `torch.compile`, FSDP and CUDA graphs know them,
and how their work is divided. A norm's rows may lie apart; everything else that isn't contiguous is made so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.cuda.rows import apart, division, multiprocessors, summands, vector

# What the small norms' row may have: a warp holds it in registers.
WIDEST_SMALL = 512


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with ops.below():
            y, rstd = rms_norm(x, weight, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        return y, rstd

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if d_y is None:
            return None, None, None, None
        x, weight, rstd = ctx.saved_tensors
        d, _, d_weight, _ = rms_norm_backward(d_y, None, x, weight, rstd, x.dtype, False)
        return d, d_weight, None, None


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        with ops.below():
            total, y, rstd = add_rms_norm(residual, x, weight, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        ctx.save_for_backward(total, weight, rstd)
        return total, y, rstd

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if d_y is None:
            return d_total, None if d_total is None else d_total.to(ctx.dtype), None, None, None
        total, weight, rstd = ctx.saved_tensors
        d, narrow, d_weight, _ = rms_norm_backward(d_y, d_total, total, weight, rstd, ctx.dtype, False)
        return d, d if ctx.dtype == d.dtype else narrow, d_weight, None, None


class _SmallNorms(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight0: Tensor, weight1: Tensor, weight2: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        with ops.below():
            results = small_norms(x, weight0, weight1, weight2, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight0, weight1, weight2, results[3])
        return results

    @staticmethod
    def backward(ctx: Any, *d_ys: Tensor | None) -> tuple[Any, ...]:
        x, *weights, rstd = ctx.saved_tensors
        known = (
            w.new_zeros(*x.shape[:-1], w.shape[0]) if d is None else d for d, w in zip(d_ys, weights, strict=False)
        )
        return (*small_norms_backward(*known, x, *weights, rstd), None)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        with ops.below():
            out = swiglu(gate, up)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(d_out, *ctx.saved_tensors)


# ---- The operators: what they launch


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y, rstd): y (..., size) in `dtype`, rstd (...) fp32."""
    y, rstd = _norm_outputs(x, dtype)
    _norm_forward(x, None, weight, None, y, rstd, eps)
    return y, rstd


def _add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, y, rstd): total = residual + x in residual's dtype, which is the wider one."""
    total, (y, rstd) = ops.dense(residual), _norm_outputs(residual, dtype)
    _norm_forward(residual, x, weight, total, y, rstd, eps)
    return total, y, rstd


def _rms_norm_backward(
    d_y: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, d in `dtype`, d_weight, y): d, the gradient of total, through y and through total itself. The second is empty
    where total has that dtype already; the last, y made once more with the bits of the forward pass, unless `again`.
    """
    d, narrow, d_weight, y = _norm_gradients(d_y, total, weight, dtype, again)
    (rows, distance), weight = apart(total), weight.contiguous()
    d_y, d_total = d_y.contiguous(), None if d_total is None else d_total.contiguous()
    count, size = rstd.numel(), weight.shape[0]
    v = vector(size, rows, weight, d_y, d_total)
    k = _norm_kernels(total.device, total.dtype, dtype, weight.dtype, d_y.dtype, v, size)
    grid = min(-(-count // k.teams), k.resident)
    partial = rstd.new_empty(grid, size)
    second = None if dtype == total.dtype else narrow
    made = y if again else None
    k.backward(grid, k.block, d_y, d_total, rows, weight, rstd, d, second, made, partial, count, distance)
    k.sum(-(-size // 32), 1024, partial, d_weight, grid)
    return d, narrow, d_weight, y


def _norm_forward(
    residual: Tensor, x: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, rstd: Tensor, eps: float
) -> None:
    weight = weight.contiguous()
    rows, distance, x, x_distance, v = summands(residual, x, weight)
    count, size, added = rstd.numel(), weight.shape[0], rows if x is None else x
    k = _norm_kernels(rows.device, rows.dtype, added.dtype, weight.dtype, y.dtype, v, size)
    k.forward(-(-count // k.teams), k.block, rows, x, weight, total, y, rstd, count, distance, x_distance, eps)


def _small_norms(
    x: Tensor, weight0: Tensor, weight1: Tensor, weight2: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norms of three slices and rstd (..., 3) fp32."""
    weights = [weight.contiguous() for weight in (weight0, weight1, weight2)]
    ys, (rows, distance) = _small_outputs(x, weights), apart(x)
    count = ys[3].numel() // 3
    a, b, c = sizes = [weight.shape[0] for weight in weights]
    forward, _, _ = _small_kernels(x.device, x.dtype, weights[0].dtype, vector(a | b | c, rows, *weights), a + b + c)
    forward(-(-count // 8), 256, rows, *weights, *ys, count, *sizes, distance, eps)
    return ys


def _small_norms_backward(
    d_y0: Tensor, d_y1: Tensor, d_y2: Tensor, x: Tensor, weight0: Tensor, weight1: Tensor, weight2: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the three weights."""
    weights = [weight.contiguous() for weight in (weight0, weight1, weight2)]
    d_ys = [d_y.contiguous() for d_y in (d_y0, d_y1, d_y2)]
    (rows, distance), (d_x, *d_weights) = apart(x), _small_gradients(x, weights)
    count = rstd.numel() // 3
    a, b, c = sizes = [weight.shape[0] for weight in weights]
    v, size = vector(a | b | c, rows, *weights, *d_ys), a + b + c
    _, backward, add = _small_kernels(x.device, x.dtype, weights[0].dtype, v, size)
    grid = min(-(-count // 8), 4 * multiprocessors(x.device))
    partial = rstd.new_empty(grid, size)
    backward(grid, 256, *d_ys, rows, *weights, rstd, d_x, partial, count, *sizes, distance)
    add(-(-size // 32), 1024, partial, *d_weights, grid, *sizes)
    return (d_x, *d_weights)  # type: ignore[return-value]


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = ops.dense(gate)
    gate, up = gate.contiguous(), up.contiguous()
    v = vector(out.numel(), gate, up)
    forward, _ = _swiglu_kernels(gate.device, gate.dtype, v)
    forward(-(-out.numel() // (256 * v)), 256, gate, up, out, out.numel())
    return out


def _swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_swiglu_backward(d_out.contiguous(), gate, up, again=False)


def _swiglu_backward_again(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; the product, with the bits of the forward pass, takes d_out's place."""
    assert d_out.is_contiguous()
    return _launch_swiglu_backward(d_out, gate, up, again=True)


def _launch_swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor, *, again: bool) -> tuple[Tensor, Tensor]:
    d_gate, d_up = ops.dense(gate), ops.dense(up)
    gate, up = gate.contiguous(), up.contiguous()
    v = vector(gate.numel(), d_out, gate, up)
    _, backward = _swiglu_kernels(gate.device, gate.dtype, v)
    backward(-(-gate.numel() // (256 * v)), 256, d_out, gate, up, d_gate, d_up, gate.numel(), int(again))
    return d_gate, d_up


# ---- Shapes of results


def _norm_outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ops.dense(x, dtype), x.new_empty(*x.shape[:-1], dtype=torch.float32)


def _norm_gradients(
    d_y: Tensor, total: Tensor, weight: Tensor, dtype: torch.dtype, again: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow = total.new_empty(0) if dtype == total.dtype else ops.dense(total, dtype)
    return ops.dense(total), narrow, ops.dense(weight), ops.dense(d_y) if again else d_y.new_empty(0)


def _small_outputs(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c = (weight.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights)
    return a, b, c, x.new_empty(*x.shape[:-1], 3, dtype=torch.float32)


def _small_gradients(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c = weights
    return ops.dense(x), ops.dense(a), ops.dense(b), ops.dense(c)


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
    device: torch.device,
    stream: torch.dtype,
    added: torch.dtype,
    weight: torch.dtype,
    result: torch.dtype,
    v: int,
    size: int,
) -> _NormKernels:
    sizes, teams, block = division(size, v)
    types = {"R": stream, "X": added, "W": weight, "Y": result}
    macros = {letter: cuda.TYPES[dtype] for letter, dtype in types.items()}
    forward, backward, add = (
        cuda.kernel("norm.cu", f"norm_{name}", device, **macros, **sizes) for name in ("forward", "backward", "sum")
    )
    return _NormKernels(forward, backward, add, teams, block, multiprocessors(device) * -(-512 // block))


@lru_cache(maxsize=256)
def _small_kernels(
    device: torch.device, row: torch.dtype, weight: torch.dtype, v: int, size: int
) -> tuple[cuda.Kernel, cuda.Kernel, cuda.Kernel]:
    macros = {"X": cuda.TYPES[row], "W": cuda.TYPES[weight]}
    names = ("small_norms_forward", "small_norms_backward", "small_norms_sum")
    a, b, c = (cuda.kernel("small_norms.cu", name, device, **macros, V=v, PER=-(-size // (32 * v))) for name in names)
    return a, b, c


@lru_cache(maxsize=64)
def _swiglu_kernels(device: torch.device, dtype: torch.dtype, v: int) -> tuple[cuda.Kernel, cuda.Kernel]:
    a, b = (
        cuda.kernel("swiglu.cu", f"swiglu_{way}", device, T=cuda.TYPES[dtype], V=v) for way in ("forward", "backward")
    )
    return a, b


# ---- Registration


rms_norm = ops.define(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _rms_norm,
    lambda x, weight, eps, dtype: _norm_outputs(x, dtype),
    _RMSNorm,
)
add_rms_norm = ops.define(
    "add_rms_norm(Tensor residual, Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm,
    lambda residual, x, weight, eps, dtype: (ops.dense(residual), *_norm_outputs(residual, dtype)),
    _AddRMSNorm,
)
rms_norm_backward = ops.define(
    "rms_norm_backward(Tensor d_y, Tensor? d_total, Tensor total, Tensor weight, Tensor rstd, ScalarType dtype,"
    " bool again) -> (Tensor, Tensor, Tensor, Tensor)",
    _rms_norm_backward,
    lambda d_y, d_total, total, weight, rstd, dtype, again: _norm_gradients(d_y, total, weight, dtype, again),
)
small_norms = ops.define(
    "small_norms(Tensor x, Tensor weight0, Tensor weight1, Tensor weight2, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _small_norms,
    lambda x, weight0, weight1, weight2, eps: _small_outputs(x, [weight0, weight1, weight2]),
    _SmallNorms,
)
small_norms_backward = ops.define(
    "small_norms_backward(Tensor d_y0, Tensor d_y1, Tensor d_y2, Tensor x, Tensor weight0, Tensor weight1,"
    " Tensor weight2, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor)",
    _small_norms_backward,
    lambda d_y0, d_y1, d_y2, x, weight0, weight1, weight2, rstd: _small_gradients(x, [weight0, weight1, weight2]),
)
swiglu = ops.define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, lambda gate, up: ops.dense(gate), _SwiGLU)
swiglu_backward = ops.define(
    "swiglu_backward(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward,
    lambda d_out, gate, up: (ops.dense(gate), ops.dense(up)),
)
swiglu_backward_again = ops.define(
    "swiglu_backward_again(Tensor(a!) d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward_again,
    lambda d_out, gate, up: (ops.dense(gate), ops.dense(up)),
)
