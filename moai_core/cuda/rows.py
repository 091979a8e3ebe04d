"""How kernels divide rows of numbers among threads: what the host decides for rows.cuh and what stands on it.

    division(size, v)              sizes as macros of rows.cuh, rows of a block, threads of a block
    vector(size, *tensors)         numbers that a thread moves at once
    apart(x)                       x with rows that a kernel can read, and their distance
    summands(residual, x, weight)  the same for a residual stream, what is added to it and its norm's weight

Two kernels that must give the same bits divide their rows the same way, so they ask the same functions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# What one row may have: a block holds it in registers.
WIDEST = 32768


@lru_cache(maxsize=256)
def division(size: int, v: int) -> tuple[dict[str, int], int, int]:
    """(SIZE, V, TEAM and PER of rows.cuh, rows of a block, threads of a block) for rows of `size` values in vectors of
    v. A team is a power of two up to a warp, or whole warps.
    """
    vectors = -(-size // v)
    if vectors <= 32:
        team = 1 << (vectors - 1).bit_length()
    else:  # two vectors a thread: loads under way enough with few threads to meet at the barrier
        team = min(512 if vectors <= 2048 else 1024, 32 * -(-vectors // 64))
    block = team if team > 32 else 128
    return {"SIZE": size, "V": v, "TEAM": team, "PER": -(-vectors // team)}, block // team, block


def vector(size: int, *tensors: Tensor | None, most: int = 4) -> int:
    """Values that a thread moves at once, a power of two: `most`, or 8 where one of the tensors has 16-bit values,
    fewer where a row's size, the distance of rows or an address doesn't allow it. Kernels move 16 bytes at a time.
    """
    steps = size
    for t in tensors:
        if t is None:
            continue
        width, past = t.element_size(), t.data_ptr() & 15
        if width == 2 and most == 4:
            most = 8
        if t.dim() > 1 and t.shape[-2] > 1:
            steps |= t.stride(-2)
        if past:
            steps |= (past & -past) // width
    return min(most, steps & -steps)


def apart(x: Tensor) -> tuple[Tensor, int]:
    """x (..., size) with the values of a row side by side, and how many values apart its rows begin. Copies only where
    it must."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def summands(residual: Tensor, x: Tensor | None, weight: Tensor) -> tuple[Tensor, int, Tensor | None, int, int]:
    """(residual, its rows' distance, x, its rows' distance, v) as sum_row of rows.cuh reads them: residual and x (...,
    size), x None where nothing is added; weight (size,) contiguous.

    x has no say in how a row is divided: the norm made again from the stored sum must have the same bits.
    """
    rows, distance = apart(residual)
    v = vector(weight.shape[0], rows, weight)
    if x is None:
        return rows, distance, None, distance, v
    x, x_distance = apart(x)
    if vector(weight.shape[0], x) < min(v, 16 // x.element_size()):
        x, x_distance = x.clone(memory_format=torch.contiguous_format), weight.shape[0]
    return rows, distance, x, x_distance, v


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
