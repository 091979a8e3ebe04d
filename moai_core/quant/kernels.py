"""Who multiplies with a quantized matrix: one module a kernel, asked in the order of preference.

A kernel is a module of this package with

    why_not(spec, device, dtype) -> one sentence, or None if it can multiply inputs of this type there
    prepare(spec, tensors) -> the weights in its own order, made once
    linear(spec, prepared, x (M, I), out) -> (M, O) in x's dtype
    values(spec, prepared, out, columns, dtype) -> W (O, I) for gradients, where it can tell from `prepared`
    describe(spec, device, dtype) -> one line for `moai doctor` and reports

`dequantize` is exact, slow for few rows, and refuses nothing; where it is taken because the others refuse, their
reasons can be shown (`explain`). One named by the user is used or refused with its reason, never replaced.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

from moai_core.errors import UsageError
from moai_core.quant.formats import Spec

KERNELS = ("cuda", "cpu", "scaled_mm", "bitsandbytes", "dequantize")


def module(name: str) -> ModuleType:
    """The kernel of this name, imported when first asked for."""
    return import_module(f"moai_core.quant.{name}")


def explain(spec: Spec, device: torch.device | str, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """Every kernel in the order of preference with the reason why it can't do this, or None if it can."""
    return [(name, module(name).why_not(spec, torch.device(device), dtype)) for name in KERNELS]


@lru_cache(maxsize=256)
def pick(spec: Spec, device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> ModuleType:
    """The first kernel that doesn't refuse, or the one named. Raises UsageError where that one refuses."""
    if wanted != "auto":
        if wanted not in KERNELS:
            raise UsageError(f"unknown kernel {wanted!r}", hint=f"choose one of: auto, {', '.join(KERNELS)}")
        if (reason := module(wanted).why_not(spec, device, dtype)) is not None:
            raise UsageError(f"kernel {wanted!r} can't be used here: {reason}", hint="auto lets moai choose")
        return module(wanted)
    return module(next(name for name, reason in explain(spec, device, dtype) if reason is None))


def describe(spec: Spec, device: torch.device | str, dtype: torch.dtype, wanted: str = "auto") -> str:
    """What multiplies, in one line."""
    device = torch.device(device)
    return pick(spec, device, dtype, wanted).describe(spec, device, dtype)
