"""The kernels of cross_entropy.cu as operators of PyTorch, as fused_ops.py has those of norms and SwiGLU. Cross-entropy
has no derivative here: loss.py takes the gradient that the kernel leaves in the logits' place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.cuda.rows import multiprocessors, vector


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return _launch_cross_entropy(logits.contiguous(), targets, None, write=False)


def _cross_entropy_gradient(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    assert logits.is_contiguous()
    return _launch_cross_entropy(logits, targets, scale, write=True)


def _launch_cross_entropy(logits: Tensor, targets: Tensor, scale: Tensor | None, *, write: bool) -> Tensor:
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    v = vector(vocabulary, logits)
    vectors, width = vocabulary // v, v * logits.element_size()
    block = next((b for b in (128, 256, 512) if vectors <= 4 * b), 1024)
    # As much of the row as fits beside the block's own few numbers stays on the multiprocessor between its two passes.
    kept = min(vectors, (_shared_memory(logits.device) - 512) // width) if write else 0
    _cross_entropy_kernel("cross_entropy", logits, v, block)(
        rows, block, logits, targets.contiguous(), scale, losses, vocabulary, kept, int(write), shared=kept * width
    )
    return losses


def scale_in_place(x: Tensor, by: Tensor) -> None:
    """See fused.scale_in_place."""
    v = vector(x.numel(), x)
    grid = min(-(-x.numel() // (256 * v)), 8 * multiprocessors(x.device))
    _cross_entropy_kernel("scale_in_place", x, v, 1024)(grid, 256, x, by, x.numel())


def _cross_entropy_kernel(name: str, x: Tensor, v: int, block: int) -> Any:
    return cuda.kernel("cross_entropy.cu", name, x.device, T=cuda.TYPES[x.dtype], V=v, BLOCK=block)


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def _fake_losses(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


cross_entropy = ops.define("cross_entropy(Tensor logits, Tensor targets) -> Tensor", _cross_entropy, _fake_losses)
cross_entropy_gradient = ops.define(
    "cross_entropy_gradient(Tensor(a!) logits, Tensor targets, Tensor? scale) -> Tensor",
    _cross_entropy_gradient,
    _fake_losses,
)
