"""The choice of the next token at the end of a step of the decode engine: three kernels (`cuda/decode_sample.cu`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation.decode_kernels import Launch

# As decode_sample.cu has them: tokens of a slice's thread, bins; threads and shared memory of the last kernel.
_SHARE, _BINS, _PICK, _WORK = 16, 1312, 512, 97 << 10
# Threads of a slice: few for a narrow batch, whose slices run side by side; many for a wide one, as each slice adds
# its bins to the row's.
_NARROW, _FEW, _MANY = 8, 256, 1024


class Found(NamedTuple):
    """What the kernels leave for each other, a row of each for a row of the batch."""

    best: Tensor
    best_id: Tensor
    bins: Tensor
    masses: Tensor

    @classmethod
    def make(cls, make: Callable[..., Tensor], rows: int, known: int) -> Found:
        """make: zeros of a shape and dtype; known: tokens that may be chosen."""
        slices = -(-known // (_SHARE * _FEW))
        return cls(
            make(rows, slices), make(rows, slices, dtype=torch.int32), make(rows, _BINS, dtype=torch.int32),
            make(rows, _BINS, dtype=torch.int64),
        )  # fmt: skip


def launches(decoder: Any, width: int) -> list[Launch]:
    """From the logits of the first `width` rows to the token that each reads next."""

    def kernel(name: str) -> cuda.Kernel:
        return cuda.kernel("decode_sample.cu", name, decoder.device, T=cuda.TYPES[decoder.dtype])

    temperature, top_p, min_p, penalty = decoder.numbers
    token, top_k, seed, draws = decoder.counts
    own: Found = decoder.found
    size, known = decoder.config.vocab_size, decoder.known
    threads = _FEW if width <= _NARROW else _MANY
    slices = -(-known // (_SHARE * threads))
    rows, best = (decoder.logits, decoder.seen), (penalty, own.best, own.best_id)
    filters = (temperature, top_p, min_p, penalty, top_k, seed, draws)
    return [
        Launch(kernel("sample_best"), (slices, width, 1), threads, (*rows, *best, size, known)),
        Launch(
            kernel("sample_masses"), (slices, width, 1), threads,
            (*rows, temperature, *best, own.bins, own.masses, size, known),
        ),
        Launch(
            kernel("sample_pick"), width, _PICK,
            (*rows, *filters, *own, token, slices, size, known), _WORK,
        ),
    ]  # fmt: skip
