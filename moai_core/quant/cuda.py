"""int4 and int8 matrices on NVIDIA GPUs, by kernels of our own (moai_core/cuda/quant_linear.cu).

Few rows of x are multiplied by tensor cores that read the integers as they are stored, so that a token costs the time
of reading half a byte (or one) a weight; with many rows the matrix is decoded to x's type and cuBLAS multiplies.
Weights are never rounded in the first, and once, to x's type, in the second. What is stored row by row (formats.py) is
put into the kernel's order once, by `prepare`.

Beside the interface of kernels.py there is what a decoder wants in one launch: RMS norm, gate and up with their
product, the residual (`fused`), and an embedding's rows (`rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import cuda
from moai_core.quant import cuda_ops
from moai_core.quant.cuda_ops import TILE, TOGETHER, UNIT, Layout
from moai_core.quant.formats import Spec, unpack4

_BITS = {"int4": 4, "int8": 8}


class Prepared(NamedTuple):
    """A matrix in the kernel's order; see cuda_ops.py."""

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


def layout(spec: Spec, glu: bool = False) -> Layout:
    """What the bytes of a prepared matrix are."""
    groups = max(1, UNIT // spec.group_size) if spec.group_size else 0
    return Layout(_BITS[spec.format], groups, spec.format == "int4" and not spec.symmetric, glu)


def prepare(spec: Spec, tensors: Mapping[str, Tensor]) -> Prepared:
    """See kernels.py. tensors: as formats.py stores them."""
    rows = tensors["qweight"].shape[0]
    padded = -(-rows // (TILE * TOGETHER)) * TILE * TOGETHER
    # Rows g and g + 8 of a tile lie side by side.
    return _pack(spec, {name: _pad(t, padded).unflatten(0, (-1, 2, 8)) for name, t in tensors.items()}, False)


def prepare_pair(spec: Spec, gate: Mapping[str, Tensor], up: Mapping[str, Tensor]) -> Prepared:
    """gate and up of a SwiGLU as one matrix for `fused`; both of one shape."""
    rows = gate["qweight"].shape[0]
    padded = -(-rows // (8 * TOGETHER)) * 8 * TOGETHER
    both = {name: [_pad(one[name], padded).unflatten(0, (-1, 8)) for one in (gate, up)] for name in gate}
    return _pack(spec, {name: torch.stack(pair, dim=1) for name, pair in both.items()}, True)


def linear(spec: Spec, prepared: Prepared, x: Tensor, out: int) -> Tensor:
    """See kernels.py. Differentiable by x."""
    return cuda_ops.linear(x, *prepared, out, *layout(spec)[:3])


def fused(
    spec: Spec,
    prepared: Prepared,
    x: Tensor,
    out: int,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    pair: bool = False,
) -> Tensor:
    """x (M, I) -> (M, O) = residual + f(rms_norm(x) W^T), all in one launch up to `cuda_ops.DENSE_FROM` rows.

    norm: the norm's weight (I,) in the dtype of the arithmetic, with x in that or in fp32; None leaves x as it is.
    residual: (M, O), its dtype is the result's. pair: `prepared` is from `prepare_pair`, and f is silu(gate) up, else
    nothing. Has no gradient.
    """
    return cuda_ops.fused(x, *prepared, norm, residual, out, *layout(spec, pair), eps)


def decode(spec: Spec, prepared: Prepared, out: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The stored values (O, I), in fp32 bit for bit those of formats.py, else rounded once to `dtype`."""
    return cuda_ops.decode(*prepared, out, columns, *layout(spec), dtype)


def rows(spec: Spec, prepared: Prepared, ids: Tensor, out: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows ids (...) int64 of the matrix (O, I), as (..., I) in `dtype`."""
    y = cuda_ops.gather(ids.reshape(-1), *prepared, out, columns, *layout(spec)[:3], dtype)
    return y.reshape(*ids.shape, columns)


# ---- the kernel's order


def _pad(tensor: Tensor, rows: int) -> Tensor:
    return F.pad(tensor, (0, 0, 0, rows - tensor.shape[0])) if rows != tensor.shape[0] else tensor


def _pack(spec: Spec, tensors: Mapping[str, Tensor], glu: bool) -> Prepared:
    """tensors (tiles, 2, 8, ...): what rows g and g + 8 of a tile are."""
    kind = layout(spec, glu)
    q = tensors["qweight"]
    tiles, columns = q.shape[0], q.shape[-1] * (8 // kind.bits)
    units = -(-columns // UNIT)
    # Tile by tile, so that what is made in between stays small.
    weights = torch.empty(tiles, units, kind.part, dtype=torch.uint8, device=q.device)
    bulk = UNIT * TILE * kind.bits // 8
    step = max(1, (1 << 26) // (TILE * units * UNIT))
    for i in range(0, tiles, step):
        weights[i : i + step, :, :bulk] = _order(q[i : i + step], kind.bits, units)
    scales = torch.stack([tensors[name] for name in ("scales", "zeros")[: 1 + kind.zeros]], dim=1)
    if not kind.groups:  # (tiles, kinds, 2, 8, 1) -> (tiles, 8, kinds, 2)
        return Prepared(weights, scales[..., 0].permute(0, 3, 1, 2).flatten(2).contiguous())
    if spec.group_size > UNIT:
        scales = scales.repeat_interleave(spec.group_size // UNIT, dim=-1)
    scales = F.pad(scales, (0, units * kind.groups - scales.shape[-1])).unflatten(-1, (units, kind.groups))
    # (tiles, kinds, 2, 8, units, groups) -> (tiles, units, groups, 8, kinds, 2)
    weights[..., bulk:] = scales.permute(0, 4, 5, 3, 1, 2).reshape(tiles, units, -1).view(torch.uint8)
    return Prepared(weights, scales.new_empty(0))


def _order(q: Tensor, bits: int, units: int) -> Tensor:
    """qweight (tiles, 2, 8, bytes of a row) -> (tiles, units, bytes of a unit). Of 32 columns a lane has 8, in two
    steps of two pairs."""
    tiles = q.shape[0]
    if bits == 8:
        q = F.pad(q, (0, units * UNIT - q.shape[-1])).view(torch.uint8)
        # (tile, second, g, unit, 32 columns, lane, step, pair, of pair)
        q = q.reshape(tiles, 2, 8, units, 4, 4, 2, 2, 2)
        return q.permute(0, 3, 4, 2, 5, 6, 7, 8, 1).reshape(tiles, units, -1)
    codes = unpack4(q.flatten(0, 2)).unflatten(0, (tiles, 2, 8))
    codes = F.pad(codes, (0, units * UNIT - codes.shape[-1])).reshape(tiles, 2, 8, units, 2, 2, 4, 2, 2, 2)
    both = codes[:, 0] | codes[:, 1] << 4
    # (tile, g, unit, 64 columns, 32 columns, lane, step, pair, of pair)
    return both.permute(0, 2, 3, 1, 5, 4, 6, 8, 7).reshape(tiles, units, -1)
