"""The choice of the next token at the end of a step of the decode engine: four kernels (`cuda/decode_sample.cu`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation.decode_kernels import Launch

# As decode_sample.cu has them.
_SLICE, _BINS, _LIST, _WORK = 4096, 1312, 4096, 40 << 10


class Found(NamedTuple):
    """What the kernels leave for each other, a row of each for a row of the batch."""

    best: Tensor
    best_id: Tensor
    bins: Tensor
    masses: Tensor
    keys: Tensor
    listed: Tensor

    @classmethod
    def make(cls, make: Callable[..., Tensor], rows: int, known: int) -> Found:
        """make: zeros of a shape and dtype; known: tokens that may be chosen."""
        slices = -(-known // _SLICE)
        return cls(
            make(rows, slices), make(rows, slices, dtype=torch.int32), make(rows, _BINS, dtype=torch.int32),
            make(rows, _BINS, dtype=torch.int64), make(rows, _LIST, dtype=torch.int64),
            make(rows, 8, dtype=torch.int32),
        )  # fmt: skip


def launches(decoder: Any, width: int) -> list[Launch]:
    """From the logits of the first `width` rows to the token that each reads next."""

    def kernel(name: str) -> cuda.Kernel:
        return cuda.kernel("decode_sample.cu", name, decoder.device, T=cuda.TYPES[decoder.dtype])

    temperature, top_p, min_p, penalty = decoder.numbers
    token, top_k, seed, draws = decoder.counts
    own: Found = decoder.found
    slices, size, known = own.best.shape[1], decoder.config.vocab_size, decoder.known
    first = (decoder.logits, decoder.seen, temperature, penalty, own.best, own.best_id)
    filters = (temperature, top_p, min_p, penalty, top_k, seed, draws)
    chosen = (decoder.logits, decoder.seen, *filters, *own)
    return [
        Launch(kernel("sample_best"), (slices, width, 1), 256, (*first, size, known)),
        Launch(kernel("sample_masses"), (slices, width, 1), 256, (*first, own.bins, own.masses, size, known)),
        Launch(kernel("sample_gather"), (slices, width, 1), 256, (*chosen, size, known)),
        Launch(kernel("sample_pick"), width, 1024, (*chosen, token, slices, size, known), _WORK),
    ]  # fmt: skip
