"""What stands between the matrix products of a layer, each as one pass over memory: norms, the sum with the residual
stream before them, SwiGLU's product, cross-entropy.

On a CUDA device these are kernels of moai_core/cuda (arithmetic in fp32, no atomics, no synchronisation, usable in
CUDA graphs); elsewhere, and for dtypes that the kernels don't know, the same mathematics in torch's own operations.
What a function saves for its backward pass are its arguments and results (and a number a row), so that a
`saved_tensors_hooks` that recognises a norm's result can drop and recompute it.

    rms_norm(x, weight, eps) -> y
    add_rms_norm(residual, x, weight, eps) -> (residual + x, rms_norm(residual + x))
    small_norms(x, weights, eps) -> [rms_norm of each slice of x's last axis]
    swiglu(gate, up) -> silu(gate) * up

Left out: everything that a matrix product could take into its own epilogue.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in fp32 or wider (arXiv 1910.07467).

    x (..., size) in any floating dtype; its rows may be slices of longer ones. weight (size,). Returns (..., size) in
    the weight's dtype. Saves x, weight and the scale of each row (fp32).
    """
    return _torch_rms_norm(x, weight, eps)


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after a block, and its norm for the next one: (residual + x, rms_norm(residual + x)).

    residual (..., size) and x (..., size) in any floating dtypes, or x None where nothing is to be added (the first
    layer): then the stream comes back as it is. The sum has the wider dtype of the two, the norm the weight's. Saves
    the sum, weight and the scale of each row (fp32). The gradients of the sum that come back through both results are
    added in the same pass.
    """
    total = residual if x is None else residual + x
    return total, rms_norm(total, weight, eps)


def small_norms(x: Tensor, weights: list[Tensor], eps: float) -> list[Tensor]:
    """rms_norm of adjacent slices of x's last axis, each with its own weight: the norms of dt, B and C in one pass.

    x (..., sum of sizes), not split; weights (size_i,). Returns contiguous tensors (..., size_i) in the weights' dtype.
    """
    parts = x.split([weight.shape[0] for weight in weights], dim=-1)
    return [rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), same shapes and dtypes. Saves gate and up only."""
    return F.silu(gate) * up


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(weight.dtype)
