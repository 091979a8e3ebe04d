"""Products for 2 to 64 rows on Hopper that end in what stands behind them: how `cuda/decode_stream.cu` is launched.

A block has all of K for a few rows of a weight, and x streams by beside it, in the order in which tensor cores want it
("arranged", cuda/decode.cuh): the kernel in front leaves it so. Nothing is summed up in memory then: gate and up end in
silu, in_proj in the convolution's step and x_proj's products. Where K is long and rows are few (out_proj, down) slices
of K leave sums, which the next norm adds. Slices depend on the weight's shape alone, and so do a row's bits. Left out
is what decode_kernels.in_whole_chunks leaves out, and weights of fewer than 1024 rows or of no multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation import decode_wide
from moai_core.generation.decode_kernels import Launch, Matrix, in_whole_chunks, multiprocessors, shared_memory
from moai_core.generation.decode_weights import Layer, Rotation

# Chunks that come together, 256 bytes of a row. Weights of fewer rows leave too many tiles empty.
UNIT, LEAST_ROWS = 4, 1024
# Rows of a weight that a block of `sums` takes.
SUM_SHARE = 128
_VECTORS = {"Plain": 1, "Int8": 2, "Fp8": 2, "Int4": 4}


def rings(m: Matrix, end: str, tiles: int) -> tuple[int, int, int]:
    """(units of a block's W, stages of x, units of a team on their way), timed on an H100 with 8 and 64 rows: a ring of
    W that is larger than what is on its way fills while the kernels in front go on, and holds up nothing else."""
    many, plain = tiles == 8, m.format == "Plain"
    if plain:
        units = {"CONV": 8 if many else 10, "GATE": 7 if many else 6, "SUMS": 5 if many else 4}[end]
        stages = {8: 4 if end == "CONV" else 3, 4: 6 if end == "SUMS" else 8}.get(tiles, 8 if end == "SUMS" else 16)
    else:
        units, stages = {"CONV": 4, "GATE": 3 if many else 4, "SUMS": 2}[end], 4 if many else 8
    return units, stages, (3 if end == "CONV" else 2) - (not plain)


def takes(m: Matrix, dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies x of `dtype` with this weight."""
    if not in_whole_chunks(m, dtype) or m.rows < LEAST_ROWS or m.rows % 8:
        return False
    return torch.cuda.get_device_capability(m.weight.device) == (9, 0) and shared_memory(m.weight.device) >= 227 << 10


def takes_convolution(in_proj: Matrix, x_proj: Matrix, config: Any, dtype: torch.dtype) -> bool:
    """Whether in_proj, the convolution's step and x_proj are one kernel."""
    whole = config.inner_size % 64 == 0 and config.time_step_rank % 32 == 0 and x_proj.format == "Plain"
    return whole and takes(in_proj, dtype)


def takes_all(layers: Sequence[Layer], config: Any, dtype: torch.dtype) -> bool:
    """Whether all large products of a model are these: then they are fast with few rows too."""

    def takes_layer(one: Layer) -> bool:
        products = [m for m in (one.out_proj, one.gate, one.down) if m is not None]
        return takes_convolution(one.in_proj, one.x_proj, config, dtype) and all(takes(m, dtype) for m in products)

    return all(takes_layer(one) for one in layers)


def padded(width: int) -> int:
    """Rows of an arranged x."""
    return 8 * _tiles(width)


def arrangement_for(m: Matrix, rotation: Rotation | None, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """How the kernel in front of `sums` arranges its x; (0, 0) where other kernels stand between or behind."""
    return arrangement(m if rotation is None and takes(m, dtype) else None, width)


def arrangement(m: Matrix | None, width: int) -> tuple[int, int]:
    """(tiles of 8 rows, times that a number of this weight has fewer bits than 16): how x is arranged; (0, 0): not."""
    return (0, 0) if m is None else (_tiles(width), _VECTORS[m.format])


def gates(gate: Matrix, up: Matrix, x: Tensor, out: Tensor, width: int, how: tuple[int, int] = (0, 0)) -> Launch:
    """out (M, O): silu(gate x) up x; x (K, M) arranged for `gate`."""
    share = -(-gate.rows // multiprocessors(gate.weight.device))
    sizes = (0, 0, 2, 0)
    return _launch(gate, up, x, out, "GATE", min(64, -(-share // 8) * 8), (None,) * 8, sizes, width, how=how)


def slice_of(m: Matrix) -> int:
    """Chunks of a slice of K: whole units."""
    return -(-decode_wide.slice_of(m) // UNIT) * UNIT


def slices_of(m: Matrix) -> int:
    """In how many parts `sums` leaves a product."""
    return -(-m.chunks // slice_of(m))


def sums(m: Matrix, x: Tensor, found: Tensor) -> Launch:
    """found (slices, M, O) fp32: sums of x (K, M) arranged for `m`."""
    width = found.shape[1]
    return _launch(m, None, x, x, "SUMS", SUM_SHARE, (*(None,) * 7, found), (0, 0, 2, 0), width, slice=slice_of(m))


def convolution(
    in_proj: Matrix, x: Tensor, conv: tuple[Tensor | None, ...], x_proj: Matrix, windows: tuple[Tensor, Tensor],
    u: Tensor, z: Tensor, found: Tensor, config: Any,
) -> Launch:  # fmt: skip
    """u, z (M, I) and sums of x_proj for each 64 channels, found (I / 64, M, R + 2 N) fp32; x (K, M) arranged for
    `in_proj`; conv: weight, bias, scale; windows: this step's and the next."""
    sizes = (config.state_size, config.time_step_rank, config.conv_kernel_size, config.inner_size)
    behind = (*conv, x_proj.weight, *windows, z, found)
    return _launch(in_proj, None, x, u, "CONV", 64, behind, sizes, len(u))


def _tiles(width: int) -> int:
    return next(n for n in (1, 2, 4, 8) if width <= 8 * n)


def _launch(
    m: Matrix, second: Matrix | None, x: Tensor, out: Tensor, end: str, share: int,
    pointers: tuple[Tensor | None, ...], sizes: tuple[int, int, int, int], width: int,
    *, slice: int = 0, how: tuple[int, int] = (0, 0),
) -> Launch:  # fmt: skip
    """share: rows (GATE: pairs) of a block; pointers, sizes: what CONV has besides."""
    scale = torch.float32 if m.scales is None else m.scales.dtype
    tiles, warps = _tiles(width), -(-share // (8 if end == "GATE" else 16))
    depth, stages, flight = rings(m, end, tiles)
    teams, kept, unit = -(-warps // 4), stages * 2048 * tiles, warps * UNIT * 16 * (68 if m.group else 64)
    depth = min(depth, (shared_memory(m.weight.device) - 2048 - kept) // unit)
    macros: dict[str, str | int] = {
        "T": cuda.TYPES[out.dtype], "NT": tiles, "DEPTH": depth, "FLIGHT": min(flight, depth), "UNIT": UNIT,
        "XDEPTH": stages, "TEAMS": teams, "SHARE": share, "CHUNKS": m.chunks,
        "SLICE": slice or -(-m.chunks // UNIT) * UNIT, "END": end, "N": sizes[0], "RANK": sizes[1], "KC": sizes[2],
        "WEIGHT": f"{m.format},{cuda.TYPES[scale]},{m.group}",
    }  # fmt: skip
    kernel = cuda.kernel("decode_stream.cu", "decode_stream", m.weight.device, **macros)
    others = (None, None) if second is None else (second.weight, second.scales)
    args = (
        m.weight, others[0], m.scales, others[1], x, out, *pointers, m.rows, width, sizes[3], *how,
    )  # fmt: skip
    block = 32 * (4 * teams + (8 if end == "CONV" else 1 + teams))
    grid = (-(-m.rows // share), -(-m.chunks // slice) if slice else 1, 1)
    return Launch(kernel, grid, block, args, kept + depth * unit)
