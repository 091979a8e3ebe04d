"""What stands between the matrix products of a layer, each as one pass over memory: norms, the sum with the residual
stream before them, SwiGLU's product, cross-entropy.

On a CUDA device these are kernels of moai_core/cuda (arithmetic in fp32, no atomics, no synchronisation; fused_ops.py
makes them operators of PyTorch). Elsewhere, and for what the kernels don't know (float64, rows of more than 32768), it
is the same mathematics in torch's own operations. What a function saves for its backward pass are its arguments and
results (and a number a row), so that `saved_tensors_hooks` which know a norm's result can drop it and make it again.

    rms_norm(x, weight, eps) -> y
    add_rms_norm(residual, x, weight, eps) -> (residual + x, rms_norm(residual + x))
    small_norms(x, weights, eps) -> [rms_norm of each slice of x's last axis]
    swiglu(gate, up) -> silu(gate) * up
    cross_entropy(logits, targets), cross_entropy_gradient(logits, targets, scale): for loss.py, without autograd

Left out: everything that a matrix product could take into its own epilogue; second derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import cuda
from moai_core.cuda.rows import WIDEST
from moai_core.model import fused_ops as ops
from moai_core.model import loss_ops


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in fp32 or wider (arXiv 1910.07467).

    x (..., size) in any floating dtype; its rows may be slices of longer ones. weight (size,). Returns (..., size) in
    the weight's dtype. Saves x, weight and the scale of each row (fp32).
    """
    if x.shape[-1] <= WIDEST and usable(x, weight):
        return ops.rms_norm(x, weight, eps, weight.dtype)[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(weight.dtype)


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after a block, and its norm for the next one: (residual + x, rms_norm(residual + x)).

    residual (..., size) and x (..., size) in any floating dtypes, or x None where nothing is to be added (the first
    layer): then the stream comes back as it is. The sum has the wider dtype of the two, the norm the weight's. Saves
    the sum, weight and the scale of each row (fp32). The gradients of the sum that come back through both results are
    added in the same pass.
    """
    if x is None:
        return residual, rms_norm(residual, weight, eps)
    if residual.shape == x.shape and x.shape[-1] <= WIDEST and usable(residual, x, weight):
        wide = torch.promote_types(residual.dtype, x.dtype)
        total, y, _ = ops.add_rms_norm(residual.to(wide), x, weight, eps, weight.dtype)
        return total, y
    total = residual + x
    return total, rms_norm(total, weight, eps)


def small_norms(x: Tensor, weights: list[Tensor], eps: float) -> list[Tensor]:
    """rms_norm of adjacent slices of x's last axis, each with its own weight: the norms of dt, B and C in one pass.

    x (..., sum of sizes), not split; weights (size_i,). Returns contiguous tensors (..., size_i) in the weights' dtype.
    """
    same = len({weight.dtype for weight in weights}) == 1
    if len(weights) == 3 and same and x.shape[-1] <= ops.WIDEST_SMALL and usable(x, *weights):
        return list(ops.small_norms(x, *weights, eps)[:3])
    parts = x.split([weight.shape[0] for weight in weights], dim=-1)
    return [rms_norm(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), same shapes and dtypes. Saves gate and up only."""
    if gate.shape == up.shape and gate.dtype == up.dtype and usable(gate, up):
        return ops.swiglu(gate, up)
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (rows,) in fp32 of logits (rows, V) against targets (rows,) int64: 0 where a target is -100, NaN
    where it is no token. Only for what is `usable`; no gradient.
    """
    return loss_ops.cross_entropy(logits, targets)


def cross_entropy_gradient(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    """As `cross_entropy`, and overwrites the logits (contiguous) with the gradient of the sum of the losses, times
    scale (one fp32 number on their device, None for 1).
    """
    return loss_ops.cross_entropy_gradient(logits, targets, scale)


def scale_in_place(x: Tensor, by: Tensor) -> None:
    """x *= by, an fp32 number on x's device; costs nothing where that is 1. x contiguous and `usable`. Not seen by
    autograd's count of changes: for a tensor that its caller knows to be nobody else's.
    """
    loss_ops.scale_in_place(x, by)


def usable(*tensors: Tensor) -> bool:
    """Whether moai's kernels can work on these tensors: they are not empty, on a device that has kernels, of a dtype
    that they know.
    """
    for t in tensors:
        if t.dtype not in cuda.TYPES or t.numel() == 0:
            return False
    return cuda.why_not(tensors[0].device) is None
