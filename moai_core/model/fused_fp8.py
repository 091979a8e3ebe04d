"""What stands before an fp8 product, with its rounding to e4m3 in the same pass: RMSNorm of the residual stream's sum,
SwiGLU's product. The numbers are those of fused.py rounded as moai_core/quant/scaled_mm_ops.py does, bit for bit.

    ready(layers, *inputs) -> whether these layers all multiply e4m3, and nobody wants a gradient
    add_rms_norm(residual, x, weight, eps) -> (residual + x, the norm of that, quantized)
    swiglu(gate, up) -> silu(gate) * up, quantized

A value then costs a byte on its way to the tensor cores where it would have cost five (written, read, written as a
code, read). Only forward: who trains takes fused.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.cuda.rows import WIDEST, summands, vector
from moai_core.quant import kernels, scaled_mm, scaled_mm_ops
from moai_core.quant.linear import QuantLinear
from moai_core.quant.scaled_mm import Quantized


def ready(layers: Sequence[nn.Module], *inputs: Tensor | None) -> bool:
    """Whether `layers` all multiply e4m3 where they get what is made of `inputs`, the last of which has its type."""
    if not all(type(layer) is QuantLinear and layer.spec.format == "fp8" for layer in layers):
        return False
    given = [t for t in inputs if t is not None]
    last = given[-1]
    if not given[0].numel() or any(t.dtype not in cuda.TYPES for t in given):
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return False
    return all(_takes(layer, last.device, last.dtype) for layer in layers)


def _takes(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Layers that are hooked or rotate their inputs want to see them as they are."""
    if (
        layer.rotation is not None
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer.in_features % scaled_mm.ALIGNED
    ):
        return False
    if layer.in_features > WIDEST or cuda.why_not(device) is not None:
        return False
    return kernels.pick(layer.spec, device, dtype, layer.kernel) is scaled_mm


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Quantized]:
    """As fused.add_rms_norm, in a type that `scaled_mm` knows: residual (..., H), x (..., H) or None, weight (H,)."""
    wide = residual if x is None else residual.to(torch.promote_types(residual.dtype, x.dtype))
    total, codes, scales = norm_quantize(wide, x, weight, eps)
    return (residual if x is None else total), Quantized(codes, scales, residual.shape, weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Quantized:
    """As fused.swiglu: gate, up (..., I) of one type."""
    codes, scales = swiglu_quantize(gate, up)
    return Quantized(codes, scales, gate.shape, gate.dtype)


# ---- the operators: what they launch


def _norm_quantize(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total, codes, scales); total is empty where nothing is added. The row is divided as norm.cu divides it."""
    total = residual.new_empty(0) if x is None else ops.dense(residual)
    weight = weight.contiguous()
    rows, distance, x, x_distance, v = summands(residual, x, weight)
    size, added, out = weight.shape[0], rows if x is None else x, None if x is None else total
    count = residual.numel() // size
    codes, scales = scaled_mm_ops.results(count, size, residual)
    types = {"R": rows.dtype, "X": added.dtype, "W": weight.dtype}
    run, together, block = scaled_mm_ops.kernel("norm_quantize", rows.device, size, v, **types)
    made = (out, codes.view(torch.uint8), scales)
    run(-(-count // together), block, rows, x, weight, *made, count, distance, x_distance, eps)
    return total, codes, scales


def _swiglu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    size = gate.shape[-1]
    count = gate.numel() // size
    codes, scales = scaled_mm_ops.results(count, size, gate)
    v = vector(size, gate, up)
    run, together, block = scaled_mm_ops.kernel("swiglu_quantize", gate.device, size, v, X=gate.dtype)
    run(-(-count // together), block, gate, up, codes.view(torch.uint8), scales, count)
    return codes, scales


norm_quantize = ops.define(
    "norm_quantize(Tensor residual, Tensor? x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _norm_quantize,
    lambda residual, x, weight, eps: (
        residual.new_empty(0) if x is None else ops.dense(residual),
        *scaled_mm_ops.results(residual.numel() // weight.shape[0], weight.shape[0], residual),
    ),
)
swiglu_quantize = ops.define(
    "swiglu_quantize(Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_quantize,
    lambda gate, up: scaled_mm_ops.results(gate.numel() // gate.shape[-1], gate.shape[-1], gate),
)
