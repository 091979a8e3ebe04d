"""Cross-entropy of the next token, computed with the head in chunks of tokens, so that tokens x vocabulary logits never
exist at once.

Gradients are taken chunk by chunk in the forward pass, while a chunk's logits are at hand: the same number of matrix
products as the plain form, without keeping or recomputing logits (the idea of Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989). The head is called as a module, so that quantized, adapted and tied heads work. With
moai's CUDA kernels the logits' gradient takes the place of the logits, and nothing of that size is ever fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moai_core.model import fused, products
from moai_core.tracing import untraced

IGNORED = -100

# Logits that exist at once. A CPU wants them in cache; a GPU wants matrix products of a good size. The kernels work in
# place on 16-bit logits, so that 2 GiB of them (8192 tokens of a vocabulary of 128000) take no more than the other
# way's copies; mostly that is one chunk, and the gradients of the head need not be summed over chunks, which costs a
# pass over three times their size a chunk. The step has room for it here: no layer has its gradients yet.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27, "fused": 1 << 30}

# Up to so many chunks a 16-bit head's gradients are summed in their own dtype: each sum rounds once more, as adding to
# `.grad` does over micro-batches. fp32 sums would read and write twice the bytes and hold a copy of the head.
_FEW = 4

# Where the head is a plain matrix, its gradients are summed inside of the product that makes them: chunks cost nothing
# but those roundings, and are a few as soon as so many bytes of logits exist at once.
_SMALL = 1 << 29


def shift_labels(labels: Tensor, seq_idx: Tensor | None) -> Tensor:
    """labels (B, L) in the Hugging Face convention -> the target of each position: the next token of the same document,
    else IGNORED.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    if seq_idx is not None:
        targets[:, :-1].masked_fill_((seq_idx[:, 1:] != seq_idx[:, :-1]) | (seq_idx[:, 1:] < 0), IGNORED)
    return targets


@untraced("gradients are taken inside of the forward pass")
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
        if not fused.usable(hidden) or _logits_dtype(hidden) == torch.float16:
            return _ChunkedCrossEntropy.apply(hidden, targets, head, None, *parameters) / count
        # Divided where the logits' gradients are made, which costs nothing. (Not in fp16: they would vanish.)
        scale = torch.ones((), device=hidden.device) / count
        return _ChunkedCrossEntropy.apply(hidden, targets, head, scale, *parameters)
    total = torch.zeros((), device=hidden.device)
    for rows, labels in _chunks(hidden, targets, head):
        logits = head(rows)
        if fused.usable(logits):
            total = total + fused.cross_entropy(logits, labels).sum()
        else:
            total = total + F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
    return total / count


def _chunks(hidden: Tensor, targets: Tensor, head: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    vocabulary = getattr(head, "out_features", None) or 1 << 17
    size = max(16, _CHUNK.get(hidden.device.type, _CHUNK["cuda"]) // vocabulary)
    if fused.usable(hidden):
        most = _CHUNK.get("fused", _CHUNK["cuda"]) * 2 // (_logits_dtype(hidden).itemsize * vocabulary)
        # Chunks of one size, and of whole tiles of the matrix product.
        tile = 256 if most >= 256 else 16
        pieces = -(-len(hidden) // max(tile, most // tile * tile))
        # More than one chunk: a few. They need a second gradient of the head, and the activations of so many tokens
        # leave the less room for logits.
        pieces = pieces if pieces == 1 else max(pieces, _FEW)
        if pieces == 1 and _is_matrix(head, hidden):
            pieces = min(_FEW, -(-len(hidden) * vocabulary * hidden.itemsize // _SMALL))
        size = -(-len(hidden) // (pieces * tile)) * tile
    return zip(hidden.split(size), targets.split(size), strict=True)


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss, times scale if one is given."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, targets: Tensor, head: nn.Module, scale: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        d_hidden: list[Tensor] = []
        d_parameters: list[Tensor] = []
        chunks = list(_chunks(hidden.detach(), targets, head))
        few = fused.usable(hidden) and len(chunks) <= _FEW
        matrix = few and _is_matrix(head, hidden)
        for rows, labels in chunks:
            if matrix:
                loss, d_rows, d_weight = _gradients_of_matrix(rows, labels, parameters[0], scale, *d_parameters)
                total, d_parameters = total + loss, [d_weight]
                d_hidden.append(d_rows)
                continue
            loss, d_rows, *d_chunk = _gradients(rows, labels, head, scale, parameters)
            total = total + loss
            d_hidden.append(d_rows)
            if not d_parameters:
                # Sums over many chunks: fp32 even where the weights are not. They begin as the first chunk's.
                d_parameters = [g if few else g.to(torch.promote_types(g.dtype, torch.float32)) for g in d_chunk]
            else:
                for grad in d_parameters:
                    grad.add_(d_chunk.pop(0))
            d_chunk.clear()  # not held while the next chunk makes its own
        d_all = d_hidden[0] if len(d_hidden) == 1 else torch.cat(d_hidden)
        d_parameters = d_parameters or [torch.zeros_like(p) for p in parameters]
        ctx.save_for_backward(d_all, *(g.to(p.dtype) for g, p in zip(d_parameters, parameters, strict=True)))
        ctx.scaled = None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        if ctx.scaled is None and _separate(saved):
            # Nearly always by 1, and then free. A second backward pass through a retained graph finds them scaled.
            ctx.scaled = grad
            for g in saved:
                fused.scale_in_place(g, grad)
        else:
            factor = grad if ctx.scaled is None else grad / _not_zero(ctx.scaled)
            saved = tuple(g * factor.to(g.dtype) for g in saved)
        d_hidden, *d_parameters = saved
        return d_hidden, None, None, None, *d_parameters


def _is_matrix(head: nn.Module, hidden: Tensor) -> bool:
    """Whether the head is nothing but a trained matrix, of the type that it multiplies in."""
    if not products.plain(head) or not isinstance(head.weight, Tensor):
        return False
    return head.weight.requires_grad and head.weight.dtype == hidden.dtype == _logits_dtype(hidden)


def _gradients_of_matrix(
    rows: Tensor, labels: Tensor, weight: Tensor, scale: Tensor | None, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_gradients`; what earlier chunks gave for the matrix is added inside of the product."""
    logits = F.linear(rows, weight)
    loss = fused.cross_entropy_gradient(logits, labels, scale).sum()
    d_rows = logits @ weight
    gradient = logits.T @ rows if gradient is None else gradient.addmm_(logits.T, rows)
    return loss if scale is None else loss * scale, d_rows, gradient


def _gradients(
    rows: Tensor, labels: Tensor, head: nn.Module, scale: Tensor | None, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """(summed loss, its gradients of rows and parameters), all times scale."""
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        if fused.usable(rows):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                logits = head(rows)
        else:
            logits = head(rows)
        if not fused.usable(logits):
            loss = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
            loss = loss if scale is None else loss * scale
            return loss.detach(), *torch.autograd.grad(loss, [rows, *parameters])
    d_logits, _ = logits.detach(), note(rows)
    if not d_logits.is_contiguous() or d_logits.untyped_storage().data_ptr() in kept:
        # A head that needs its result again (a soft cap does) or gives back what it was given.
        d_logits = d_logits.clone(memory_format=torch.contiguous_format)
    loss = fused.cross_entropy_gradient(d_logits, labels, scale).sum()
    return loss if scale is None else loss * scale, *torch.autograd.grad(logits, [rows, *parameters], d_logits)


def _separate(tensors: tuple[Tensor, ...]) -> bool:
    """Whether these can be changed in place, one by one."""
    own = {t.untyped_storage().data_ptr() for t in tensors}
    return len(own) == len(tensors) and all(t.is_contiguous() and fused.usable(t) for t in tensors)


def _not_zero(scaled: Tensor) -> Tensor:
    if not bool(scaled):
        raise RuntimeError("an earlier backward pass through this loss multiplied its gradients by zero")
    return scaled
