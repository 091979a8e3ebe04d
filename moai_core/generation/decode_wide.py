"""Products for wide batches: how `cuda/decode_wide.cu` is launched.

It leaves sums of slices of K, which the kernel behind adds: of in_proj the convolution's step, of x_proj the norms, of
gate and up silu, of out_proj and down the next norm. Slices depend on the weight's shape alone, and so do a row's bits.
Left out: zero points, groups of other than 128, 256, ... columns, rows of no whole number of 64 bytes, for which
decode_kernels.py has a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation.decode_kernels import (
    CHUNK_BYTES,
    THREADS,
    WARPS,
    Launch,
    Matrix,
    multiprocessors,
    shared_memory,
)

# Bytes of x that a block keeps, of 64 rows; the rest of its shared memory is rings.
KEPT = 128 << 10
LEAST_DEPTH, MOST_DEPTH = 4, 24
# A weight of so few rows is cut into more slices, or most multiprocessors had none.
_FEW_ROWS, _MOST_SLICES = 1024, 16
# What it was seen to be right with on a GPU; the kernel has code for float16, "Int8" and "Fp8" too.
FORMATS, TYPES = ("Plain", "Int4"), (torch.bfloat16,)
_VECTORS = {"Plain": 1, "Int8": 2, "Fp8": 2, "Int4": 4}


def fits(m: Matrix, dtype: torch.dtype) -> bool:
    """Whether the kernel takes this weight for x of `dtype`."""
    whole = dtype in TYPES and m.row_bytes % CHUNK_BYTES == 0 and m.zeros is None
    shared = m.group == 0 or (m.format == "Int4" and m.group % 128 == 0 and m.group & (m.group - 1) == 0)
    return whole and shared and m.format in FORMATS and _division(m, 64)[1] >= LEAST_DEPTH


def slices_of(m: Matrix) -> int:
    """In how many parts K is summed."""
    return -(-m.chunks // _slice(m))


def _slice(m: Matrix) -> int:
    """Chunks of a slice."""
    most = max(1, KEPT // (4096 * _VECTORS[m.format]))
    parts = -(-m.chunks // most)
    if m.rows <= _FEW_ROWS:
        parts = max(parts, min(_MOST_SLICES, m.chunks))
    return -(-m.chunks // parts)


def _division(m: Matrix, rows: int) -> tuple[int, int, int]:
    """(NT, depth of the rings, bytes of shared memory)."""
    nt = next(n for n in (2, 4, 8) if rows <= 8 * n)
    kept = _slice(m) * nt * _VECTORS[m.format] * 512
    stage = WARPS * 16 * (68 if m.group else 64)
    depth = min(MOST_DEPTH, (shared_memory(m.weight.device) - 1024 - kept) // stage) // 2 * 2
    return nt, depth, kept + depth * stage


def product(m: Matrix, x: Tensor, sums: Tensor, *, second: Matrix | None = None) -> Launch:
    """sums (slices, M, O) fp32 of x (M, K), 1 to 64 rows; with a second weight of the same shape (slices, M, 2 O)."""
    nt, depth, shared = _division(m, x.shape[0])
    slices = slices_of(m)
    scale = torch.float32 if m.scales is None else m.scales.dtype
    weight = f"{m.format},{cuda.TYPES[scale]},{m.group}"
    kernel = cuda.kernel(
        "decode_wide.cu", "decode_wide", m.weight.device, T=cuda.TYPES[x.dtype], NT=nt, DEPTH=depth, WEIGHT=weight
    )
    tiles = -(-m.rows // 16) * (1 if second is None else 2)
    shares = max(1, min(tiles, multiprocessors(m.weight.device) // slices))
    others = (None, None) if second is None else (second.weight, second.scales)
    args = (
        m.weight, others[0], m.scales, others[1], x, sums, m.rows, m.columns, m.row_bytes,
        1 if m.scales is None else m.scales.shape[1], (m.group // 128).bit_length() - 1 if m.group else 0, slices,
        _slice(m), x.shape[0],
    )  # fmt: skip
    return Launch(kernel, slices * shares, THREADS, args, shared)
