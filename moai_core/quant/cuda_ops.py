"""The kernels for integer matrices as operators of PyTorch: how their work is divided, what they launch.

A matrix comes as two tensors, made by `moai_core.quant.cuda.prepare`:

    weights (tiles, units, bytes) uint8    16 rows by 128 columns a unit, in the order in which quant_linear.cu reads
                                           it, with the scales of its groups behind
    scales  (tiles, 8, 2 or 4) fp16        of whole rows; empty where groups have theirs

`Layout` says what the bytes are. Nothing here waits for the GPU or allocates but through PyTorch, so a CUDA graph can
hold all of it. The matrix is constant; the gradient is that of x.
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

# As in the kernels: columns of a unit, rows of a tile, tiles that come together.
UNIT, TILE, TOGETHER = 128, 16, 2
# With so many rows of x or more the matrix is decoded to x's type, for cuBLAS to multiply with.
DENSE_FROM = 129

# Bytes of W that a multiprocessor asks for ahead, lest memory waits; rather several passes over x than less.
_UNDER_WAY = 24 << 10
_SHARED_OF_BLOCK = 1 << 10  # what CUDA itself takes of a block's shared memory


class Layout(NamedTuple):
    """bits: 4 or 8; groups: scales of a row of a unit, 0 for one of the whole row; zeros: with zero points; glu: tiles
    have 8 rows of gate and 8 of up."""

    bits: int
    groups: int
    zeros: bool
    glu: bool = False

    @property
    def part(self) -> int:
        """Bytes of a tile's unit."""
        return TILE * UNIT * self.bits // 8 + self.groups * 2 * TILE * (1 + self.zeros)

    @property
    def rows(self) -> int:
        """Rows of the result that a tile gives."""
        return TILE // 2 if self.glu else TILE


class Plan(NamedTuple):
    """A division of the work; see quant_linear.cu. `warps` run in a block, of at most `most_warps`, and `blocks` fit on
    a multiprocessor, as the kernel was compiled for."""

    mt: int
    nt: int
    stages: int
    warps: int
    most_warps: int
    blocks: int
    rows: int  # of x, in one pass
    grid: tuple[int, int, int]
    shared: int


class Shape(NamedTuple):
    """What a plan is made for: m rows of x, of `itemsize` bytes a number in arithmetic; tiles and units of W."""

    m: int
    tiles: int
    units: int
    itemsize: int
    layout: Layout


class Gpu(NamedTuple):
    """What a plan has to know: multiprocessors, bytes of shared memory of one and of a block."""

    multiprocessors: int
    shared: int
    shared_of_block: int


@lru_cache(maxsize=64)
def gpu(index: int | None) -> Gpu:
    """The GPU of this index, in short."""
    p = torch.cuda.get_device_properties(torch.device("cuda", index) if index is not None else torch.device("cpu"))
    of_block: int = p.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(p.multi_processor_count, p.shared_memory_per_multiprocessor, of_block)


def shared_bytes(shape: Shape, mt: int, rows: int, warps: int, stages: int) -> int:
    """Dynamic shared memory of a block; see quant_linear.cu."""
    x = shape.units * rows * UNIT * shape.itemsize
    return x + warps * (stages * mt * shape.layout.part + 4 * (TILE * mt * (rows | 1) + rows))


@lru_cache(maxsize=4096)
def plan(shape: Shape, device: Gpu) -> Plan:
    """The division that is taken: small matrices as one wave of blocks that ask for all of their bytes at once, large
    ones as blocks that stay and read ahead. Raises ValueError where not even one row of x fits."""
    rows = min(shape.m, 32)
    while True:
        nt = 1 if rows <= 8 else 2 if rows <= 16 else 4
        # Two tiles a warp halve what is read of x, where that leaves enough blocks.
        mt = 2 if rows > 4 and shape.tiles >= 2 * device.multiprocessors else 1
        one_wave = shape.tiles <= 2 * device.multiprocessors
        wide = one_wave or shape.units * rows * UNIT * shape.itemsize > 40 << 10
        most, blocks = (12, 1) if mt * nt > 4 else (16, 1) if wide else (8, 4 if mt * nt == 1 else 2)
        for stages, most_warps in ((4, most), (2, most), (2, 8)):
            made = divide(shape, device, mt, nt, stages, most_warps, blocks, rows)
            if made is not None and (rows <= 8 or made.warps * made.stages * mt * shape.layout.part >= _UNDER_WAY):
                return made
        if rows == 1:
            raise ValueError(f"a row of {shape.units * UNIT} numbers doesn't fit in shared memory")
        rows = (rows + 1) // 2


def divide(
    shape: Shape, device: Gpu, mt: int, nt: int, stages: int, most_warps: int, blocks: int, rows: int
) -> Plan | None:
    """The plan with these choices, or None if it needs more shared memory than there is."""
    turns = -(-shape.units // most_warps)
    warps = -(-shape.units // turns)  # none idles in the last turn that needn't
    groups = -(-shape.tiles // mt)

    def resident(stages: int) -> int:
        shared = shared_bytes(shape, mt, rows, warps, stages)
        return 0 if shared > device.shared_of_block else min(blocks, device.shared // (shared + _SHARED_OF_BLOCK))

    if resident(stages) < 1:
        return None
    if stages > 2 and turns * -(-groups // (device.multiprocessors * resident(2))) <= 2:
        stages = 2  # there is no more to read ahead
    grid = min(groups, device.multiprocessors * resident(stages))
    shared = shared_bytes(shape, mt, rows, warps, stages)
    return Plan(mt, nt, stages, warps, most_warps, blocks, rows, (grid, -(-shape.m // rows), 1), shared)


# ---- the operators: what they launch


def _linear(x: Tensor, weights: Tensor, scales: Tensor, out: int, bits: int, groups: int, zeros: bool) -> Tensor:
    """x (M, K) -> (M, O), in x's dtype."""
    layout = Layout(bits, groups, zeros)
    if x.shape[0] < DENSE_FROM:
        return launch(x, weights, scales, None, None, out, layout, 0.0)
    return torch.mm(x, decode(weights, scales, out, x.shape[1], *layout, x.dtype).t())


def _fused(
    x: Tensor, weights: Tensor, scales: Tensor, norm: Tensor | None, residual: Tensor | None, out: int, bits: int,
    groups: int, zeros: bool, glu: bool, eps: float,
) -> Tensor:  # fmt: skip
    """x (M, K) -> (M, O): RMS norm with the weight `norm` (K,) first, in whose dtype the rest is; silu(gate) up where
    the matrix is a pair; `residual` (M, O) added, whose dtype is the result's."""
    layout = Layout(bits, groups, zeros, glu)
    if x.shape[0] < DENSE_FROM:
        return launch(x, weights, scales, norm, residual, out, layout, eps)
    h = x if norm is None else _normalized(x, norm, eps)
    y = torch.mm(h, decode(weights, scales, out * (1 + glu), x.shape[1], *layout, h.dtype).t())
    if glu:
        y = F.silu(y[:, :out]) * y[:, out:]
    return y if residual is None else residual + y


def _normalized(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[1:], norm.float(), eps).to(norm.dtype)


def launch(
    x: Tensor, weights: Tensor, scales: Tensor, norm: Tensor | None, residual: Tensor | None, out: int, layout: Layout,
    eps: float, chosen: Plan | None = None, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel of few rows. chosen: a division other than `plan`'s. overlap: begin before the kernel in front has
    ended (compute capability 9.0), which must not be one that writes the matrix."""
    if norm is not None and x.shape[1] % 8:  # rows that grow below have another mean
        x, norm = _normalized(x, norm, eps), None
    kind = x.dtype if norm is None else norm.dtype
    if x.element_size() < kind.itemsize or (x.dtype != kind and x.dtype != torch.float32):
        x = x.to(kind)
    x = _rows(x)
    (m, columns), (tiles, units, _) = x.shape, weights.shape
    y = x.new_empty(m, out, dtype=kind if residual is None else residual.dtype)
    if y.numel() == 0:
        return y
    p = chosen or plan(Shape(m, tiles, units, kind.itemsize, layout), gpu(x.device.index))
    cuda.kernel(
        "quant_linear.cu", "quant_linear", x.device,
        FROM=cuda.TYPES[x.dtype], T=cuda.TYPES[kind], TO=cuda.TYPES[y.dtype], NORM=int(norm is not None),
        WIDTH=layout.bits, GROUPS=layout.groups, ZEROS=int(layout.zeros), GLU=int(layout.glu),
        MT=p.mt, NT=p.nt, STAGES=p.stages, WARPS=p.most_warps, BLOCKS=p.blocks,
    )(
        p.grid, 32 * p.warps, x, weights, scales, None if norm is None else norm.contiguous(),
        None if residual is None else residual.contiguous(), y, m, columns, out, x.stride(0), tiles, units,
        -(-units // p.warps), p.rows, eps, shared=p.shared, **({"overlap": True} if overlap else {}),
    )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    """x (M, K) with rows of a multiple of 8 numbers, zeros behind, that begin at multiples of 16 bytes."""
    if x.shape[1] % 8:
        return F.pad(x, (0, -x.shape[1] % 8))
    return x if x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 else x.clone(
        memory_format=torch.contiguous_format
    )  # fmt: skip


def _decode(
    weights: Tensor, scales: Tensor, out: int, columns: int, bits: int, groups: int, zeros: bool, glu: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(O, K) in dtype; of a pair gate's rows, then up's."""
    y = weights.new_empty(out, columns, dtype=dtype)
    tiles, units, _ = weights.shape
    if y.numel():
        _decoder("quant_decode", y, bits, groups, zeros, glu)(
            -(-tiles * units // 8), 256, weights, scales, y, out, columns, units, tiles * units
        )
    return y


def _gather(
    ids: Tensor, weights: Tensor, scales: Tensor, out: int, columns: int, bits: int, groups: int, zeros: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Rows ids (n,) int64 of the matrix of `out` rows, as (n, K) in dtype."""
    y = weights.new_empty(ids.shape[0], columns, dtype=dtype)
    if y.numel():
        _decoder("quant_gather", y, bits, groups, zeros, False)(
            ids.shape[0], 256, weights, scales, ids.contiguous(), y, out, columns, weights.shape[1]
        )
    return y


def _decoder(name: str, y: Tensor, bits: int, groups: int, zeros: bool, glu: bool) -> cuda.Kernel:
    macros = {"T": cuda.TYPES[y.dtype], "WIDTH": bits, "GROUPS": groups, "ZEROS": int(zeros), "GLU": int(glu)}
    return cuda.kernel("quant_decode.cu", name, y.device, **macros)


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
        matrix = decode(*ctx.saved_tensors, *ctx.shape, *ctx.layout, False, d_y.dtype)
        return torch.mm(d_y, matrix), *[None] * (3 + len(ctx.layout))


linear = ops.define(
    "quant_linear(Tensor x, Tensor weights, Tensor scales, int out, int bits, int groups, bool zeros) -> Tensor",
    _linear,
    lambda x, weights, scales, out, *_: x.new_empty(x.shape[0], out),
    _Linear,
)
fused = ops.define(
    "quant_fused(Tensor x, Tensor weights, Tensor scales, Tensor? norm, Tensor? residual, int out, int bits,"
    " int groups, bool zeros, bool glu, float eps) -> Tensor",
    _fused,
    lambda x, weights, scales, norm, residual, out, *_: x.new_empty(
        x.shape[0], out, dtype=next(t.dtype for t in (residual, norm, x) if t is not None)
    ),
)
decode = ops.define(
    "quant_decode(Tensor weights, Tensor scales, int out, int columns, int bits, int groups, bool zeros, bool glu,"
    " ScalarType dtype) -> Tensor",
    _decode,
    lambda weights, scales, out, columns, bits, groups, zeros, glu, dtype: weights.new_empty(out, columns, dtype=dtype),
)
gather = ops.define(
    "quant_gather(Tensor ids, Tensor weights, Tensor scales, int out, int columns, int bits, int groups, bool zeros,"
    " ScalarType dtype) -> Tensor",
    _gather,
    lambda ids, weights, scales, out, columns, *rest: weights.new_empty(ids.shape[0], columns, dtype=rest[-1]),
)
