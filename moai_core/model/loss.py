"""Cross-entropy of the next token, computed with the head in chunks of tokens, so that tokens x vocabulary logits never
exist at once.
 Gradients are taken chunk by chunk in the forward pass, while a chunk's logits are at hand: the same number of matrix
products as the plain form, without keeping or recomputing logits (the idea of Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989). The head is called as a module, so that quantized, adapted and tied heads work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100

# fp32 logits that exist at once. A CPU wants them in cache; a GPU wants matrix products of a good size.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}


def shift_labels(labels: Tensor, seq_idx: Tensor | None) -> Tensor:
    """labels (B, L) in the Hugging Face convention -> the target of each position: the next token of the same document,
    else IGNORED.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    if seq_idx is not None:
        targets[:, :-1].masked_fill_((seq_idx[:, 1:] != seq_idx[:, :-1]) | (seq_idx[:, 1:] < 0), IGNORED)
    return targets


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: nn.Module, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of head(hidden) against targets.

    hidden (..., H) any dtype, targets (...) int64 with IGNORED where nothing is predicted. Returns an fp32 scalar: the
    mean over counted targets, or the sum divided by `num_items` (for accumulation over micro-batches by token counts).
    No counted target gives zero.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count: Tensor | int = (targets != IGNORED).sum().clamp(min=1) if num_items is None else num_items
    if not hidden.is_cuda:
        # Prompts and padding predict nothing: their logits need not be computed. (On a GPU the unknown shape would cost
        # a synchronisation.)
        keep = (targets != IGNORED).nonzero().squeeze(-1)
        if len(keep) < len(targets):
            hidden, targets = hidden[keep], targets[keep]
    parameters = [p for p in head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        return _ChunkedCrossEntropy.apply(hidden, targets, head, *parameters) / count
    total = torch.zeros((), device=hidden.device)
    for rows, labels in _chunks(hidden, targets, head):
        total = total + F.cross_entropy(head(rows).float(), labels, reduction="sum", ignore_index=IGNORED)
    return total / count


def _chunks(hidden: Tensor, targets: Tensor, head: nn.Module):
    vocabulary = getattr(head, "out_features", None) or 1 << 17
    size = max(16, _CHUNK.get(hidden.device.type, _CHUNK["cuda"]) // vocabulary)
    return zip(hidden.split(size), targets.split(size), strict=True)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Module, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        d_hidden: list[Tensor] = []
        d_parameters: list[Tensor] = []
        for rows, labels in _chunks(hidden.detach(), targets, head):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                loss = F.cross_entropy(head(rows).float(), labels, reduction="sum", ignore_index=IGNORED)
                d_rows, *d_chunk = torch.autograd.grad(loss, [rows, *parameters])
            total = total + loss.detach()
            d_hidden.append(d_rows)
            if not d_parameters:
                # Sums over many chunks: fp32 even where the weights are not. They begin as the first chunk's.
                d_parameters = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in d_chunk]
            else:
                for grad, part in zip(d_parameters, d_chunk, strict=True):
                    grad.add_(part)
        d_all = torch.cat(d_hidden) if d_hidden else torch.zeros_like(hidden)
        d_parameters = d_parameters or [torch.zeros_like(p) for p in parameters]
        ctx.save_for_backward(d_all, *(g.to(p.dtype) for g, p in zip(d_parameters, parameters, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        d_hidden, *d_parameters = ctx.saved_tensors
        return (d_hidden * grad.to(d_hidden.dtype), None, None, *(g * grad.to(g.dtype) for g in d_parameters))
