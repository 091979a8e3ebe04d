"""The decode engine's matrix products: which weights its kernel reads, and how a product is launched.

`cuda/decode_linear.cu` multiplies with few vectors and takes along what stands before and behind a product. Here is
what the host decides: how K is cut (from the shape alone, so that a row's bits depend on nothing else), how many tiles
a block takes at once, and how deep the rings in shared memory are. Left out: formats whose numbers aren't 16 and more
bits or int8, int4, fp8 (they are decoded elsewhere), biases.

Letters as in the model: H hidden, I inner, R rank, N states; O rows and K columns of a weight, M rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moai_core import cuda
from moai_core.quant.linear import QuantEmbedding, QuantLinear, TiedHead

# What x is (SOURCE) and what becomes of a result (RESULT), as decode_linear.cu numbers them.
COPY, NORM, RING = 0, 1, 2
STORE, RESIDUAL, SWIGLU, CONV, PARTIAL = 0, 1, 2, 3, 4

# Rows that fit into registers beside a product, and the widest batch of one launch.
NARROW, WIDE = 8, 64
THREADS, WARPS, CHUNK_BYTES = 256, 8, 64
# Chunks that a lane reads ahead: with 2 blocks on a multiprocessor 80 KB are under way, more than latency asks for.
DEPTH, LEAST_DEPTH = 6, 2
BLOCKS = 2  # of a narrow product on a multiprocessor
# Tiles of 16 rows of a 16-bit weight that a block takes at once from a wide batch: fewer read x more often.
WIDE_TILES = 4
# Rows that a block of the scan takes, as decode_step.cu has it.
SCAN_ROWS = 2
_TILE_SUMS = 8 * 20
_WHOLE_ROW = 1 << 30

_FORMATS = {"int8": ("Int8", 8), "int4": ("Int4", 4), "fp8": ("Fp8", 8)}


class Launch(NamedTuple):
    """A kernel with all that it is started with. cooperative: its blocks wait for each other, so all run at once."""

    kernel: Any
    grid: int | tuple[int, int, int]
    block: int
    args: tuple[Tensor | int | float | None, ...]
    shared: int = 0
    cooperative: bool = False


class Product(NamedTuple):
    """A product that torch makes: out = x weight^T."""

    out: Tensor
    x: Tensor
    weight: Tensor


class Matrix(NamedTuple):
    """A weight (O, K) as the kernels read it: its bytes row by row, and scales."""

    format: str
    group: int
    rows: int
    columns: int
    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes from a row to the next."""
        return self.weight.shape[1] * self.weight.element_size()

    @property
    def chunks(self) -> int:
        """64-byte chunks of a row."""
        return -(-self.row_bytes // CHUNK_BYTES)

    @property
    def bytes(self) -> int:
        """What one product reads."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.scales, self.zeros) if t is not None)


def refusal(name: str, module: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the kernels can't multiply with this module's weight, or None."""
    if isinstance(module, TiedHead):
        module = module._embedding[0]
    if isinstance(module, QuantLinear) and type(module) in (QuantLinear, QuantEmbedding):
        return _refused_format(name, module, dtype)
    if not isinstance(module, (nn.Linear, nn.Embedding)) or type(module) not in (nn.Linear, nn.Embedding):
        return f"{name} is a {type(module).__name__}"
    if getattr(module, "bias", None) is not None:
        return f"{name} has a bias"
    weight = module.weight
    if weight.dtype != dtype:
        return f"{name} is {weight.dtype}, not {dtype}"
    if weight.shape[1] * dtype.itemsize % 16 or not weight.is_contiguous():
        return f"{name}: rows of {weight.shape[1]} numbers are no whole number of 16 bytes"
    return None


def _refused_format(name: str, module: QuantLinear, dtype: torch.dtype) -> str | None:
    spec, columns = module.spec, module.in_features
    if spec.format not in _FORMATS:
        return f"{name} is stored as {spec.format}"
    if module.rotation is not None and not name.endswith(("out_proj", "down_proj")):
        return f"{name} has a rotated input"
    if dtype == torch.float32:
        return f"{name} is quantized, and the model computes in float32"
    if module.qweight.numel() == 0:
        return f"{name} has given up its stored numbers (release)"
    fits = columns * _FORMATS[spec.format][1] % 128 == 0
    return None if fits else f"{name}: rows of {columns} numbers are no whole number of 16 bytes"


def matrix(module: nn.Module) -> Matrix:
    """The weight of a module that isn't refused; nothing is copied."""
    if isinstance(module, TiedHead):
        module = module._embedding[0]
    if isinstance(module, (nn.Linear, nn.Embedding)):
        weight = module.weight.detach()
        return Matrix("Plain", 0, weight.shape[0], weight.shape[1], weight)
    assert isinstance(module, QuantLinear)
    held, spec = module.tensors(), module.spec
    name, _ = _FORMATS[spec.format]
    # int4 is scaled group by group in any case; a whole row is one group.
    group = 0 if spec.format == "fp8" else spec.group_size or (_WHOLE_ROW if spec.format == "int4" else 0)
    return Matrix(
        name, group, module.out_features, module.in_features, held["qweight"], held["scales"], held.get("zeros")
    )


def in_whole_chunks(m: Matrix, dtype: torch.dtype) -> bool:
    """Whether the kernels that read rows in whole chunks multiply x of `dtype` with this weight (decode_whole.py,
    decode_wide.py): 16-bit arithmetic, no zero points, a scale for a row or for 128, 256, 512 ... columns of int4."""
    grouped = m.format == "Int4" and m.group % 128 == 0 and m.group & (m.group - 1) == 0
    return dtype.itemsize == 2 and m.row_bytes % CHUNK_BYTES == 0 and m.zeros is None and (m.group == 0 or grouped)


def slices_of(m: Matrix, result: int, *, few: bool = False) -> int:
    """In how many parts K is summed: many for the few rows of x_proj, 4 where a wide batch's next norm adds them."""
    if result == PARTIAL:
        return max(1, min(16, m.chunks // WARPS))
    return 4 if not few and result == RESIDUAL and m.chunks >= 4 * WARPS else 1


def linear(
    m: Matrix,
    x: Tensor | None,
    out: Tensor | None,
    *,
    dtype: torch.dtype,
    batch: int,
    wide: bool,
    result: int = STORE,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    up: Matrix | None = None,
    conv: Sequence[Tensor | None] = (None,) * 6,
    width: int = 4,
) -> list[Launch]:
    """One product for `batch` rows: a launch, or several that take some of the rows each.

    wide: x is read chunk by chunk as the weight is; else it is kept in shared memory (`most_rows`), and may be None:
    the norm of the residual stream (M, H). out: (M, O), with up (M, O) of silu(gate) up, with PARTIAL (slices, M, O)
    fp32. A wide RESIDUAL product leaves PARTIAL sums in `out` for the next norm. conv: weight (I, K), bias (I), scale
    (I), both or None, window (M, I, K-1), the next window, z (M, I).
    """
    source = RING if wide else NORM if x is None else COPY
    slices = slices_of(m, result, few=not wide)
    if source == RING and result == RESIDUAL:
        result = PARTIAL
    most = NARROW if not wide else most_wide(m, dtype)
    stream = residual.dtype if residual is not None else dtype
    second = (None, None, None) if up is None else (up.weight, up.scales, up.zeros)
    found = []
    for begin in range(0, batch, most):
        rows = slice(begin, min(batch, begin + most))
        count = rows.stop - begin
        nt, rt, depth, shared = _division(m, dtype, count, source, result, slices)
        scale = torch.float32 if m.scales is None else m.scales.dtype
        kernel = cuda.kernel(
            "decode_linear.cu", "decode_linear", m.weight.device, T=cuda.TYPES[dtype], R=cuda.TYPES[stream],
            FORMAT=m.format, GROUP=m.group, ZEROS=int(m.zeros is not None), S=cuda.TYPES[scale], NT=nt, RT=rt,
            SLICES=slices, SOURCE=source, RESULT=result, KC=width, DEPTH=depth,
        )  # fmt: skip
        units = -(-m.rows // ((8 if result == SWIGLU else 16) * rt)) * (slices if result == PARTIAL else 1)
        blocks = multiprocessors(m.weight.device) * (1 if source == RING else BLOCKS)
        to = None if out is None else out[:, rows] if result == PARTIAL else out[rows]
        parts = [None if t is None else t[rows] for t in (x, residual, *conv[3:])]
        args = (
            m.weight, second[0], m.scales, second[1], m.zeros, second[2], *parts[:2], norm, to, *conv[:3], *parts[2:],
            m.rows, m.columns, m.row_bytes, 1 if m.scales is None else m.scales.shape[1], count,
            batch, float(eps),
        )  # fmt: skip
        found.append(Launch(kernel, min(units, blocks), THREADS, args, shared))
    return found


def most_rows(weights: Sequence[Matrix], dtype: torch.dtype) -> int:
    """How many rows beside each of these weights shared memory has room for, at most NARROW."""
    for rows in range(NARROW, 0, -1):
        try:
            for m in weights:
                _division(m, dtype, rows, COPY, RESIDUAL, slices_of(m, RESIDUAL, few=True))
            return rows
        except ValueError:
            continue
    return 0


def most_wide(m: Matrix, dtype: torch.dtype) -> int:
    """How many rows one wide launch takes: their x must fit into the ring beside the weight."""
    for rows in (WIDE, 32, 16, 8):
        try:
            _division(m, dtype, rows, RING, PARTIAL, 1)
            return rows
        except ValueError:
            continue
    raise ValueError(f"8 rows of {m.columns} numbers don't fit into shared memory")


def _division(
    m: Matrix, dtype: torch.dtype, rows: int, source: int, result: int, slices: int
) -> tuple[int, int, int, int]:
    """(NT, RT, depth of the ring, bytes of shared memory): tiles of 8 rows of the batch, and of 16 rows of the weight,
    that a block takes at once. ValueError where even the least doesn't fit."""
    ring = source == RING
    nt = next(n for n in (1, 2, 4, 8) if rows <= 8 * n) if ring else 1
    most = 1 if not ring or m.zeros is not None else WIDE_TILES if m.format == "Plain" else 2
    # The more tiles, the less often x is read, as long as nearly every multiprocessor has something to do.
    tiles = -(-m.rows // (8 if result == SWIGLU else 16)) * (slices if result == PARTIAL else 1)
    busy = 0.9 * multiprocessors(m.weight.device)
    choices = [t for t in (4, 2, 1) if t <= most and (t == 1 or tiles // t >= busy)]
    vectors = _columns(m, dtype) * dtype.itemsize // 16
    row = m.chunks * 4 * vectors
    kept = 0 if ring else rows * (row if row % 8 else row + 4) * 16 + -(-rows * m.chunks // 2) * 16
    for rt in choices:
        pieces = 2 * rt + (nt * vectors if ring else 0)
        sums = nt * _TILE_SUMS * (1 if ring else 2 * rt * (1 if result == PARTIAL else slices))
        for depth in range(DEPTH, LEAST_DEPTH - 1, -1):
            total = WARPS * (depth * pieces * 512 + sums * 4) + kept
            if total <= shared_memory(m.weight.device) - 1024:
                return nt, rt, depth, total
    raise ValueError(f"{rows} rows of {m.columns} numbers don't fit into shared memory")


def _columns(m: Matrix, dtype: torch.dtype) -> int:
    """Columns of 16 bytes of a row."""
    return {"Plain": 16 // dtype.itemsize, "Int4": 32}.get(m.format, 16)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of this GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
