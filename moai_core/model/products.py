"""Matrix products together with what stands beside them, each a node of autograd with a backward pass written by hand.

Autograd alone would take the second half of a layer's work through memory more often than it must: a norm and SwiGLU's
product that were dropped (recompute.py) are made again by the very kernels that compute the gradients beside them, and
gradients that meet are added inside of a matrix product (cuBLAS's beta = 1) instead of after it.

    add_norm(residual, x, norm, selective, *readers)  residual + x, and its norm as its readers want it
    norm_products(residual, x, norm, linears, keep)   residual + x, and linears of its norm
    swiglu_product(gate, up, linear, keep)            linear of SwiGLU's product
    product_beside(u, linear)                         linear(u), and u for whoever else reads it
    add_product(total, x, linear)                     total += linear(x), without gradients

Only for plain `nn.Linear` without bias on tensors that moai's kernels know (`fusable`), under autocast too; a
quantized, adapted, hooked or sharded layer is called as it is, and so is everything on a processor. The products are
cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moai_core.cuda.rows import WIDEST
from moai_core.model import fused, fused_fp8
from moai_core.model import fused_ops as ops
from moai_core.model.norm import RMSNorm
from moai_core.model.recompute import Recomputed, call, tensor_of
from moai_core.quant.scaled_mm import Quantized


@dataclass(frozen=True)
class Projected:
    """The results of a block's first products, taken by its norm. keep: what the block may keep for its backward pass
    is everything (False: selective checkpointing)."""

    results: tuple[Tensor, ...]
    keep: bool


def add_norm(
    residual: Tensor, x: Tensor | None, norm: RMSNorm, selective: bool, *readers: nn.Module
) -> tuple[Tensor, Tensor | Recomputed | Projected | Quantized]:
    """The stream, residual + x, and its norm or what `readers`, the matrices that read it, make of it. A prompt's norm
    is rounded once for all of them where they multiply fp8.
    """
    if residual.shape[1] > 1 and fused_fp8.ready(readers, residual, x, norm.weight):
        return fused_fp8.add_rms_norm(residual, x, norm.weight, norm.eps)
    if fusable(residual, *readers, norm=norm):
        return norm_products(residual, x, norm, readers, keep=not selective)
    residual, h = fused.add_rms_norm(residual, x, norm.weight, norm.eps)
    if not selective or torch.compiler.is_compiling():
        return residual, h
    kept = residual.detach()
    return residual, Recomputed(h, lambda: fused.rms_norm(kept, norm.weight, norm.eps))


def fusable(x: Tensor, *linears: nn.Module, norm: RMSNorm | None = None) -> bool:
    """Whether the functions here can take these layers' work on x: a gradient may be asked for, nothing wants to see
    the calls, and the numbers are of types that moai's kernels know."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(plain, linears)):
        return False
    weights = [_weight(linear) for linear in linears]
    dtype = _product_dtype(x, weights[0])
    if norm is not None:
        if x.shape[-1] > WIDEST or not _unwatched(norm) or not fused.usable(x, norm.weight, *weights):
            return False
        one_type = norm.weight.dtype == weights[0].dtype
    else:
        if not fused.usable(x, *weights):
            return False
        one_type = x.dtype == dtype
    return one_type and dtype != torch.float64 and all(w.dtype == weights[0].dtype for w in weights)


def norm_products(
    residual: Tensor, x: Tensor | None, norm: RMSNorm, linears: Sequence[nn.Module], keep: bool
) -> tuple[Tensor, Projected]:
    """The residual stream after a block, and the products of its norm: see fused.add_rms_norm.

    residual (..., H), x (..., H) or None, linears (out_i, H) -> residual + x, and (..., out_i) each. keep: keep the
    norm for the backward pass; else it is made again there, with the same bits.
    """
    if x is not None:
        residual = residual.to(torch.promote_types(residual.dtype, x.dtype))
    dtype = _product_dtype(residual, _weight(linears[0]))
    weights = [_weight(linear).to(dtype) for linear in linears]
    total, *results = _NormProducts.apply(residual, x, norm.weight, norm.eps, dtype, keep, *weights)
    return total, Projected(tuple(results), keep)


def swiglu_product(gate: Tensor, up: Tensor, linear: nn.Module, keep: bool) -> Tensor:
    """linear(silu(gate) * up): gate, up (..., F), linear (H, F) -> (..., H). keep: as in `norm_products`."""
    return _SwiGLUProduct.apply(gate, up, _weight(linear).to(gate.dtype), keep)  # type: ignore[no-any-return]


def product_beside(u: Tensor | Recomputed, linear: nn.Module) -> tuple[Tensor, Tensor | Recomputed]:
    """(linear(u), u): who reads u from here gives its gradient as fresh memory of its own, into which the gradient
    through the product is added. u (..., I), linear (out, I)."""
    result, passed = call(_ProductBeside.apply, u, _weight(linear).to(tensor_of(u).dtype))
    return result, u.passed_on(passed) if isinstance(u, Recomputed) else passed


def onto(total: Tensor, own: bool, linear: nn.Module) -> Tensor | None:
    """`total`, if `add_product` can add this layer's results to it, else None: it is nobody else's (`own`), no gradient
    is asked for, nothing wants to see the call, and all numbers are of one type that moai's kernels know."""
    if not own or torch.is_grad_enabled() or torch.compiler.is_compiling() or not plain(linear):
        return None
    weight = _weight(linear)
    one_type = weight.dtype == total.dtype == _product_dtype(total, weight)
    return total if one_type and fused.usable(total, weight) else None


def add_product(total: Tensor, x: Tensor, linear: nn.Module) -> None:
    """total += linear(x), inside of the product: total (..., H) contiguous, x (..., in), linear (H, in). The sum is
    rounded once."""
    total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), _weight(linear).t())


class _NormProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor | None,
        norm: Tensor,
        eps: float,
        dtype: torch.dtype,
        keep: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        if x is None:
            total, (y, rstd) = residual, ops.rms_norm(residual, norm, eps, dtype)
        else:
            total, y, rstd = ops.add_rms_norm(residual, x, norm, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.added = None if x is None else x.dtype
        ctx.save_for_backward(total, norm, rstd, y if keep else None, *weights)
        with torch.autocast(y.device.type, enabled=False):
            return total, *(F.linear(y, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, *d_results: Tensor | None) -> tuple[Any, ...]:
        total, norm, rstd, y, *weights = ctx.saved_tensors
        given = [None if d is None else d.reshape(-1, d.shape[-1]) for d in d_results]
        d_y: Tensor | None = None
        for d, weight in zip(given, weights, strict=True):
            if d is not None:
                d_y = d @ weight if d_y is None else d_y.addmm_(d, weight)
        if d_y is None:
            d_x = None if d_total is None or ctx.added is None else d_total.to(ctx.added)
            return d_total, d_x, *[None] * (4 + len(weights))
        added = ctx.added or total.dtype
        d_y = d_y.view(*total.shape[:-1], -1)
        d_stream, narrow, d_norm, again = ops.rms_norm_backward(d_y, d_total, total, norm, rstd, added, y is None)
        del d_y
        y = (again if y is None else y).view(-1, norm.shape[0])
        d_weights = [_gradient(need, d, y) for need, d in zip(ctx.needs_input_grad[6:], given, strict=True)]
        d_x = None if ctx.added is None else d_stream if added == d_stream.dtype else narrow
        return d_stream, d_x, d_norm, None, None, None, *d_weights


class _SwiGLUProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, keep: bool) -> Tensor:
        product = ops.swiglu(gate, up)
        ctx.save_for_backward(gate, up, product if keep else None, weight)
        with torch.autocast(gate.device.type, enabled=False):
            return F.linear(product, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, product, weight = ctx.saved_tensors
        d_y = d_y.reshape(-1, d_y.shape[-1])
        d_product = (d_y @ weight).view(gate.shape)
        if product is None:
            # The product takes the place of its gradient.
            d_gate, d_up = ops.swiglu_backward_again(d_product, gate, up)
            product = d_product
        else:
            d_gate, d_up = ops.swiglu_backward(d_product, gate, up)
        del d_product
        d_weight = _gradient(ctx.needs_input_grad[2], d_y, product.view(-1, product.shape[-1]))
        return d_gate, d_up, d_weight, None


class _ProductBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, weight)
        with torch.autocast(u.device.type, enabled=False):
            return F.linear(u, weight), u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor | None, d_u: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        u, weight = ctx.saved_tensors
        if d_result is None:
            return d_u, None
        given = d_result.reshape(-1, d_result.shape[-1])
        if d_u is None:
            d_u = (given @ weight).view(u.shape)
        else:
            d_u = d_u.contiguous()
            d_u.view(-1, d_u.shape[-1]).addmm_(given, weight)
        return d_u, _gradient(ctx.needs_input_grad[1], given, u.reshape(-1, u.shape[-1]))


def _gradient(needed: bool, d: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient (out, in) of a matrix: d (rows, out) of its results, x (rows, in)."""
    return d.T @ x if needed and d is not None else None


def plain(linear: nn.Module) -> bool:
    """Whether a layer is nothing but a matrix, and nothing wants to see its calls."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and not is_traceable_wrapper_subclass(linear.weight)
        and _unwatched(linear)
    )


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear.weight, Tensor)
    return linear.weight


def _unwatched(module: nn.Module) -> bool:
    """Whether no hook would miss a call that isn't made."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a matrix product computes in: autocast's type, else the weight's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
