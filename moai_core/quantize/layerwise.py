"""One layer quantized, matrix after matrix, in the order in which data flow through it.

    in_proj; x_proj; dt_proj; out_proj; gate and up; down

Before a matrix is quantized, the inputs that it gets from those already quantized are gathered (runner.py); then it
is, perhaps, scaled (awq.py) or rotated (rotate.py), then rounded (search.py or gptq.py, then refine.py). The layer
computes on with the values that are stored, and hands what it makes of the calibration sequences to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moai_core.errors import UsageError
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quantize import awq, gptq, refine, rotate, search
from moai_core.quantize.runner import BLOCKS, Runner, Statistics

if TYPE_CHECKING:
    from moai_core.model.modeling import MoaiMambaLayer

# Matrices of one stage read the same inputs.
STAGES: tuple[tuple[str, ...], ...] = (
    ("mamba.in_proj",),
    ("mamba.x_proj",),
    ("mamba.dt_proj",),
    ("mamba.out_proj",),
    ("feed_forward.gate_proj", "feed_forward.up_proj"),
    ("feed_forward.down_proj",),
)
METHODS = ("rtn", "gptq", "awq")


@dataclass(frozen=True)
class Options:
    """damp, order: GPTQ's; sweeps: of refine.py after it or AWQ (0: those alone). steps: ranges tried for a scale (1:
    the whole one); signed: negative scales of symmetric int4. grid: exponents that AWQ tries; conv_scale: whether it
    may scale out_proj's inputs, for which the layer keeps a vector. rotate: modules whose inputs are rotated.
    overrides: another method for some modules. stored: the type in which unquantized tensors will be saved (None: the
    layer's). compare: also report what rounding to nearest loses.
    """

    damp: float = gptq.DAMP
    sweeps: int = refine.SWEEPS
    order: str = "groups"
    steps: int = search.STEPS
    signed: bool = True
    grid: int = awq.GRID
    conv_scale: bool = True
    rotate: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    stored: torch.dtype | None = None
    compare: bool = True


@dataclass
class Result:
    """tensors: everything of the layer that differs from before, by full names: the formats' tensors of quantized
    matrices, and norms, x_proj or conv_scale that AWQ changed (conv_scale always, where it may be). report: by module,
    plain values.
    """

    tensors: dict[str, Tensor]
    report: dict[str, Any]


@torch.no_grad()
def quantize_layer(
    layer: MoaiMambaLayer,
    name: str,
    specs: Mapping[str, Spec],
    *,
    method: str = "rtn",
    runner: Runner | None = None,
    options: Options | None = None,
) -> Result:
    """Quantize the modules in `specs` ("mamba.in_proj": Spec) of the layer called `name` ("model.layers.3").

    The layer is changed: afterwards it computes with the quantized values, as one loaded with them and the exact kernel
    does, bit for bit. runner: stands before this layer, and behind
    it afterwards; None where the method needs no data. Report of a module: method, format, error (relative, of its
    output on the calibration text; without data, of the weight), nearest (the same, rounded to nearest), and what the
    method adds. Raises UsageError (method, module, group size), CheckpointError (NaN in weights), NonFiniteError (NaN
    in inputs).
    """
    work = _Layer(layer, name, specs, method, runner, options or Options())
    for stage in STAGES:
        if wanted := [one for one in stage if one in specs]:
            work.stage(wanted)
    if runner is not None:
        runner.advance(layer)
    return work.result()


class _Layer:
    """One layer at work."""

    def __init__(
        self, layer: MoaiMambaLayer, name: str, specs: Mapping[str, Spec], method: str, runner: Runner | None,
        options: Options,
    ) -> None:  # fmt: skip
        self.layer, self.name, self.specs, self.method = layer, name, specs, method
        self.runner, self.options = runner, options
        self.masters = awq.Masters(layer, options.stored)
        self.tensors: dict[str, Tensor] = {}
        self.report: dict[str, Any] = {}
        self._check()
        scaled = awq.targets(layer, specs, conv_scale=options.conv_scale, rotated=options.rotate)
        self.targets = [one for one in scaled if "awq" in {self._method(reader) for reader in one.readers}]

    def _method(self, module: str) -> str:
        return self.options.overrides.get(module, self.method)

    def _check(self) -> None:
        known = {module for stage in STAGES for module in stage}
        for module in self.specs:
            if module not in known:
                raise UsageError(f"{self.name} has no matrix {module!r} to quantize")
            if self._method(module) not in METHODS:
                raise UsageError(f"unknown method {self._method(module)!r}", hint=f"methods: {', '.join(METHODS)}")
            if self._method(module) != "rtn" and self.runner is None:
                raise UsageError(f"{self._method(module)} needs calibration data", hint="give text with --calib")
            weight = self.masters[module]
            try:
                FORMATS[self.specs[module].format].check(self.specs[module], *weight.shape)
            except UsageError as exc:
                raise UsageError(f"{self.name}.{module}: {exc.message}", hint=exc.hint) from exc
            search.check_weight(f"{self.name}.{module}.weight", weight)
        rotate.check(self.options.rotate, {module: self.masters[module].shape[1] for module in self.specs})

    def stage(self, wanted: list[str]) -> None:
        """Quantize matrices that read the same inputs."""
        due = [one for one in self.targets if one.matrices() & set(wanted)]
        self.targets = [one for one in self.targets if one not in due]
        statistics = self._gather(wanted, due)
        before = {module: (self.masters[module], statistics.get(wanted[0])) for module in wanted}
        for target in due:
            self._scale(target, statistics)
        for module in wanted:
            self._quantize(module, statistics.get(wanted[0]), *before[module])

    def _gather(self, wanted: list[str], due: list[awq.Target]) -> dict[str, Statistics]:
        if self.runner is None:
            return {}
        while BLOCKS[self.runner.block] != wanted[0].partition(".")[0]:
            self.runner.step(self.layer)
        return self.runner.gather(self.layer, sorted({wanted[0], *(target.readers[0] for target in due)}))

    def _scale(self, target: awq.Target, statistics: dict[str, Statistics]) -> None:
        by, exponent = awq.scale(self.masters, target, self.specs, statistics, grid=self.options.grid)
        for module in {target.readers[0], *target.also} & set(statistics):
            statistics[module] = statistics[module].scaled(by)
        for module in {*target.readers} & set(self.specs):
            self.report[module] = {"exponent": exponent, "scale": [round(float(s), 4) for s in (by.min(), by.max())]}

    def _quantize(self, module: str, statistics: Statistics | None, first: Tensor, was: Statistics | None) -> None:
        spec, weight, method = self.specs[module], self.masters[module], self._method(module)
        turned = module in self.options.rotate
        shown, seen = rotate.forth(weight, statistics) if turned else (weight, statistics)
        choice = self._choose(method, spec, shown, seen, f"{self.name}.{module}")
        self.masters[module] = choice.weight
        if turned:
            rotate.turn(self.layer.get_submodule(module))
        self.tensors |= {f"{self.name}.{module}.{part}": tensor for part, tensor in choice.tensors.items()}
        report = {"method": method, "format": spec.format, "error": _error(shown, choice.weight, seen)}
        if self.options.compare and (method != "rtn" or turned):
            report["nearest"] = _error(first, self._nearest(spec, first).weight, was)
        self.report[module] = {**report, **choice.report, **self.report.get(module, {})}

    def _choose(self, method: str, spec: Spec, weight: Tensor, seen: Statistics | None, name: str) -> gptq.Choice:
        options: dict[str, Any] = {"steps": self.options.steps, "signed": self.options.signed}
        if method == "rtn" or seen is None:
            return self._nearest(spec, weight)
        asked, H, damp = self.options, seen.hessian, self.options.damp
        if method == "gptq":
            choice = gptq.quantize(spec, weight, H, name=name, damp=damp, order=asked.order, **options)
            damp = choice.report["damp"]
        else:
            importance = seen.blocks(spec.group_size).to(weight.dtype)
            choice = gptq.encoded(spec, weight, *search.clip(spec, weight, importance, **options))
        return refine.refine(spec, weight, H, choice, damp=damp, sweeps=asked.sweeps)

    def _nearest(self, spec: Spec, weight: Tensor) -> gptq.Choice:
        tensors = search.nearest(spec, weight, steps=self.options.steps, signed=self.options.signed)
        return gptq.Choice(tensors, decode(spec, tensors))

    def result(self) -> Result:
        """What was made."""
        mixer = self.layer.mamba
        if self.method == "awq" and self.options.conv_scale and mixer.conv_scale is None:
            # config.json speaks of all layers at once.
            mixer.register_buffer("conv_scale", torch.ones_like(mixer.D))
            self.masters.changed.add("mamba.conv_scale")
        state = {**dict(self.layer.named_parameters()), **dict(self.layer.named_buffers())}
        quantized = {f"{module}.weight" for module in self.specs}
        for tensor in sorted(self.masters.changed - quantized):
            self.tensors[f"{self.name}.{tensor}"] = state[tensor].detach().clone()
        return Result(self.tensors, self.report)


def _error(weight: Tensor, made: Tensor, statistics: Statistics | None) -> float:
    """The relative error of the output, or without statistics of the weight."""
    if statistics is None:
        part, whole = float((made - weight).square().sum()), float(weight.square().sum())
    else:
        part, whole = statistics.energy(made - weight), statistics.energy(weight)
    return math.sqrt(part / whole) if whole > 0 else 0.0
