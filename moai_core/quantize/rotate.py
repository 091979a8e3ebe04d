"""Rotating a matrix product's inputs before its weights are rounded (quant/hadamard.py has the rotation itself).

    y W^T = (y T) (W T^-T)^T

The rotated weights hold no column that stands out, and no input does: the channels of out_proj's input, some of which
are a hundred times louder than others (Quamba2, arXiv 2503.22879), are mixed with all others. GPTQ then works with the
moments of the rotated inputs, T^T H T. The layer applies T to its inputs for good (`quantization.rotate` in
config.json).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from moai_core.errors import UsageError
from moai_core.quant import hadamard
from moai_core.quantize.runner import Statistics

# The modules whose inputs may be rotated; of the others several read the same inputs, or they come from a norm.
ROTATABLE = ("mamba.out_proj", "feed_forward.down_proj")


def check(names: Collection[str], columns: dict[str, int]) -> None:
    """Raises UsageError for a module that can't be rotated, or has no cheap rotation of its width."""
    for name in names:
        if name not in ROTATABLE:
            raise UsageError(f"the inputs of {name} can't be rotated", hint=f"{' and '.join(ROTATABLE)} can")
        if name in columns and (reason := hadamard.why_not(columns[name])):
            raise UsageError(f"the inputs of {name} can't be rotated: {reason}")


def forth(weight: Tensor, statistics: Statistics | None) -> tuple[Tensor, Statistics | None]:
    """The weight (O, I) and the inputs' statistics behind the rotation. Of the latter mean_abs and max_abs, which no
    sum knows, are taken as of inputs with a normal distribution.
    """
    if statistics is None:
        return hadamard.fold(weight), None
    second = hadamard.moments(statistics.hessian)
    deviation = second.diagonal().clamp(min=0).sqrt()
    return hadamard.fold(weight), Statistics(statistics.count, second, deviation * 0.7979, deviation * 4)


def turn(module: nn.Module) -> None:
    """Rotate all inputs of a module from now on, as a quantized layer with a rotation does (quant/linear.py)."""
    module.register_forward_pre_hook(lambda _, args: (hadamard.apply(args[0]), *args[1:]))
