"""AWQ (Lin et al., arXiv 2306.00978): input channels that carry much are scaled up before rounding, and the scale is
taken back where their inputs come from, so that the model computes the same.

    W x = (W s) (x / s);  s = mean|x|^a / mean|W|^(1-a), or mean|x|^a alone, for the best a of a grid

What is best is measured: the error of the output with the rounded weight, from the inputs' second moments. Afterwards
the range of each group is clipped by its own part of that error (search.py). Where 1/s goes:

    in_proj            <- the norm before it
    gate, up           <- the norm before them
    down               <- the rows of up
    dt_proj            <- the norm of dt, or without one the rows of x_proj that make dt
    out_proj           <- nothing stands before it: both its factors come out of a silu. A vector after convolution and
                          silu, `mamba.conv_scale`: the scan is linear in u, so y is scaled as u is, as long as dt, B
                          and C stay what they were, for which x_proj's columns are multiplied by s

Each is exact: a scale that goes into a stored norm is what its rounding there left of it, and one that goes into
matrices which aren't quantized, or onto activations, is a power of two. Left out: scaling B against C (a, 1/a: rows of
x_proj, which rounding of weights by row doesn't see).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moai_core.quant.formats import Spec
from moai_core.quantize import search
from moai_core.quantize.runner import Statistics

GRID = 20
# The search looks at no more rows than this: the scale belongs to the columns.
_ROWS = 256


class Masters:
    """A layer's matrices in fp32 while they are changed; the layer computes with them, rounded to its own type.

    stored: the type that what isn't quantized will be saved in (None: the layer's own).
    """

    def __init__(self, layer: nn.Module, stored: torch.dtype | None = None) -> None:
        self.layer, self.stored = layer, stored
        self.changed: set[str] = set()
        self._wide: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """The matrix (O, I) of a module, fp32 or wider."""
        if name not in self._wide:
            weight = self._parameter(name)
            self._wide[name] = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        return self._wide[name]

    def __setitem__(self, name: str, weight: Tensor) -> None:
        self._wide[name] = weight
        self._parameter(name).copy_(weight)
        self.changed.add(f"{name}.weight")

    def divide(self, name: str, scale: Tensor) -> Tensor:
        """Divide a norm's weight (n,) by scale (n,), round it as it is saved, and return the scale that this was."""
        weight = self._parameter(name)
        before = weight.to(scale.dtype, copy=True)
        weight.copy_((before / scale).to(self.stored or weight.dtype))
        self.changed.add(f"{name}.weight")
        after = weight.to(scale.dtype)
        # A weight of zero passes nothing on, whatever the columns behind it are multiplied by.
        return torch.where(after == 0, scale, before / after)

    def _parameter(self, name: str) -> Tensor:
        return self.layer.get_parameter(f"{name}.weight").data


@dataclass(frozen=True)
class Target:
    """Inputs that can be scaled: of the modules `readers`; `also` reads inputs that are scaled with them. into: where
    1/s goes, "norm" and "rows" of `source`, or "conv".
    """

    readers: tuple[str, ...]
    into: str
    source: str
    also: tuple[str, ...] = ()

    def matrices(self) -> set[str]:
        """The matrices that scaling changes."""
        return {*self.readers, *self.also, *({self.source} if self.into == "rows" else ())}


def targets(layer: nn.Module, specs: Collection[str], *, conv_scale: bool, rotated: Collection[str]) -> list[Target]:
    """What can be scaled in this layer for the sake of the modules in `specs`, but not for those `rotated`."""
    norms = bool(getattr(layer.get_submodule("mamba"), "norms", False))
    known = [
        Target(("mamba.in_proj",), "norm", "input_layernorm"),
        Target(("mamba.out_proj",), "conv", "mamba.conv_scale", ("mamba.x_proj",)) if conv_scale else None,
        Target(("mamba.dt_proj",), *(("norm", "mamba.dt_layernorm") if norms else ("rows", "mamba.x_proj"))),
        Target(("feed_forward.gate_proj", "feed_forward.up_proj"), "norm", "pre_ff_layernorm"),
        Target(("feed_forward.down_proj",), "rows", "feed_forward.up_proj"),
    ]
    return [one for one in known if one and set(one.readers) & set(specs) and not set(one.readers) & set(rotated)]


def scale(
    masters: Masters, target: Target, specs: Mapping[str, Spec], statistics: Mapping[str, Statistics], *,
    grid: int = GRID,
) -> tuple[Tensor, float]:  # fmt: skip
    """Search the scale (I,) for `target`, put it into the layer, and return what it exactly is, and the exponent a.

    specs: of the matrices that are quantized. statistics: of the inputs of the first reader, and of those `also` that
    are in specs. Raises UsageError for a format without evenly spaced levels.
    """
    inputs = [(name, statistics[target.readers[0]]) for name in target.readers]
    inputs += [(name, statistics[name]) for name in target.also if name in specs]
    readers = [(specs[name], masters[name], seen) for name, seen in inputs if name in specs]
    # Scaling by powers of two loses nothing in tensors that stay in half precision, nor in half-precision activations.
    whole = target.into == "conv" or (target.into == "rows" and target.source not in specs)
    by, exponent = best_scale(readers, grid=grid, whole=whole)
    if target.into == "norm":
        by = masters.divide(target.source, by)
    elif target.into == "rows":
        rows = masters[target.source]
        made = rows.clone()
        made[: len(by)] /= by[:, None]  # of x_proj those of dt, which come first
        masters[target.source] = made
    else:
        mixer: nn.Module = masters.layer.get_submodule("mamba")
        mixer.register_buffer("conv_scale", 1 / by)
        masters.changed.add(target.source)
    for name in (*target.readers, *target.also):
        masters[name] = masters[name] * by
    return by, exponent


def best_scale(
    readers: Sequence[tuple[Spec, Tensor, Statistics]], *, grid: int = GRID, whole: bool = False
) -> tuple[Tensor, float]:
    """The scale (I,), and its exponent (0: none), under which matrices (O, I) lose least by rounding, each measured by
    the statistics of its inputs; it is made from those of the first. whole: powers of two only.
    """
    samples = [(spec, weight[:: -(-len(weight) // _ROWS)].contiguous(), seen) for spec, weight, seen in readers]
    energies = [seen.energy(weight) for _, weight, seen in samples]
    best, exponent, least = torch.ones_like(samples[0][1][0]), 0.0, float("inf")
    for by, tried in _candidates([weight for _, weight, _ in samples], samples[0][2], grid, whole):
        error = 0.0
        for (spec, weight, seen), energy in zip(samples, energies, strict=True):
            scaled = weight * by
            made = search.rounded(spec, scaled, *search.clip(spec, scaled, steps=1))
            error += seen.energy(made / by - weight) / max(energy, 1e-30)
        if error < least:
            best, exponent, least = by, tried, error
    return best, exponent


def _candidates(weights: list[Tensor], statistics: Statistics, grid: int, whole: bool) -> list[tuple[Tensor, float]]:
    loud = statistics.mean_abs.to(weights[0].dtype)
    if not bool(loud.max() > 0):
        return [(torch.ones_like(loud), 0.0)]
    loud = (loud / loud.mean()).clamp(min=1e-4)
    # Relative to the largest of its row, as rounding sees a weight.
    large = torch.cat([w.abs() / w.abs().amax(1, keepdim=True).clamp(min=1e-30) for w in weights]).mean(0)
    large = (large / large.mean().clamp(min=1e-30)).clamp(min=1e-4)
    found = [(torch.ones_like(loud), 0.0)]
    for step in range(1, grid + 1):
        a = step / grid
        for by in (loud**a, loud**a / large ** (1 - a)):
            by = by / (by.max() * by.min()).sqrt()
            by = by.clamp(2.0**-10, 2.0**10)
            found.append((by.log2().round().exp2() if whole else by, a))
    return found
