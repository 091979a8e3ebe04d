"""What `torch.compile` is to leave alone, said without importing it: `torch.compiler.disable` and its like load torch's
compiler with sympy behind it, which takes a second."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(reason: str) -> Callable[[F], F]:
    """As `torch.compiler.disable(reason=...)`: the function runs as it is, outside of what is compiled."""

    def wrap(function: F) -> F:
        # Made at the first call that could be traced: before torch's compiler is imported none is.
        disabled = functools.cache(lambda: torch.compiler.disable(function, reason=reason))

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return (disabled() if "torch._dynamo" in sys.modules else function)(*args, **options)

        # What torch.compiler.disable leaves on its result, by which tracing knows to stop before the call.
        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return wrap


def constant(function: F) -> F:
    """As `torch.compiler.assume_constant_result`: asked once while tracing, and not looked into."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
