"""A model folder in, a quantized one out, layer by layer: what is in memory is one layer, and the calibration's hidden
states.

Finished layers wait in `OUT.partial/`, one safetensors file each, under a key of everything that the result depends on.
An interrupted run goes on there; one with other settings starts anew. The result appears complete, measured, with its
report, or not at all. Source of the order: GPTQ (arXiv 2210.17323), layers one after the other, each calibrated with
what the quantized ones before it put out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moai_core import checkpoint, storage, tensors
from moai_core.convert import folder as hf
from moai_core.convert import moai, packed
from moai_core.convert.source import Lazy, OnEvent, Source
from moai_core.errors import CheckpointError, Interrupted, StorageError, UsageError
from moai_core.locks import lock_file
from moai_core.model import MoaiMambaConfig
from moai_core.model.modeling import MoaiMambaLayer
from moai_core.quant import linear
from moai_core.quant.formats import FORMATS, Spec
from moai_core.quantize import layerwise, layouts, plan, report, search
from moai_core.quantize.calibrate import Calibration
from moai_core.quantize.plan import EMBEDDING, HEAD
from moai_core.quantize.runner import BLOCKS, Runner

VERSION = 1
KEY = "key.json"


def quantize_folder(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    settings: plan.Settings,
    *,
    calibration: Callable[[], Calibration] | None = None,
    evaluation: report.Evaluation | None = None,
    device: str | torch.device = "cpu",
    requantize: bool = False,
    force: bool = False,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Quantizes the moai model `src` (a run, a step or a folder) into the folder `dst`.

    calibration: gives the sequences, for methods that look at data. evaluation: text on which the model is measured
    before and after, None to leave that out. requantize: a model that is quantized already is decoded first, and a note
    says so. force replaces an earlier result. Events: {"event": "layer", "name", "done", "total"}; calibrating, the
    same inside of a layer, with its part of a whole in `done`; tensor, evaluate. Returns the report (report.py), which
    also lies in the folder as quantization.json, with the errors by layer as quantization.png.

    Raises UsageError (settings, a matrix that doesn't fit the format, a target that exists), CheckpointError (the
    source is damaged, quantized already, or holds NaN), DataError (calibration), StorageError.
    """
    begun = time.perf_counter()
    target = _target(Path(dst), force)
    source = _source(Path(src), requantize)
    kept = source.path.resolve()
    if target == kept or target in kept.parents:
        raise UsageError(f"{dst}: would replace the source", hint="choose another folder with -o")
    if kept in target.parents:
        raise UsageError(f"{dst}: lies inside the source", hint="choose a folder elsewhere with -o")
    layouts.fits(source, settings.layout)
    if evaluation is not None:
        evaluation.words(source)  # what is wrong with the tokenizer is told before the work
    job = Job(source, settings, torch.device(device), on_event)
    # Two at once would take each other's layers for their own.
    with lock_file(target):
        _target(Path(dst), force)  # what somebody else finished meanwhile stays
        data = _calibration(settings, calibration)
        return _make(job, target, data, evaluation, shown=str(dst), begun=begun)


def _make(
    job: Job,
    target: Path,
    data: Calibration | None,
    evaluation: report.Evaluation | None,
    *,
    shown: str,
    begun: float,
) -> dict[str, Any]:
    """The folder and its report; what is finished stays beside it until the whole is. shown: the target as the caller
    named it; begun: when, in seconds of time.perf_counter."""
    work = _workplace(target, job.key(data.key if data else None), job.on_event)
    with _keeping(work):
        layers = job.layers(work, data)
        job.vocabulary(work)
    with _keeping(work), storage.new_folder(target) as folder:
        found = job.result(work)
        hf.write(folder, job.config_json(), found, job.source.files, job.on_event)
        result = report.build(job, found, layers, data)
        report.measure(result, job.source, folder.path, evaluation, job.device, job.on_event)
        result |= {"path": shown, "seconds": round(time.perf_counter() - begun, 2)}
        if job.settings.layout != layouts.MOAI:
            told = layouts.rewrite(folder, job.settings.layout, job.on_event)
            result["notes"] += told["notes"]
        report.write(folder, result, job.source)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _target(dst: Path, force: bool) -> Path:
    target = Path(os.path.realpath(dst))
    if target.is_dir() and not any(target.iterdir()):
        return target
    if os.path.lexists(target):
        if not (target / storage.MANIFEST).is_file():
            raise UsageError(f"{dst}: already exists and is no saved model", hint="choose another folder with -o")
        if not force:
            raise UsageError(f"{dst}: already exists", hint="choose another folder with -o, or replace it with --force")
    return target


def _source(path: Path, requantize: bool) -> Source:
    """The model. Raises CheckpointError for what is no moai model, or quantized already (unless `requantize`)."""
    folder = checkpoint.find(path)
    values = hf.read_config(folder).values
    if found := values.get("quantization"):
        method = str(found.get("method") if isinstance(found, Mapping) else "some method")[:40]
        if not requantize:
            raise CheckpointError(
                f"{folder}: is quantized already ({method})",
                hint="quantize the model that it was made of, or decode this one first with --allow-requantize",
            )
        source = moai.read(folder)
        source.notes.append(f"was quantized already ({method}): decoded first, so what that lost comes on top")
        return source
    if moai.detect(folder) is None:
        raise CheckpointError(
            f"{folder}: model_type is {str(values.get('model_type'))[:60]!r}, only 'mamba_moai' can be quantized",
            hint="`moai convert` makes one of other Mamba models",
        )
    return moai.read(folder)


def _calibration(settings: plan.Settings, make: Callable[[], Calibration] | None) -> Calibration | None:
    if not settings.kind.calibrated:
        return None
    if make is None:
        raise UsageError(f"--method {settings.method} needs calibration text", hint="--calib FILE")
    return make()


def _workplace(target: Path, key: str, on_event: OnEvent | None) -> Path:
    """The folder of finished layers for this key; what another key left there goes."""
    work = target.with_name(f"{target.name}.partial")
    with contextlib.suppress(CheckpointError, FileNotFoundError):
        if storage.read_json(work / KEY) == {"key": key}:
            if on_event is not None and (done := len(list(work.glob("layer-*.safetensors")))):
                on_event({"event": "note", "message": f"going on after {done} finished layers in {work.name}"})
            return work
    if work.is_dir() and any(work.iterdir()) and not (work / KEY).is_file():
        raise UsageError(
            f"{work}: is in the way, and nothing that moai wrote", hint="move it, or choose another folder with -o"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    storage.write_file(work / KEY, storage.json_bytes({"key": key}))
    return work


@contextlib.contextmanager
def _keeping(work: Path) -> Iterator[None]:
    """Errors of the disk and interruptions say where the finished layers are; a folder without any goes."""
    try:
        yield
    except StorageError as exc:
        raise StorageError(exc.message, hint=f"{exc.hint}; {work} keeps the finished layers until then") from exc
    except Interrupted as exc:
        if done := len(list(work.glob("layer-*.safetensors"))):
            exc.hint = f"the same command goes on: {work.name} keeps {done} finished layer{'s' * (done > 1)}"
        else:
            shutil.rmtree(work, ignore_errors=True)
        raise


class Job:
    """One model under one set of settings."""

    def __init__(
        self, source: Source, settings: plan.Settings, device: torch.device, on_event: OnEvent | None = None
    ) -> None:
        """Raises UsageError where settings and model don't fit."""
        self.source, self.settings, self.device, self.on_event = source, settings, device, on_event
        shapes = {name: lazy.shape for name, lazy in source.tensors.items()}
        self.quantization = plan.quantization(settings, shapes, tied=bool(source.config["tie_word_embeddings"]))
        self.config: Any = MoaiMambaConfig(
            **source.config | {"use_quantization": True, "quantization_bits": settings.width},
            quantization=self.quantization,
        )
        names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        self.specs = linear.plan(self.quantization, [name for name in names if not name.endswith("A_log")])

    def key(self, data: str | None) -> str:
        """Of everything that the numbers depend on."""
        parts = [VERSION, dataclasses.asdict(self.settings), checkpoint.fingerprint(self.source.path), data]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def stored(self) -> str:
        """What the model is stored in; one that was quantized, what isn't quantized of it."""
        decoded = any(lazy.quantized for lazy in self.source.tensors.values())
        return packed.plain_dtype(self.source.tensors) if decoded else hf.dtype(self.source.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """What a layer computes in while it is calibrated: fp32, but on a GPU what the model is stored in."""
        return getattr(torch, self.stored) if self.device.type == "cuda" else torch.float32

    # ---- layers

    def layers(self, work: Path, data: Calibration | None) -> list[dict[str, Any]]:
        """Quantizes every layer that isn't finished into `work`; the report of each. Raises as quantize_folder."""
        count, reports = int(self.source.config["num_hidden_layers"]), []
        runner = None
        if data is not None:
            runner = Runner(data, device=self.device, dtype=self.dtype, scratch=work, on_event=self.on_event)
            runner.embed(self._embedding())
        for number in range(count):
            name = f"model.layers.{number}"
            file = work / f"layer-{number:05d}.safetensors"
            if runner is not None:
                runner.on_event = self._inside(name, number, count, finished=file.exists())
            if file.exists():
                # Written under its last name only when complete.
                if runner is not None:
                    runner.advance(self._finished(name, file))
            else:
                done = layerwise.quantize_layer(
                    self._plain(name), name, self._of(name), method=self.settings.kind.layer, runner=runner,
                    options=plan.layer_options(self.settings, getattr(torch, self.stored)),
                )  # fmt: skip
                storage.write_file(file.with_suffix(".json"), storage.json_bytes(done.report))
                storage.write_file(file, tensors.encode({n: self._stored(n, t) for n, t in done.tensors.items()}))
            reports.append(storage.read_json(file.with_suffix(".json")))
            self._tell(event="layer", name=name, done=number + 1, total=count)
        return reports

    def _inside(self, name: str, number: int, count: int, *, finished: bool) -> OnEvent:
        """What tells how far a layer is, whose calibration runs through it once for each stage and each block."""
        stages = [stage for stage in layerwise.STAGES if set(stage) & set(self._of(name))]
        passes, done = len(BLOCKS) + (0 if finished else len(stages)), 0

        def on_event(event: dict[str, Any]) -> None:
            nonlocal done
            part = min(1.0, (done + event["done"] / event["total"]) / passes)
            done += event["done"] == event["total"]
            self._tell(event="calibrating", name=f"{name} {event['source']}", done=number + part, total=count)

        return on_event

    def _of(self, layer: str) -> dict[str, Spec]:
        """The specs of one layer, by the names inside it."""
        prefix = f"{layer}."
        return {name.removeprefix(prefix): spec for name, spec in self.specs.items() if name.startswith(prefix)}

    def _plain(self, name: str) -> MoaiMambaLayer:
        with torch.device("meta"):
            layer = MoaiMambaLayer(MoaiMambaConfig(**self.source.config))
        prefix = f"{name}."
        state = {n.removeprefix(prefix): self.load(n) for n in self.source.tensors if n.startswith(prefix)}
        layer.load_state_dict(state, assign=True)
        return layer.to(self.device, self.dtype).eval()

    def _finished(self, name: str, file: Path) -> MoaiMambaLayer:
        with torch.device("meta"):
            layer = MoaiMambaLayer(self.config)
            linear.install(layer, self.quantization, prefix=f"{name}.")
        prefix = f"{name}."
        state = {n: self.load(n) for n in self.source.tensors if n.startswith(prefix)} | tensors.read(file)
        wanted = layer.state_dict()
        layer.load_state_dict({n: t for f, t in state.items() if (n := f.removeprefix(prefix)) in wanted}, assign=True)
        linear.set_kernel(layer, "dequantize")
        return layer.to(self.device, self.dtype).eval()

    def load(self, name: str) -> torch.Tensor:
        """A tensor of the source. Raises CheckpointError for NaN and infinity."""
        tensor = self.source.tensors[name].load()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.source.tensors[name].origin} holds NaN or infinite numbers",
                hint="take an earlier checkpoint, or the model again from where it came",
            )
        return tensor

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What isn't quantized keeps the source's type."""
        known = self.source.tensors.get(name)
        return tensor if known is None else tensor.to(self._plain_again(known).dtype)

    def _plain_again(self, lazy: Lazy) -> Lazy:
        """What was quantized in the source and isn't any more gets the type of the rest."""
        return lazy.cast(getattr(torch, self.stored)) if lazy.quantized else lazy

    def _embedding(self) -> torch.nn.Module:
        weight = self.load(f"{EMBEDDING}.weight")
        if (spec := self.specs.get(EMBEDDING)) is None:
            return torch.nn.Embedding.from_pretrained(weight.to(self.device, self.dtype))
        module = linear.QuantEmbedding(weight.shape[0], weight.shape[1], spec)
        module.load_state_dict(FORMATS[spec.format].encode(spec, weight))
        module.dtype = self.dtype
        return module.to(self.device)

    # ---- embedding and head

    def vocabulary(self, work: Path) -> None:
        """Quantizes embedding and head into `work`; what else lies outside the layers is looked at, too."""
        for name in self.source.tensors:
            if not name.startswith("model.layers.") and name.removesuffix(".weight") not in self.specs:
                self.load(name)  # raises for NaN, as the layers' tensors did
        for name in (EMBEDDING, HEAD):
            file = work / f"{name}.safetensors"
            if (spec := self.specs.get(name)) is not None and not file.exists():
                found = search.nearest(spec, self.load(f"{name}.weight").to(self.device))
                storage.write_file(file, tensors.encode({f"{name}.{part}": t for part, t in found.items()}))

    # ---- the result

    def result(self, work: Path) -> dict[str, Lazy]:
        """Every tensor of the quantized model, none read."""
        found = {name: self._plain_again(lazy) for name, lazy in self.source.tensors.items()}
        for name in self.specs:
            del found[f"{name}.weight"]
        for file in sorted(work.glob("*.safetensors")):
            for name, info in tensors.inspect(file).items():
                found[name] = Lazy(info.dtype, info.shape, hf.reader(file, name), f"{file}: tensor {name}")
        return found

    def config_json(self) -> Mapping[str, Any]:
        """config.json of the result."""
        self.config.architectures = ["MoaiMambaForCausalLM"]
        return json.loads(self.config.to_json_string()) | {"dtype": self.stored}

    def _tell(self, **event: Any) -> None:
        if self.on_event is not None:
            self.on_event(event)
