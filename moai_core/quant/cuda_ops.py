"""The kernels for integer matrices as operators of PyTorch: how their work is divided, what they launch.

A matrix comes as two tensors (`moai_core.quant.cuda.prepare`; see quant.cuh):

    weights (O, bytes) uint8               as formats.py stores it, rows of a multiple of 16 bytes
    scales  (tiles, units, …) fp16         of 16 rows (a tile) by 128 columns (a unit); (tiles, …) of whole rows

`Layout` says what the bytes are. Nothing here waits for the GPU or allocates but through PyTorch, so a CUDA graph can
hold all of it. The matrix is constant; the gradient is that of x.

Launches overlap where GPU and driver can (compute capability 9.0, CUDA 12.4): a kernel reads weights, and nothing else,
while the one in front still runs. Whoever writes weights has them finished before a product is launched (`settle`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from moai_core import cuda
from moai_core.cuda import ops

# As in the kernels: columns of a unit, rows of a tile.
UNIT, TILE = 128, 16
# Of so many rows of x quant_linear.cu reads W once, if shared memory holds them; with more quant_tiles.cu multiplies.
FEW = 16
# With so many rows of x or more the matrix is decoded to x's type, for cuBLAS to multiply with.
DENSE_FROM = 129

_SHARED_OF_BLOCK = 1 << 10  # what CUDA itself takes of a block's shared memory


class Layout(NamedTuple):
    """bits: 4 or 8; groups: scales of a row of a unit, 0 for one of the whole row; zeros: with zero points."""

    bits: int
    groups: int
    zeros: bool

    @property
    def part(self) -> int:
        """Bytes of a tile's unit, scales included."""
        return TILE * UNIT * self.bits // 8 + self.scales

    @property
    def scales(self) -> int:
        """Bytes of a tile's unit's scales."""
        return self.groups * 2 * TILE * (1 + self.zeros)


class Shape(NamedTuple):
    """What a division is made for: m rows of x, of `itemsize` bytes a number in arithmetic; tiles and units of W."""

    m: int
    tiles: int
    units: int
    itemsize: int
    layout: Layout


class Gpu(NamedTuple):
    """What a division has to know: multiprocessors, bytes of shared memory of one and of a block, whether blocks can
    work in clusters."""

    multiprocessors: int
    shared: int
    shared_of_block: int
    clusters: bool


@lru_cache(maxsize=64)
def gpu(index: int | None) -> Gpu:
    """The GPU of this index, in short."""
    p = torch.cuda.get_device_properties(torch.device("cuda", index) if index is not None else torch.device("cpu"))
    of_block: int = p.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(
        p.multi_processor_count, p.shared_memory_per_multiprocessor, of_block, index is not None and p.major >= 9
    )


@lru_cache(maxsize=64)
def overlaps(index: int | None) -> bool:
    """Whether launches may overlap on this GPU, and its driver can record them."""
    return index is not None and torch.cuda.get_device_capability(index) >= (9, 0) and cuda.driver.version() >= (12, 4)


def settle(tensor: Tensor) -> None:
    """Waits until what was written to `tensor` is there for a kernel that doesn't wait for the one in front."""
    if overlaps(tensor.device.index) and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(tensor.device).synchronize()


# ---- few rows


class Plan(NamedTuple):
    """A division of quant_linear.cu's work; see there. The kernel is compiled for `blocks` on a multiprocessor."""

    mt: int
    nt: int
    units: int
    stages: int
    warps: int
    blocks: int
    rows: int  # of x, in one pass
    grid: tuple[int, int, int]
    shared: int


def as_codes(shape: Shape, rows: int) -> bool:
    """Whether W's codes are multiplied as they are: where x has a single row, whose other form is less work."""
    return rows == 1 and shape.layout == Layout(4, 1, False) and shape.itemsize == 2


def shared_bytes(shape: Shape, mt: int, rows: int, units: int, stages: int, warps: int) -> int:
    """Dynamic shared memory of a block; see quant_linear.cu."""
    bits, x = shape.layout.bits, shape.units * rows * UNIT * shape.itemsize
    if as_codes(shape, rows):
        x += -(-shape.units // 16) * 128
    stage = mt * TILE * (units * UNIT * bits // 8 + 4 * bits) + mt * units * shape.layout.scales
    return -(-8 * stages // 128) * 128 + x + stages * stage + 4 * warps * TILE * mt * (rows | 1)


@lru_cache(maxsize=4096)
def plan(shape: Shape, device: Gpu) -> Plan:
    """The division that is taken. Raises ValueError where not even one row of x fits."""
    rows = min(shape.m, FEW if shape.itemsize == 2 else 32)
    per = -(-shape.tiles // device.multiprocessors)  # tiles of a multiprocessor
    while True:
        nt = 1 if rows <= 8 else 2 if rows <= 16 else 4
        choices = []
        if per <= 8 and nt == 1:  # All of a small matrix at once. Four warps are enough, and leave room for the next
            # kernel's blocks, but for many rows of x that have to be fetched.
            warps, share = 4 if rows == 1 or shape.units <= 16 else 8, 2 if per > 4 else 1
            halves = 2 if rows == 1 and per > 1 else 1
            choices = [(-(-per // share), halves, halves, share, warps)]
            choices += [(-(-per // 2), 2, 2, 1, 8)] if rows == 1 and per > 4 else []
        choices += [(2, 1, 2, 1, 8)] if nt == 2 and per > 1 else []
        # Else blocks stay and read ahead.
        choices += [(1, 1, stages, share, 8) for share in (2, 1) for stages in (6, 4, 3, 2)]
        choices += [(1, 2, 4, 1, 8), (1, 4, 4, 1, 8), (1, 4, 2, 1, 8), (1, 8, 4, 1, 8), (1, 99, 2, 1, 4)]
        for mt, pieces, stages, share, warps in choices:
            made = divide(shape, device, mt, nt, pieces, stages, warps, share, rows, max(share, 16 // warps))
            if made is not None:
                return made
        if rows == 1:
            raise ValueError(f"a row of {shape.units * UNIT} numbers doesn't fit in shared memory")
        rows = (rows + 1) // 2


def divide(
    shape: Shape, device: Gpu, mt: int, nt: int, pieces: int, stages: int, warps: int, share: int, rows: int,
    blocks: int | None = None,
) -> Plan | None:  # fmt: skip
    """The plan with these choices, or None if it needs more shared memory than there is. pieces: of a group; share:
    blocks that run on a multiprocessor; blocks: those that the kernel is compiled for, `share` if not given."""
    warps = max(min(warps, shape.units), mt)
    units = -(-shape.units // pieces)
    if pieces > 1:  # of whole turns of the warps
        units = -(-units // warps) * warps
        pieces = -(-shape.units // units)
    groups = -(-shape.tiles // mt)
    grid = min(groups, device.multiprocessors * share)
    stages = min(stages, pieces * -(-groups // grid))  # there is no more to read ahead
    shared = shared_bytes(shape, mt, rows, units, stages, warps)
    if warps > 16 or shared > device.shared_of_block or share * (shared + _SHARED_OF_BLOCK) > device.shared:
        return None
    return Plan(mt, nt, units, stages, warps, blocks or share, rows, (grid, -(-shape.m // rows), 1), shared)


def launch(
    x: Tensor, weights: Tensor, scales: Tensor, out: int, layout: Layout, chosen: Plan | None = None,
    overlap: bool | None = None,
) -> Tensor:  # fmt: skip
    """quant_linear.cu. chosen: a division other than `plan`'s. overlap: whether it may begin before the kernel in front
    has ended, None for where that is possible."""
    x = _rows(x)
    m, columns = x.shape
    y = x.new_empty(m, out)
    if y.numel() == 0:
        return y
    units = -(-columns // UNIT)
    shape = Shape(m, -(-out // TILE), units, x.element_size(), layout)
    p = chosen or plan(shape, gpu(x.device.index))
    cuda.kernel(
        "quant_linear.cu", "quant_linear", x.device,
        CODES=int(p.nt == 1 and as_codes(shape, p.rows)), MT=p.mt, NT=p.nt, UNITS=p.units, STAGES=p.stages,
        WARPS=p.warps, BLOCKS=p.blocks, **_macros(x.dtype, layout),
    )(
        p.grid, 32 * p.warps, x, weights, scales, y, m, columns, out, x.stride(0), weights.stride(0), units, p.rows,
        shared=p.shared, **_overlap(x, overlap),
    )  # fmt: skip
    return y


# ---- some dozens of rows


class Tiles(NamedTuple):
    """A division of quant_tiles.cu's work; see there."""

    nt: int
    wm: int
    wk: int
    stages: int
    split: int
    blocks: int
    mt: int = 2
    wo: int = 4

    @property
    def rows(self) -> int:
        """Of x, in a block."""
        return 8 * self.nt * self.wm

    @property
    def tiles(self) -> int:
        """Of W, in a block."""
        return self.mt * self.wo

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.wo * self.wm * self.wk

    def shared(self, layout: Layout) -> int:
        """Dynamic shared memory of a block, in bytes."""
        stage = self.rows * UNIT * 2 + self.tiles * layout.part
        return max(self.stages * stage, 4 * self.wk * self.rows * (self.tiles * TILE + 4))


@lru_cache(maxsize=4096)
def tiles(shape: Shape, device: Gpu) -> Tiles:
    """The division that is taken."""
    nt, groups = 2 * -(-min(shape.m, 128) // 32), -(-shape.tiles // 4)
    if shape.m <= 64:
        made = Tiles(2 * -(-shape.m // 16), 1, 2, 4, 1, 1, wo=2)
    elif device.clusters and 3 * groups <= device.multiprocessors:
        made = Tiles(nt, 2, 2, 4, 1, 1, mt=1)
    else:
        made = Tiles(nt, 2, 1, 4, 1, 1)
    while made.shared(shape.layout) > device.shared_of_block and made.stages > 2:
        made = made._replace(stages=made.stages - 1)
    if made.shared(shape.layout) > device.shared_of_block:
        made = Tiles(2, 1, 2, 2, 1, 1)
    if device.clusters:
        blocks = -(-shape.tiles // made.tiles) * -(-shape.m // made.rows)
        # Where a multiprocessor has room for one block only, clusters don't find a place on all of them at once.
        splits = (8, 4, 2) if shape.m <= 64 else (3, 2)
        fit = [s for s in splits if blocks * s <= device.multiprocessors and 2 * s <= shape.units]
        made = made._replace(split=fit[0] if fit else 1)
    return made


def few(shape: Shape, device: Gpu) -> bool:
    """Whether quant_linear.cu is the one for so many rows: it holds all of them, or nothing else knows their type."""
    return shape.itemsize == 4 or shape.m <= 8 or (shape.m <= FEW and plan(shape, device).rows == shape.m)


def launch_tiles(
    x: Tensor, weights: Tensor, scales: Tensor, out: int, layout: Layout, chosen: Tiles | None = None,
    overlap: bool | None = None,
) -> Tensor:  # fmt: skip
    """quant_tiles.cu, for 16-bit x; as `launch`."""
    x = _rows(x)
    m, columns = x.shape
    y = x.new_empty(m, out)
    if y.numel() == 0:
        return y
    units = -(-columns // UNIT)
    shape = Shape(m, -(-out // TILE), units, x.element_size(), layout)
    p = chosen or tiles(shape, gpu(x.device.index))
    cuda.kernel(
        "quant_tiles.cu", "quant_tiles", x.device,
        MT=p.mt, NT=p.nt, WO=p.wo, WM=p.wm, WK=p.wk, STAGES=p.stages, SPLIT=p.split, BLOCKS=p.blocks,
        **_macros(x.dtype, layout),
    )(
        (-(-shape.tiles // p.tiles) * p.split, -(-m // p.rows), 1), p.threads, x, weights, scales, y, m, columns, out,
        x.stride(0), weights.stride(0), units, shared=p.shared(layout), **_overlap(x, overlap),
    )  # fmt: skip
    return y


def _macros(dtype: torch.dtype, layout: Layout) -> dict[str, Any]:
    return {"T": cuda.TYPES[dtype], "WIDTH": layout.bits, "GROUPS": layout.groups, "ZEROS": int(layout.zeros)}


def _overlap(x: Tensor, wanted: bool | None) -> dict[str, bool]:
    return {"overlap": True} if (overlaps(x.device.index) if wanted is None else wanted) else {}


def _rows(x: Tensor) -> Tensor:
    """x (M, K) with rows of a multiple of 8 numbers, zeros behind, that begin at multiples of 16 bytes."""
    if x.shape[1] % 8:
        return F.pad(x, (0, -x.shape[1] % 8))
    return x if x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 else x.clone(
        memory_format=torch.contiguous_format
    )  # fmt: skip


# ---- the operators


def _linear(x: Tensor, weights: Tensor, scales: Tensor, out: int, bits: int, groups: int, zeros: bool) -> Tensor:
    """x (M, K) -> (M, O), in x's dtype."""
    layout, m = Layout(bits, groups, zeros), x.shape[0]
    if m >= DENSE_FROM:
        return torch.mm(x, decode(weights, scales, out, x.shape[1], *layout, x.dtype).t())
    shape = Shape(m, -(-out // TILE), -(-x.shape[1] // UNIT), x.element_size(), layout)
    return (launch if few(shape, gpu(x.device.index)) else launch_tiles)(x, weights, scales, out, layout)


def _decode(
    weights: Tensor, scales: Tensor, out: int, columns: int, bits: int, groups: int, zeros: bool, dtype: torch.dtype
) -> Tensor:
    """(O, K) in dtype."""
    y = weights.new_empty(out, columns, dtype=dtype)
    if y.numel():
        words = -(-columns // 8)  # a thread each
        wide = -(-words // 256)
        block = -(-words // (32 * wide)) * 32
        cuda.kernel("quant_decode.cu", "quant_decode", y.device, **_macros(dtype, Layout(bits, groups, zeros)))(
            (-(-out // 4), wide, 1), block, weights, scales, y, out, columns, weights.stride(0), -(-columns // UNIT)
        )
    return y


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, scales: Tensor, out: int, *layout: Any) -> Tensor:
        with ops.below():
            y = linear(x, weights, scales, out, *layout)
        ctx.save_for_backward(weights, scales)
        ctx.shape, ctx.layout = (out, x.shape[1]), layout
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        matrix = decode(*ctx.saved_tensors, *ctx.shape, *ctx.layout, d_y.dtype)
        return torch.mm(d_y, matrix), *[None] * (3 + len(ctx.layout))


linear = ops.define(
    "quant_linear(Tensor x, Tensor weights, Tensor scales, int out, int bits, int groups, bool zeros) -> Tensor",
    _linear,
    lambda x, weights, scales, out, *_: x.new_empty(x.shape[0], out),
    _Linear,
)
decode = ops.define(
    "quant_decode(Tensor weights, Tensor scales, int out, int columns, int bits, int groups, bool zeros,"
    " ScalarType dtype) -> Tensor",
    _decode,
    lambda weights, scales, out, columns, bits, groups, zeros, dtype: weights.new_empty(out, columns, dtype=dtype),
)
