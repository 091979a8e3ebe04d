"""Padding and packed documents: what callers may pass as `attention_mask` and `seq_idx`, and what the layers want.

A convolution and a recurrence must not see padding between a state and the tokens that continue it, so padding wherever
it stands is moved behind the row's real tokens, at every batch size. The checks read values, for which the CPU waits
for a GPU; a caller who has made them on the CPU (`in_order`) can say so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moai_core.errors import UsageError


def in_order(seq_idx: Tensor) -> bool:
    """Whether seq_idx (B, L) is as the layers want it: never decreasing in a row, padding (< 0) only at its end."""
    one, other = seq_idx[:, :-1], seq_idx[:, 1:]
    return not bool(((other >= 0) & (other < one) | (one < 0) & (other >= 0)).any())


def real_tokens_first(
    attention_mask: Tensor | None, seq_idx: Tensor | None, shape: tuple[int, int], *, known: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Document numbers with -1 at each row's end (None where nothing is packed or padded), and the order (B, L) that
    puts it there (None = as it is).

    known: seq_idx is in order already. Raises UsageError for other shapes than `shape` (B, L) and for a seq_idx that
    decreases.
    """
    for name, given in (("attention_mask", attention_mask), ("seq_idx", seq_idx)):
        if given is not None and tuple(given.shape) != shape:
            raise UsageError(f"{name} must have the shape of input_ids {shape} (got {tuple(given.shape)})")
    known = known and attention_mask is None
    seq_idx = numbered(attention_mask, seq_idx)
    if seq_idx is None or known:
        return seq_idx, None
    pad = seq_idx < 0
    order = None
    if bool((pad[:, :-1] & ~pad[:, 1:]).any()):
        order = pad.to(torch.int8).argsort(dim=1, stable=True)
        seq_idx = seq_idx.gather(1, order)
    falls = (seq_idx[:, 1:] < seq_idx[:, :-1]) & (seq_idx[:, 1:] >= 0)
    if bool(falls.any()):
        row, column = falls.nonzero()[0].tolist()
        one, other = seq_idx[row, column : column + 2].tolist()
        raise UsageError(f"seq_idx must not decrease within a row: row {row} has {one} before {other}")
    return seq_idx, order


def numbered(attention_mask: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """seq_idx (B, L) int32 with -1 where attention_mask is 0; None where nothing is packed or padded."""
    if attention_mask is not None and not bool(attention_mask.all()):
        pad = attention_mask == 0
        return (torch.zeros_like(pad, dtype=torch.int32) if seq_idx is None else seq_idx.to(torch.int32)).masked_fill(
            pad, -1
        )
    return None if seq_idx is None else seq_idx.to(torch.int32)
