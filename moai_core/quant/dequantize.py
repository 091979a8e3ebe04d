"""The exact multiplication: the stored values as numbers of x's type, then an ordinary matrix product.

It works for every format on every device and is what the others are compared with. It is slow where one token is
decoded (every weight is written out and read again), so nobody gets it without being told (kernels.describe). On an
NVIDIA GPU the values of most formats are made by one kernel (moai_core/cuda/dequantize.cu), whose pass over memory is
small beside a product with many rows; elsewhere by torch's operations. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.quant.bnb import Nf4
from moai_core.quant.formats import FORMATS, Spec
from moai_core.quant.fp4 import powers

# What the kernel calls the formats' codes.
_CODES = {"int4": 0, "int8": 1, "fp8": 2, "nvfp4": 3, "mxfp4": 3, "nf4": 4, "nf4_double": 4}
_AT_ONCE = 8
_LARGEST = 1 << 34  # numbers of a matrix: the kernel counts eights in 32 bits


def why_not(spec: Spec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Never refuses."""
    return None


def describe(spec: Spec, device: torch.device, dtype: torch.dtype) -> str:
    """For `doctor` and reports."""
    return f"exact: {spec.format} decoded at each call, then a product in {str(dtype).removeprefix('torch.')}"


def prepare(spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are."""
    return dict(tensors)


def linear(spec: Spec, prepared: Mapping[str, Tensor], x: Tensor, out: int) -> Tensor:
    """x (M, I) -> (M, O), in x's dtype."""
    return F.linear(x, decoded(spec, prepared, x.dtype))


def decoded(spec: Spec, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The stored values (O, I), in fp32 exactly, else rounded once to `dtype`. tensors: as the format stores them."""
    codes = tensors["qweight"]
    rows, columns = codes.shape[0], codes.shape[1] * 8 // FORMATS[spec.format].bits
    known = spec.format in _CODES and dtype in cuda.TYPES and 0 < rows * columns < _LARGEST
    if not known or cuda.why_not(codes.device) is not None:
        return FORMATS[spec.format].decode(spec, tensors).to(dtype)
    scales = _scales(spec, tensors)
    if columns // scales.shape[1] % _AT_ONCE:
        return FORMATS[spec.format].decode(spec, tensors).to(dtype)
    zeros = tensors["zeros"].float() if "zeros" in tensors else None
    return dequantize(codes.contiguous().view(torch.uint8), scales, zeros, columns, _CODES[spec.format], dtype)


def _scales(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
    """(O, groups) fp32, with the roundings of the format's own decoding."""
    if spec.format == "nvfp4":
        return tensors["scales"].float() * tensors["scale"]
    if spec.format == "mxfp4":
        return powers(tensors["scales"])
    known = FORMATS[spec.format]
    return known.scales(tensors) if isinstance(known, Nf4) else tensors["scales"].float()


def _dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, columns: int, kind: int, dtype: torch.dtype
) -> Tensor:
    y = codes.new_empty(codes.shape[0], columns, dtype=dtype)
    run = cuda.kernel(
        "dequantize.cu", "dequantize", codes.device, T=cuda.TYPES[dtype], CODE=kind, ZEROS=int(zeros is not None)
    )
    count, group = y.numel() // _AT_ONCE, columns // scales.shape[1] // _AT_ONCE
    zeros = None if zeros is None else zeros.contiguous()
    run(-(-count // 1024), 256, codes, scales.contiguous(), zeros, y, count, group)
    return y


dequantize = ops.define(
    "dequantize(Tensor codes, Tensor scales, Tensor? zeros, int columns, int kind, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda codes, scales, zeros, columns, kind, dtype: codes.new_empty(codes.shape[0], columns, dtype=dtype),
)


# ---- the other way: gradients of what the numbers are made with


def gradients(
    gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int
) -> tuple[Tensor, Tensor | None] | None:
    """(d_scales, d_zeros) (O, I/g) fp32 of an int4 matrix, from the gradient of its values (O, I) in any type that
    kernels know. scales and zeros (O, I/g) fp32, zeros None where not trained. None where the kernel can't do it.
    """
    team = group // _AT_ONCE
    if team not in (4, 8, 16, 32) or gradient.dtype not in cuda.TYPES or cuda.why_not(gradient.device) is not None:
        return None
    d_scales, d_zeros = scale_gradients(gradient.contiguous(), codes.contiguous(), scales, zeros, team)
    return d_scales, None if zeros is None else d_zeros


def _scale_gradients(
    gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, team: int
) -> tuple[Tensor, Tensor]:
    d_scales, d_zeros = ops.dense(scales), scales.new_empty(0) if zeros is None else ops.dense(zeros)
    types = {"T": cuda.TYPES[gradient.dtype], "TEAM": team, "ZEROS": int(zeros is not None)}
    run = cuda.kernel("scale_gradients.cu", "scale_gradients", gradient.device, **types)
    count = gradient.numel() // _AT_ONCE
    other = None if zeros is None else zeros.contiguous()
    run(-(-count // 1024), 256, gradient, codes, scales.contiguous(), other, d_scales, d_zeros, count)
    return d_scales, d_zeros


scale_gradients = ops.define(
    "scale_gradients(Tensor gradient, Tensor codes, Tensor scales, Tensor? zeros, int team) -> (Tensor, Tensor)",
    _scale_gradients,
    lambda gradient, codes, scales, zeros, team: (
        ops.dense(scales),
        scales.new_empty(0) if zeros is None else ops.dense(zeros),
    ),
)
