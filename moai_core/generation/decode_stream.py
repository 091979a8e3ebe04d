"""Products for wide batches on Hopper that end in what stands behind them: how `cuda/decode_stream.cu` is launched.

A block has all of K for a few rows of a weight, and x streams by beside it, in the order in which tensor cores want it
("arranged", cuda/decode.cuh): the norm in front leaves it so. Nothing is summed up in memory then: gate and up end in
silu, in_proj in the convolution's step and x_proj's products. Left out: products whose K is long and whose rows are few
(out_proj, down), and what decode_wide.py leaves out; for those it has products in slices of K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation.decode_kernels import Launch, Matrix, in_whole_chunks, multiprocessors, shared_memory

# Chunks that come together, 256 bytes of a row. Weights of fewer rows leave too many tiles empty.
UNIT, LEAST_ROWS = 4, 1024
_VECTORS = {"Plain": 1, "Int8": 2, "Fp8": 2, "Int4": 4}


def rings(m: Matrix, end: str) -> tuple[int, int]:
    """(units of W, stages of x) that a block has room for, timed: with more of one the other comes too late."""
    if m.format == "Plain":
        return (4, 6) if end == "CONV" else (4, 4)
    return (5, 8) if end == "CONV" else (5, 6)


def takes(m: Matrix, dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies x of `dtype` with this weight."""
    if not in_whole_chunks(m, dtype) or m.rows < LEAST_ROWS or m.rows % 8:
        return False
    return torch.cuda.get_device_capability(m.weight.device) == (9, 0) and shared_memory(m.weight.device) >= 227 << 10


def takes_convolution(in_proj: Matrix, x_proj: Matrix, config: Any, dtype: torch.dtype) -> bool:
    """Whether in_proj, the convolution's step and x_proj are one kernel."""
    whole = config.inner_size % 64 == 0 and config.time_step_rank % 32 == 0 and x_proj.format == "Plain"
    return whole and takes(in_proj, dtype)


def arrangement(m: Matrix | None, width: int) -> tuple[int, int]:
    """(tiles of 8 rows, times that a number of this weight has fewer bits than 16): how x is arranged; (0, 0): not."""
    return (0, 0) if m is None else (_tiles(width), _VECTORS[m.format])


def gates(gate: Matrix, up: Matrix, x: Tensor, out: Tensor) -> Launch:
    """out (M, O): silu(gate x) up x; x (K, M) arranged for `gate`."""
    share = -(-gate.rows // multiprocessors(gate.weight.device))
    return _launch(gate, up, x, out, "GATE", min(64, -(-share // 8) * 8), (None,) * 8, (0, 0, 2, 0))


def convolution(
    in_proj: Matrix, x: Tensor, conv: tuple[Tensor | None, ...], x_proj: Matrix, windows: tuple[Tensor, Tensor],
    u: Tensor, z: Tensor, found: Tensor, config: Any,
) -> Launch:  # fmt: skip
    """u, z (M, I) and sums of x_proj for each 64 channels, found (I / 64, M, R + 2 N) fp32; x (K, M) arranged for
    `in_proj`; conv: weight, bias, scale; windows: this step's and the next."""
    sizes = (config.state_size, config.time_step_rank, config.conv_kernel_size, config.inner_size)
    return _launch(in_proj, None, x, u, "CONV", 64, (*conv, x_proj.weight, *windows, z, found), sizes)


def _tiles(width: int) -> int:
    return next(n for n in (2, 4, 8) if width <= 8 * n)


def _launch(
    m: Matrix, second: Matrix | None, x: Tensor, out: Tensor, end: str, share: int,
    pointers: tuple[Tensor | None, ...], sizes: tuple[int, int, int, int],
) -> Launch:  # fmt: skip
    """share: rows (GATE: pairs) of a block; pointers, sizes: what CONV has besides."""
    scale = torch.float32 if m.scales is None else m.scales.dtype
    width, (depth, stages) = out.shape[0], rings(m, end)
    tiles, warps = _tiles(width), -(-share // (8 if end == "GATE" else 16))
    teams, kept, unit = -(-warps // 4), stages * 2048 * tiles, warps * UNIT * 16 * (68 if m.group else 64)
    depth = min(depth, (shared_memory(m.weight.device) - 1024 - kept) // unit)
    macros: dict[str, str | int] = {
        "T": cuda.TYPES[out.dtype], "NT": tiles, "DEPTH": depth, "UNIT": UNIT, "XDEPTH": stages, "TEAMS": teams,
        "END": end, "N": sizes[0], "RANK": sizes[1], "KC": sizes[2],
        "WEIGHT": f"{m.format},{cuda.TYPES[scale]},{m.group}",
    }  # fmt: skip
    kernel = cuda.kernel("decode_stream.cu", "decode_stream", m.weight.device, **macros)
    others = (None, None) if second is None else (second.weight, second.scales)
    args = (
        m.weight, others[0], m.scales, others[1], x, out, *pointers, m.rows, m.row_bytes,
        1 if m.scales is None else m.scales.shape[1], (m.group // 128).bit_length() - 1 if m.group else 0, width, share,
        sizes[3],
    )  # fmt: skip
    block = 32 * (4 * teams + (8 if end == "CONV" else 1))
    return Launch(kernel, -(-m.rows // share), block, args, kept + depth * unit)
