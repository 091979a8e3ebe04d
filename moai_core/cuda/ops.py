"""Operators of PyTorch whose calls cost the host little, so that `torch.compile`, FSDP and CUDA graphs know the kernels
and a training step of small kernels isn't limited by Python.

`torch.library.custom_op` with `register_autograd` does the same and wraps every call: a check of aliases, a class and
closures of metadata for autograd, defaults filled in. Here the schema is written out, the dispatcher calls the function
that launches, and only a call that needs a gradient enters autograd, through a `torch.autograd.Function` written by
hand. Leaves out second derivatives (backward passes call operators without one), keyword arguments and defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["below", "define", "dense"]

_LIBRARY = torch.library.Library("moai", "FRAGMENT")

# `with below():` operators called inside skip autograd.
below = torch._C._AutoDispatchBelowAutograd


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: type[torch.autograd.Function] | None = None,
) -> OpOverload:
    """Registers the operator moai::NAME and returns it, to be called with positional arguments.

    schema: "NAME(Tensor x, float eps) -> Tensor", where `Tensor(a!) x` is written to. run: does it, on every device
    that asks; results are fresh memory and share none. fake: makes results of the same shapes, dtypes and strides
    without looking at numbers. gradient: how to differentiate; its forward gets the operator's arguments, calls the
    operator inside of `below()` and returns the results as they are. Without one, asking for a derivative of
    the results is a RuntimeError.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moai::{name}", fake, lib=_LIBRARY)
    operator: OpOverload = getattr(torch.ops.moai, name).default
    _LIBRARY.impl(name, _differentiable(operator, gradient or _last(operator)), "Autograd")
    aliases = [argument.alias_info for argument in operator._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]
    if written:
        _LIBRARY.impl(name, _counted(operator, written), "ADInplaceOrView", with_keyset=True)
    return operator


def dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, contiguous memory of x's shape; in half the time of `x.new_empty(x.shape)`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _differentiable(operator: OpOverload, gradient: type[torch.autograd.Function]) -> Callable[..., Any]:
    apply, enabled, any_requires_grad = gradient.apply, torch.is_grad_enabled, torch._C._any_requires_grad

    def autograd(*args: Any) -> Any:
        if enabled() and any_requires_grad(*args):
            return apply(*args)
        with below():
            return operator(*args)

    return autograd


def _last(operator: OpOverload) -> type[torch.autograd.Function]:
    """For an operator without derivative. Stricter than `once_differentiable`, which looks at incoming gradients only
    and would leave out what a second derivative owes to saved tensors.
    """

    class Last(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with below():
                return operator(*args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(f"{operator} has no derivative")

    return Last


def _counted(operator: OpOverload, written: list[int]) -> Callable[..., Any]:
    """Autograd's count of changes goes up for what the operator writes to."""

    def count(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version([args[i] for i in written])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return count
