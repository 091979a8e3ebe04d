"""Selective checkpointing: what a layer computes cheaply from what it keeps anyway is made again in the backward pass
instead of kept (Korthikanti et al., arXiv 2205.05198, chose by operation; here the model says which tensors).

A `Recomputed` is a tensor with the way to make it again. `call` hands its tensor to a function and takes it out of
what autograd saves there: whatever is saved of its storage (views and reshapes too) becomes a note of how to make it
again. The function is called as it is, so that quantized and adapted projections work, and nothing but the cheap parts
(norms, convolution, dt_proj, SwiGLU's product) runs twice: no large matrix product, not the scan. The same kernels on
the same inputs give the same bits, so gradients don't change by one. Where products.py has a node of its own, norms and
SwiGLU's product are made again there, by the kernels that compute the gradients beside them.

Why not `torch.utils.checkpoint` with a policy: it runs the whole layer again under a dispatch mode, tens of
microseconds of Python an operation; here a layer pays for the twenty tensors that its matrix products and scan save.
Left out: compiled models, whose partitioner makes this choice itself, and anything random, which has no second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _Again:
    """How to make a tensor again; shared by all that saved it, made once for them and dropped after the last."""

    __slots__ = ("autocast", "left", "make", "source", "users", "value")

    def __init__(self, make: Callable[[], Tensor], kind: str, source: _Again | None = None) -> None:
        self.make, self.source, self.users, self.left = make, source, 0, 0
        self.value: Tensor | None = None
        # A backward pass usually runs outside of the autocast that the forward pass ran in.
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def use(self) -> None:
        """Counts one who will take the tensor."""
        if self.source is not None and not self.users:
            self.source.use()
        self.users += 1

    def take(self) -> Tensor:
        if self.value is None:
            kind, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(kind, dtype, enabled):
                self.value = self.make()
            self.left = self.users
        value, self.left = self.value, self.left - 1
        if self.left <= 0:
            self.value = None
        return value


class Recomputed:
    """A tensor of the forward pass that need not be kept, and `make`, which gives the same bits again.

    make: called without gradients, under the autocast of the forward pass. What it holds on to stays in memory until
    the backward pass: it must be what is kept anyway, detached. A tensor that shares its storage with others is kept.
    """

    __slots__ = ("again", "storage", "tensor")

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor], source: _Again | None = None) -> None:
        alone = tensor.untyped_storage().nbytes() == tensor.nbytes
        self.tensor, self.storage = tensor, _storage(tensor) if alone else None
        self.again = _Again(make, tensor.device.type, source)

    def passed_on(self, tensor: Tensor) -> Recomputed:
        """The same under another name: `tensor` looks at the same memory, with a history of its own."""
        assert _storage(tensor) == _storage(self.tensor)
        other = object.__new__(Recomputed)
        other.tensor, other.storage, other.again = tensor, self.storage, self.again
        return other

    def cast(self) -> Recomputed:
        """What autocast makes of the tensor for a matrix product, so that this copy isn't kept either."""
        again = self.again
        _, dtype, enabled = again.autocast
        if not enabled or dtype == self.tensor.dtype or self.tensor.dtype == torch.float64:
            return self
        return Recomputed(self.tensor.to(dtype), lambda: again.take().to(dtype), again)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) with each `Recomputed` among `args` as its tensor, which autograd doesn't keep.

    A module is taken for a matrix product: autocast's copy of its input isn't kept either.
    """
    if not any(isinstance(arg, Recomputed) for arg in args):
        return function(*args, **kwargs)
    product = isinstance(function, nn.Module)
    args = tuple(arg.cast() if product and isinstance(arg, Recomputed) else arg for arg in args)
    dropped = {arg.storage: arg for arg in args if isinstance(arg, Recomputed)}
    tensors = [tensor_of(arg) for arg in args]

    def pack(saved: Tensor) -> Any:
        known = dropped.get(_storage(saved))
        if known is None or saved.dtype != known.tensor.dtype:
            return saved
        known.again.use()
        return known.again, known.tensor.stride(), saved.shape, saved.stride(), saved.storage_offset()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return function(*tensors, **kwargs)
    finally:
        dropped.clear()  # autograd holds on to the pack hook as long as to what it packed


def tensor_of(x: Any) -> Any:
    """The tensor of a `Recomputed`; anything else as it is."""
    return x.tensor if isinstance(x, Recomputed) else x


def repeatable(module: nn.Module) -> bool:
    """Whether a module gives the same result twice: an adapter's dropout does not."""
    return not any(isinstance(part, _DROPOUTS) and part.p > 0 and part.training for part in module.modules())


def split_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of x's last axis, as views. Autograd's own would fill two gradients of the whole with zeros and
    add them; here their halves are put together in one pass.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        one, other = x.chunk(2, dim=-1)
        return one, other
    return _SplitHalves.apply(x)


class _SplitHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x.chunk(2, dim=-1)
        return one, other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other], dim=-1)


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor looks at; unlike the address of its data, also told apart on the meta device."""
    return tensor.untyped_storage()._cdata


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    again, layout, shape, stride, offset = packed
    made = again.take()
    assert made.stride() == layout and not made.storage_offset(), "made again with another layout"
    return made.as_strided(shape, stride, offset)
