"""The grid that a group of weights is rounded to: its scale, chosen among clipped ranges by the error that it leaves.

Rounding a group to the range of its largest value spends levels on one weight; a range a little smaller clips that one
and rounds all others finer. The search tries ranges from the whole one down and keeps, for each group of each row, the
one with the least error of rounding, weighted as the caller says:

    None         sum of squares
    (I,)         each input channel by its importance, such as the mean of its squared inputs
    (I/g, g, g)  the error of the group's own part of the output, e M e^T with M the second moments of its inputs

Symmetric int4 has sixteen levels, -8 to 7: a scale whose sign puts the group's largest value on the side of the -8 uses
all of them (as llama.cpp's Q4_0 does). Scales are rounded to fp16 before anything is measured, because that is what is
stored. Left out: formats whose levels aren't evenly spaced (they round to nearest only).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_core.errors import CheckpointError, UsageError
from moai_core.quant.formats import FORMATS, Spec

# The smallest range that is tried, as a share of the whole one, and how many are.
SMALLEST, STEPS = 0.5, 24
# Formats with evenly spaced levels.
EVEN = ("int4", "int8")
# So many weights at a time stay in a processor's cache.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}
# The least scale that fp16 can hold.
_TINY = 2.0**-24


class Grid(NamedTuple):
    """What a group is rounded to: whole multiples `low` to `high` of `scale`. scale (O, G) holds fp16's numbers; low
    and high are numbers or (O, G); zeros = -low where they differ by group, else None.
    """

    scale: Tensor
    low: float | Tensor
    high: float | Tensor
    zeros: Tensor | None

    def round(self, groups: Tensor) -> Tensor:
        """groups (O, G, g) -> the nearest values of the grid, same shape."""
        return _round(groups, self.scale, self.low, self.high)


def check_weight(name: str, weight: Tensor) -> None:
    """Raises CheckpointError for NaN or infinity in `weight`, UsageError where fp16 scales can't reach its values."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise CheckpointError(
            f"{name}: {bad} of {weight.numel()} values are NaN or infinite", hint="quantize an intact checkpoint"
        )
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest > 60000.0:
        raise UsageError(f"{name}: holds {largest:.3g}, beyond the range of fp16 scales", hint="leave it unquantized")


def levels(spec: Spec) -> tuple[int, int]:
    """(lowest, highest) whole multiple of the scale; of asymmetric int4, with a zero of 0. Raises UsageError for a
    format without evenly spaced levels.
    """
    if spec.format == "int4":
        return (-8, 7) if spec.symmetric else (0, 15)
    if spec.format == "int8":
        return -127, 127
    raise UsageError(f"{spec.format} has no evenly spaced levels to search", hint="gptq and awq write int4 and int8")


def split(spec: Spec, weight: Tensor) -> Tensor:
    """weight (O, I) as its groups (O, G, g)."""
    return weight.unflatten(1, (-1, spec.group_size or weight.shape[1]))


def clip(
    spec: Spec,
    weight: Tensor,
    importance: Tensor | None = None,
    *,
    steps: int = STEPS,
    signed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The scales (O, G) fp16, and zeros (O, G) fp16 of asymmetric int4, of the best of `steps` ranges (1: no search).

    weight (O, I) floating, importance as above. signed: allow negative scales of symmetric int4. Rows are independent
    of each other. Raises UsageError for other formats than int4 and int8.
    """
    groups = split(spec, weight)
    scales, zeros = [], []
    for part in _rows(groups):
        grid = search(spec, part, importance, steps=steps, signed=signed)
        scales.append(grid.scale.half())
        zeros += [grid.zeros.half()] if grid.zeros is not None else []
    return torch.cat(scales), torch.cat(zeros) if zeros else None


def search(
    spec: Spec, groups: Tensor, importance: Tensor | None = None, *, steps: int = STEPS, signed: bool = True
) -> Grid:
    """`clip` for groups (O, G, g) in one piece."""
    whole = _whole(spec, groups, signed)
    if steps <= 1:
        return whole
    weights = importance
    if weights is not None and weights.dim() == 1:
        weights = weights.view(groups.shape[1:])
    best, least = whole.scale.clone(), _error(whole.round(groups) - groups, weights)
    for share in torch.linspace(1.0, SMALLEST, steps).tolist()[1:]:
        tried = whole._replace(scale=_storable(whole.scale * share))
        error = _error(tried.round(groups) - groups, weights)
        better = error < least
        best, least = torch.where(better, tried.scale, best), torch.where(better, error, least)
    return whole._replace(scale=best)


def nearest(spec: Spec, weight: Tensor, *, steps: int = STEPS, signed: bool = True) -> dict[str, Tensor]:
    """The stored tensors of weight (O, I) rounded to nearest: with searched ranges for int4 and int8, with the format's
    own scales for others. For what is chosen without data.
    """
    storage: Any = FORMATS[spec.format]
    if spec.format not in EVEN:
        return storage.encode(spec, weight)
    scales, zeros = clip(spec, weight.float(), steps=steps, signed=signed)
    return storage.encode_with(spec, weight, scales, *([] if zeros is None else [zeros]))


def rounded(spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """weight (O, I) rounded to the nearest values of the given scales' and zeros' grid, in weight's dtype."""
    low, high = levels(spec)
    groups, scale = split(spec, weight), scales.to(weight.dtype)
    if zeros is None:
        return _round(groups, scale, low, high).flatten(1)
    zero = zeros.to(weight.dtype)
    return _round(groups, scale, low - zero, high - zero).flatten(1)


def _whole(spec: Spec, groups: Tensor, signed: bool) -> Grid:
    """The grid of the whole range of each group."""
    low, high = levels(spec)
    top, bottom = groups.amax(-1), groups.amin(-1)
    if spec.format == "int4" and not spec.symmetric:
        top, bottom = top.clamp(min=0), bottom.clamp(max=0)
        zero = (-bottom * high / (top - bottom).clamp(min=torch.finfo(groups.dtype).tiny)).round()
        return Grid(_storable((top - bottom) / high), low - zero, high - zero, zero)
    scale = torch.maximum(top / high, bottom / low)
    if signed:
        turned = torch.maximum(top / -low, -bottom / high)
        scale = torch.where(turned < scale, -turned, scale)
    return Grid(_storable(scale), low, high, None)


def _storable(scale: Tensor) -> Tensor:
    """As fp16 keeps it; one that is zero there becomes the least that isn't (a group of zeros needs some scale)."""
    kept = scale.half().to(scale.dtype)
    return torch.where(kept == 0, torch.copysign(torch.full_like(kept, _TINY), scale), kept)


def _round(groups: Tensor, scale: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    step = scale.unsqueeze(-1)
    whole = (groups / step).round_()
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        whole = whole.clamp_(low.unsqueeze(-1), high.unsqueeze(-1))
    elif isinstance(low, (int, float)) and isinstance(high, (int, float)):
        whole = whole.clamp_(low, high)
    return whole.mul_(step)


def _error(error: Tensor, weights: Tensor | None) -> Tensor:
    """(O, G) from the errors of rounding (O, G, g)."""
    if weights is None:
        return error.square_().sum(-1)
    if weights.dim() == 2:
        return error.square_().mul_(weights.to(error.dtype)).sum(-1)
    by_group = error.transpose(0, 1)
    return (torch.matmul(by_group, weights.to(error.dtype)) * by_group).sum(-1).transpose(0, 1)


def _rows(groups: Tensor) -> Iterator[Tensor]:
    count = max(1, _CHUNK.get(groups.device.type, 1 << 22) // max(1, groups[0].numel()))
    yield from groups.split(count)
