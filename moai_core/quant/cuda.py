"""int4 and int8 matrices on NVIDIA GPUs, by kernels of our own (moai_core/cuda/quant_*.cu).

Few rows of x are multiplied by tensor cores that read the integers as they are stored (formats.py), so that a token
costs the time of reading half a byte (or one) a weight; with many rows the matrix is decoded to x's type and cuBLAS
multiplies. Weights are never rounded in the first, and once, to x's type, in the second. Only scales are put into an
order of their own, once, by `prepare`: a matrix is in memory once, whoever else reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import cuda
from moai_core.quant import cuda_ops
from moai_core.quant.cuda_ops import TILE, UNIT, Layout
from moai_core.quant.formats import Spec

_BITS = {"int4": 4, "int8": 8}


class Prepared(NamedTuple):
    """A matrix as the kernels read it; see cuda_ops.py."""

    weights: Tensor
    scales: Tensor


def why_not(spec: Spec, device: torch.device, dtype: torch.dtype) -> str | None:
    """See kernels.py."""
    if spec.format not in _BITS:
        return f"it multiplies int4 and int8 matrices, not {spec.format}"
    if dtype not in cuda.TYPES:
        return f"it takes bf16, fp16 and fp32, not {str(dtype).removeprefix('torch.')}"
    if spec.group_size not in (0, 32, 64) and spec.group_size % UNIT:
        return f"it knows groups of 32, 64, 128 and multiples of 128, not of {spec.group_size}"
    return cuda.why_not(device)


def describe(spec: Spec, device: torch.device, dtype: torch.dtype) -> str:
    """See kernels.py."""
    group = f"groups of {spec.group_size}" if spec.group_size else "a scale a row"
    return f"cuda ({spec.format}, {group}: tensor cores up to {cuda_ops.DENSE_FROM - 1} rows, then decoded for cuBLAS)"


def layout(spec: Spec) -> Layout:
    """What the bytes of a matrix are."""
    groups = max(1, UNIT // spec.group_size) if spec.group_size else 0
    return Layout(_BITS[spec.format], groups, spec.format == "int4" and not spec.symmetric)


def prepare(spec: Spec, tensors: Mapping[str, Tensor]) -> Prepared:
    """See kernels.py. tensors: as formats.py stores them; the weights are not copied where rows are multiples of 16
    bytes, as those of models are."""
    weights, kind = tensors["qweight"].view(torch.uint8), layout(spec)
    units = -(-weights.shape[1] * 8 // (UNIT * kind.bits))
    if weights.shape[1] % 16 or weights.data_ptr() % 16 or not weights.is_contiguous():
        weights = F.pad(weights, (0, -weights.shape[1] % 16)).clone(memory_format=torch.contiguous_format)
    scales = torch.stack([tensors[name] for name in ("scales", "zeros")[: 1 + kind.zeros]])
    # Rows g and g + 8 of a tile lie side by side: (kinds, tiles, 2, 8, groups).
    scales = F.pad(scales, (0, 0, 0, -scales.shape[1] % TILE)).unflatten(1, (-1, 2, 8))
    if kind.groups:
        if spec.group_size > UNIT:
            scales = scales.repeat_interleave(spec.group_size // UNIT, dim=-1)
        scales = F.pad(scales, (0, units * kind.groups - scales.shape[-1])).unflatten(-1, (units, kind.groups))
        scales = scales.permute(1, 4, 5, 3, 0, 2)  # (tiles, units, groups, 8, kinds, 2)
    else:
        scales = scales[..., 0].permute(1, 3, 0, 2)  # (tiles, 8, kinds, 2)
    scales = scales.contiguous()
    cuda_ops.settle(scales)
    return Prepared(weights, scales)


def linear(spec: Spec, prepared: Prepared, x: Tensor, out: int) -> Tensor:
    """See kernels.py. Differentiable by x."""
    return cuda_ops.linear(x, *prepared, out, *layout(spec))


def values(spec: Spec, prepared: Prepared, out: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See kernels.py. In fp32 bit for bit those of formats.py, else rounded once to `dtype`."""
    return cuda_ops.decode(*prepared, out, columns, *layout(spec), dtype)
