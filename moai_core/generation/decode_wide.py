"""Products for wide batches: how `cuda/decode_wide.cu` and, on Hopper, `cuda/decode_wide_hopper.cu` are launched.

They leave sums of slices of K, which the kernel behind adds: of in_proj the convolution's step, of x_proj the norms, of
gate and up silu, of out_proj and down the next norm. Slices depend on the weight's shape alone, and so do a row's bits.
Left out: zero points, groups of other than 128, 256, ... columns, rows of no whole number of 64 bytes, for which
decode_kernels.py has a product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation.decode_kernels import (
    THREADS,
    WARPS,
    Launch,
    Matrix,
    in_whole_chunks,
    multiprocessors,
    shared_memory,
)

# Bytes of x that a block keeps, of 64 rows; the rest of its shared memory is rings.
KEPT = 96 << 10
LEAST_DEPTH, MOST_DEPTH = 4, 24
# Hopper: chunks that come together, 256 bytes of a row. Weights of fewer rows leave too many of its tiles empty.
UNIT, HOPPER_ROWS = 4, 1024
# Units that a warp asks for before the previous kernel has ended.
FLIGHT = 2
# Formats of a head whose product is Hopper's kernel.
HEADS = ("Int8", "Int4")
# Slices are chosen for a GPU of so many multiprocessors, whatever runs them.
_NOMINAL, _MOST_SLICES = 132, 16
_VECTORS = {"Plain": 1, "Int8": 2, "Fp8": 2, "Int4": 4}
# Pieces of 16 bytes of the state that a thread of the scan has on their way.
FLOW = 6


def takes_convolution(x_proj: Matrix, config: Any, dtype: torch.dtype) -> bool:
    """Whether the convolution's step and x_proj are one kernel (decode_step.cu's decode_conv_x)."""
    whole = config.inner_size % 32 == 0 and config.time_step_rank % 32 == 0
    return whole and x_proj.format == "Plain" and dtype.itemsize == 2


def mix_threads(width: int) -> int:
    """Threads that add the sums of `width` numbers, as decode_mix_wide has them."""
    return min(16, 4096 // width) * width // 4


def scan_bytes(config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Shared memory of decode_scan_wide; 0 where it doesn't take the model."""
    rank, states = config.time_step_rank, config.state_size
    if rank % 32 or dtype.itemsize != 2 or states > 64 or config.inner_size % 8:
        return 0
    needed = FLOW * 512 * 16 + rank * 64 + 64 * 2 * states * 4
    return needed if needed + (18 << 10) <= shared_memory(device) else 0


def fits(m: Matrix, dtype: torch.dtype) -> bool:
    """Whether the kernels take this weight for x of `dtype`."""
    depth = 2 * UNIT if _hopper(m) else LEAST_DEPTH
    return in_whole_chunks(m, dtype) and _division(m, 64, 1)[2] >= depth


def slices_of(m: Matrix, copies: int = 1) -> int:
    """In how many parts K is summed. copies: 2 with a second weight of the same shape."""
    return -(-m.chunks // slice_of(m, copies))


def slice_of(m: Matrix, copies: int = 1) -> int:
    """Chunks of a slice."""
    return _slice(m.format, m.rows * copies, m.chunks, KEPT)


@lru_cache(maxsize=64)
def _slice(form: str, rows: int, chunks: int, kept: int) -> int:
    """Chunks of a slice: as few as the busiest warp has least to read, its part of writing and reading sums included
    (they stay in the L2 cache, at about twice the memory's rate)."""

    def cost(parts: int) -> float:
        rounds = -(-rows // (16 * WARPS * (_NOMINAL // parts)))
        return rounds * -(-chunks // parts) + 2.6e-4 * parts * rows

    most = max(1, kept // (4096 * _VECTORS[form]))
    least = -(-chunks // most)
    return -(-chunks // min(range(least, max(least, min(_MOST_SLICES, chunks)) + 1), key=cost))


def _hopper(m: Matrix) -> bool:
    return m.rows >= HOPPER_ROWS and torch.cuda.get_device_capability(m.weight.device) == (9, 0)


def stores(m: Matrix, dtype: torch.dtype) -> bool:
    """Whether Hopper's kernel makes the head's product; otherwise cuBLAS (16 bits) or decode_kernels.py does."""
    return m.format in HEADS and _hopper(m) and in_whole_chunks(m, dtype) and _division(m, 64, 1, True)[2] >= 2 * UNIT


def _division(m: Matrix, rows: int, copies: int, store: bool = False) -> tuple[int, int, int, int]:
    """(NT, chunks of x that are kept, chunks in a ring, bytes of shared memory)."""
    nt, hopper = next(n for n in (1, 2, 4, 8) if rows <= 8 * n), _hopper(m)
    chunk = nt * _VECTORS[m.format] * 512
    part = min(m.chunks, KEPT // (4096 * _VECTORS[m.format])) // UNIT * UNIT if store else slice_of(m, copies)
    stage = WARPS * 16 * (68 if m.group else 64)
    free = (shared_memory(m.weight.device) - 1024 - part * chunk) // stage
    step = UNIT if hopper else 2
    depth = min(MOST_DEPTH, free) // step * step
    return nt, part, depth, part * chunk + depth * stage


def product(m: Matrix, x: Tensor, out: Tensor, *, second: Matrix | None = None) -> Launch:
    """out (slices, M, O) fp32: sums of x (M, K), 1 to 64 rows; with a second weight of the same shape (slices, M, 2 O).
    Of x's type, (M, O): the product itself, where `stores` allows it."""
    copies, hopper, store = 1 if second is None else 2, _hopper(m), out.dim() == 2
    nt, part, depth, shared = _division(m, x.shape[0], copies, store)
    slices = 1 if store else slices_of(m, copies)
    scale = torch.float32 if m.scales is None else m.scales.dtype
    macros: dict[str, str | int] = {"T": cuda.TYPES[x.dtype], "NT": nt}
    macros["WEIGHT"] = f"{m.format},{cuda.TYPES[scale]},{m.group}"
    own = {"DEPTH": depth // UNIT, "UNIT": UNIT, "FLIGHT": FLIGHT, "STORE": int(store)}
    macros |= own if hopper else {"DEPTH": depth}
    name = "decode_wide_hopper" if hopper else "decode_wide"
    kernel = cuda.kernel(f"{name}.cu", name, m.weight.device, **macros)
    tiles = -(-m.rows // 16) * copies
    shares = max(1, min(tiles, multiprocessors(m.weight.device) // slices))
    others = (None, None) if second is None else (second.weight, second.scales)
    args = (
        m.weight, others[0], m.scales, others[1], x, out, m.rows, m.columns, m.row_bytes,
        1 if m.scales is None else m.scales.shape[1], (m.group // 128).bit_length() - 1 if m.group else 0, slices,
        part, x.shape[0],
    )  # fmt: skip
    return Launch(kernel, slices * shares, THREADS, args, shared)
