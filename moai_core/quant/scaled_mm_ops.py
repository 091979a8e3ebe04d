"""The operator that rounds rows to e4m3 (moai_core/cuda/quant_rows.cu), and its definition in torch's own operations,
which gives the same bits and is what runs where the kernel can't.

    scales = max(max |x| / 448, 1e-12) by row;  codes = e4m3(x * (1 / scales))

Multiplied with reciprocals, not divided: torch divides by a number on GPUs that way and on processors not. NaN in a row
makes all of it NaN. Left out: rows of more than 32768 numbers in one pass (torch's operations do them).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.cuda.rows import WIDEST, division, vector
from moai_core.quant.fp8 import LARGEST

CODES = torch.float8_e4m3fn
# A row of zeros must not divide by zero; e4m3's own smallest number is larger by far.
_TINY = 1e-12


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, I) in bf16, fp16 or fp32 -> codes (M, I) e4m3, scales (M, 1) fp32. No gradient."""
    if x.dtype in cuda.TYPES and x.numel() and x.shape[1] <= WIDEST and cuda.why_not(x.device) is None:
        return quantize_rows(x)
    return definition(x)


def definition(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize`, in torch's own operations."""
    wide = x.float()
    scales = (wide.abs().amax(-1, keepdim=True) * (1 / LARGEST)).clamp(min=_TINY)
    return (wide * scales.reciprocal()).to(CODES), scales


def results(rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the codes (rows, columns) and scales (rows, 1) of rows, on the device of `like`."""
    return like.new_empty(rows, columns, dtype=CODES), like.new_empty(rows, 1, dtype=torch.float32)


@lru_cache(maxsize=256)
def kernel(name: str, device: torch.device, size: int, v: int, **types: torch.dtype) -> tuple[cuda.Kernel, int, int]:
    """(kernel, rows of a block, threads of a block) of quant_rows.cu for rows of `size` values in vectors of v. types:
    R, X and W there; what a kernel has none of is bf16."""
    sizes, together, block = division(size, v)
    chosen = {key: cuda.TYPES[types.get(key, torch.bfloat16)] for key in "RXW"}
    return cuda.kernel("quant_rows.cu", name, device, **chosen, **sizes), together, block


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, size = x.shape
    codes, scales = results(rows, size, x)
    v = vector(size, x, most=8)
    run, together, block = kernel("quantize_rows", x.device, size, v, X=x.dtype)
    run(-(-rows // together), block, x, codes.view(torch.uint8), scales, rows, x.stride(0))
    return codes, scales


quantize_rows = ops.define(
    "quantize_rows(Tensor x) -> (Tensor, Tensor)", _quantize_rows, lambda x: results(x.shape[0], x.shape[1], x)
)
