"""Quantized folders, read matrix by matrix: every NAME.weight is there again, decoded when it is read.

    moai                  config.json's `quantization` (moai_core/quant/linear.py)
    gptq, awq             config.json's `quantization_config`, or what auto-gptq and autoawq wrote of old:
                          quantize_config.json, quant_config.json, weights in gptq_model-4bit-128g.safetensors
    compressed-tensors    config.json's `quantization_config`, format pack-quantized

So no format needs to know of quantization. Decoded values are fp32, which holds integers under fp16 scales exactly.
Where moai can hold the numbers as they are, a tensor says so (`Lazy.packed`), and a moai folder written of it stays
quantized. Left out: bitsandbytes' own folders, fp8 and other kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moai_core import storage, tensors
from moai_core.config import MODEL_TYPE
from moai_core.convert.source import Lazy, Packed
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import hadamard, layout_awq, layout_compressed, layout_gptq, linear, packing
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quant.packing import Stored, Unfit
from moai_core.weights import KEEP_FP32

LAYOUTS: dict[str, Any] = {layout.METHOD: layout for layout in (layout_gptq, layout_awq, layout_compressed)}
# Of old, beside a config.json that didn't speak of it.
CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_OLD_NAME = re.compile(r"gptq_model-[\w-]{1,40}\.safetensors")
_CONFIG_LIMIT = 1 << 20
ADAPTERS = "adapter_config.json"
# Of a mixer (moai_core/quantize/awq.py).
CONV_SCALE = "conv_scale"


# ---- what a folder says ------------------------------------------------------------------------------------------


def method(path: Path, values: Mapping[str, Any]) -> str | None:
    """How the folder `path`, with these values in config.json, is quantized: "moai", one of LAYOUTS, another name, or
    None. Raises CheckpointError."""
    if values.get("quantization") and values.get("model_type") == MODEL_TYPE:
        return "moai"
    found = _config(path, values)
    return None if found is None else str(found.get("quant_method"))[:40]


def _config(path: Path, values: Mapping[str, Any]) -> dict[str, Any] | None:
    found = values.get("quantization_config")
    where = path / "config.json"
    if found is None:
        for file, name in CONFIGS.items():
            if (path / file).is_file():
                where = path / file
                found = storage.read_json(where, limit=_CONFIG_LIMIT)
                found = {"quant_method": name, **found} if isinstance(found, dict) else found
                break
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{where}: the quantization must be a JSON object (got {str(found)[:40]!r})")
    return found


def files(path: Path) -> dict[str, dict[str, tensors.TensorInfo]] | None:
    """`{file: {tensor: info}}` of weights under the names of auto-gptq, or None where there are none of those."""
    index = [file for file in path.glob("gptq_model-*.safetensors.index.json") if file.is_file()]
    names = [file.name for file in path.glob("gptq_model-*.safetensors") if _OLD_NAME.fullmatch(file.name)]
    if not index:
        return {name: tensors.inspect(path / name) for name in sorted(names)[:1]} or None
    content = storage.read_json(index[0])
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index[0]}: has no weight_map")
    found: dict[str, dict[str, tensors.TensorInfo]] = {}
    for name, file in places.items():
        if not storage.plain_name(file) or not file.endswith(".safetensors") or not (path / file).is_file():
            raise CheckpointError(f"{index[0]}: {name[:80]!r} points to {str(file)[:80]!r}, which isn't there")
        if file not in found:
            found[file] = tensors.inspect(path / file)
        if name not in found[file]:
            raise CheckpointError(f"{path / file}: has no tensor {name[:80]!r}, though {index[0].name} says so")
    return found


# ---- tensors -----------------------------------------------------------------------------------------------------


def unpack(path: Path, values: Mapping[str, Any], found: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors `found` with NAME.weight in place of those that a quantized matrix is stored in; none is read but
    g_idx, and scales where they may not fit. Raises CheckpointError."""
    kind = method(path, values)
    if kind is None:
        return dict(found)
    if kind == "moai":
        return _moai(path, values["quantization"], found)
    if kind not in LAYOUTS:
        raise CheckpointError(
            f"{path / 'config.json'}: the model is quantized by {kind!r}",
            hint=f"{', '.join(LAYOUTS)} can be read; of others convert the model that it was made of",
        )
    config = _config(path, values) or {}
    try:
        kinds = _kinds(kind, config)
    except CheckpointError as exc:
        raise CheckpointError(f"{path}: {kind}: {exc.message}", hint=exc.hint) from exc
    taken = {}
    layout = LAYOUTS[kind]
    suffixes = (*layout.MADE, *layout.OPTIONAL)
    for name in sorted({n.rpartition(".")[0] for n in found if n.rpartition(".")[2] == suffixes[0]}):
        parts = {leaf: found[f"{name}.{leaf}"] for leaf in suffixes if f"{name}.{leaf}" in found}
        taken[name] = parts, _matrix(f"{path}: {name}", kind, parts, kinds)
    return _replaced(found, taken)


def _replaced(found: Mapping[str, Lazy], taken: Mapping[str, tuple[Mapping[str, Lazy], Lazy]]) -> dict[str, Lazy]:
    """`found` in its order, each matrix in the place of its first tensor."""
    gone = {f"{name}.{leaf}": name for name, (parts, _) in taken.items() for leaf in parts}
    if both := [name for name in found if name.removesuffix(".weight") in taken and name not in gone]:
        raise CheckpointError(f"{found[both[0]].origin} is there beside a quantized matrix of the same name")
    result: dict[str, Lazy] = {}
    for name, lazy in found.items():
        if name in gone:
            result[f"{gone[name]}.weight"] = taken[gone[name]][1]
        elif not _idle(name, lazy, taken):
            result[name] = lazy
    return result


def _idle(name: str, lazy: Lazy, taken: Mapping[str, Any]) -> bool:
    """Whether this is a bias of zeros, which auto-gptq gives to every matrix that it quantizes."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and module in taken and not module.endswith("dt_proj") and not lazy.load().any()


class Loading(Mapping[str, Tensor]):
    """Tensors that are read when asked for."""

    def __init__(self, lazies: Mapping[str, Lazy]) -> None:
        self.lazies = lazies

    def __getitem__(self, name: str) -> Tensor:
        return self.lazies[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self.lazies

    def __iter__(self) -> Iterator[str]:
        return iter(self.lazies)

    def __len__(self) -> int:
        return len(self.lazies)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """CheckpointErrors of a matrix begin with its name."""
    try:
        yield
    except CheckpointError as exc:
        raise CheckpointError(f"{where}: {exc.message}", hint=exc.hint) from exc


# ---- other tools' ------------------------------------------------------------------------------------------------


def _kinds(kind: str, config: Mapping[str, Any]) -> list[Stored]:
    """The ways in which matrices of this folder are stored. Raises CheckpointError."""
    if kind != layout_compressed.METHOD:
        return [LAYOUTS[kind].read_config(config)]
    if config.get("format") not in (None, layout_compressed.FORMAT):
        raise CheckpointError(
            f"format is {str(config['format'])[:40]!r}, only {layout_compressed.FORMAT!r} can be read"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError("config_groups is missing")
    kinds: list[Stored] = []
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(f"config_groups.{name[:40]} has no weights")
        if group.get("input_activations"):
            raise CheckpointError(f"config_groups.{name[:40]} quantizes activations, too, which can't be read")
        if (stored := layout_compressed.read_config(group["weights"])) not in kinds:
            kinds.append(stored)
    return kinds


def _matrix(where: str, kind: str, parts: Mapping[str, Lazy], kinds: list[Stored]) -> Lazy:
    """The matrix that is stored in `parts` in one of these ways. Raises CheckpointError."""
    layout, loading = LAYOUTS[kind], Loading(parts)
    with _naming(where):
        stored = _choose(layout, parts, kinds)
        packed = _packed(where, layout, loading, stored)

    def load() -> Tensor:
        with _naming(where):
            return layout.decode(loading, stored)

    return Lazy(torch.float32, (stored.out, stored.columns), load, where, True, packed)


def _choose(layout: Any, parts: Mapping[str, Lazy], kinds: list[Stored]) -> Stored:
    """Of the ways in which a folder stores matrices, that which these shapes have. (compressed-tensors says which by
    patterns of names; shapes say it as well, and no stranger's pattern runs.)"""
    shown: dict[str, Any] = dict(parts)
    if "weight_shape" in parts and parts["weight_shape"].shape == (2,):
        shown["weight_shape"] = parts["weight_shape"].load()
    refused = []
    for kind in kinds:
        try:
            stored = layout.size(shown, kind)
            packing.check_shapes(shown, layout.shapes(stored), layout.OPTIONAL)
            return stored
        except CheckpointError as exc:
            refused.append(exc)
    raise refused[-1]


def _packed(where: str, layout: Any, loading: Loading, stored: Stored) -> Packed | None:
    """moai's own tensors of the same numbers, none made yet, or None where moai's formats can't hold them."""
    try:
        spec, names = stored.spec, packing.parts(stored)
        FORMATS[spec.format].check(spec, stored.out, stored.columns)
        scales = next(lazy for name, lazy in loading.lazies.items() if name in ("scales", "weight_scale"))
        if any(name.endswith("g_idx") for name in loading) or scales.dtype != torch.float16:
            layout.PARTS["scales"](loading, stored)
        if stored.bits == 8:  # other tools' integers go down to -128
            layout.PARTS["qweight"](loading, stored)
    except (Unfit, UsageError):
        return None

    def part(name: str) -> Callable[[], Tensor]:
        def load() -> Tensor:
            with _naming(where):
                return layout.PARTS[name](loading, stored)

        return load

    shapes = FORMATS[spec.format].tensors(spec, stored.out, stored.columns)
    return Packed(spec, {n: Lazy(shapes[n][1], shapes[n][0], part(n), where) for n in names}, layout.METHOD)


# ---- moai's ------------------------------------------------------------------------------------------------------


def _moai(path: Path, quantization: Any, found: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Of a moai folder. A matrix for rotated inputs is turned back, a scale after the convolution (AWQ's) is multiplied
    into the columns that read it: what comes out is a plain model's."""
    if (path / ADAPTERS).exists():
        raise CheckpointError(
            f"{path}: has LoRA adapters, which can't be converted",
            hint="convert RUN/merged, which `moai qat --merge` writes",
        )
    names = {n.rpartition(".")[0] for n, lazy in found.items() if len(lazy.shape) == 2 and "." in n}
    try:
        specs = linear.plan(quantization, sorted(names), whole=False)
        rotated = linear.rotated(quantization, specs)
    except UsageError as exc:
        raise CheckpointError(f"{path / 'config.json'}: {exc.message}", hint=exc.hint) from exc
    scales = {n.removesuffix(CONV_SCALE): lazy for n, lazy in found.items() if n.endswith(CONV_SCALE)}
    taken = {}
    for name, spec in specs.items():
        parts = {n.rpartition(".")[2]: lazy for n, lazy in found.items() if n.rpartition(".")[0] == name}
        with _naming(f"{path}: {name}"):
            taken[name] = parts, _stored(f"{path}: {name}", spec, parts, str(quantization.get("method"))[:40])
    result = _replaced(found, taken)
    for name in rotated:
        result[f"{name}.weight"] = result[f"{name}.weight"].map(hadamard.unfold)
    for layer, scale in scales.items():
        del result[f"{layer}{CONV_SCALE}"]
        for reader in ("x_proj", "out_proj"):
            if (lazy := result.get(f"{layer}{reader}.weight")) is not None and scale.shape == lazy.shape[1:]:
                result[f"{layer}{reader}.weight"] = _scaled(lazy, scale)
            else:
                raise CheckpointError(f"{scale.origin} has the shape {list(scale.shape)}, which fits no {reader}")
    return result


def _scaled(lazy: Lazy, scale: Lazy) -> Lazy:
    """The matrix whose inputs are no longer multiplied by `scale`: powers of two, so nothing is rounded."""
    return lazy.map(lambda weight: (weight.float() * scale.load().float()).to(weight.dtype))


def _stored(where: str, spec: Spec, parts: Mapping[str, Lazy], method: str) -> Lazy:
    """The matrix that is stored in `parts` in a format of moai's."""
    if "qweight" not in parts:
        raise CheckpointError(f"config.json calls it {spec.format}, but there is no qweight")
    rows, columns = packing.two_dimensional(parts, "qweight")
    columns *= 8 // FORMATS[spec.format].bits
    try:
        FORMATS[spec.format].check(spec, rows, columns)
    except UsageError as exc:
        raise CheckpointError(exc.message, hint=exc.hint) from exc
    wanted = {
        name: (shape, (dtype,)) for name, (shape, dtype) in FORMATS[spec.format].tensors(spec, rows, columns).items()
    }
    packing.check_shapes(parts, wanted)
    loading = Loading(parts)
    packed = Packed(spec, dict(parts), method)
    return Lazy(torch.float32, (rows, columns), lambda: decode(spec, loading), where, True, packed)


# ---- writing -----------------------------------------------------------------------------------------------------


def keep(found: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, Any] | None]:
    """What a moai folder stores of a source's tensors: quantized matrices as they are; and config.json's
    `quantization`, None where there are none."""
    result: dict[str, Lazy] = {}
    specs: dict[str, Packed] = {}
    for name, lazy in found.items():
        module = name.removesuffix(".weight")
        if lazy.packed is None:
            result[name] = lazy
        else:
            specs[module] = lazy.packed
            result |= {f"{module}.{leaf}": part for leaf, part in lazy.packed.tensors.items()}
    if not specs:
        return result, None
    modules: dict[str, Any] = {}
    for leaf in sorted({name.rpartition(".")[2] for name in specs}):
        every = [name.removesuffix(".weight") for name in found if name.endswith(f"{leaf}.weight")]
        kinds = {name: specs[name].spec for name in every if name in specs}
        one = len(kinds) == len(every) and len(set(kinds.values())) == 1
        modules |= {leaf: next(iter(kinds.values())).to_dict()} if one else {n: s.to_dict() for n, s in kinds.items()}
    return result, {"method": next(iter(specs.values())).method, "modules": modules}


def bits(found: Mapping[str, Lazy]) -> int:
    """The bits of most of the numbers that are quantized."""
    held = [lazy for lazy in found.values() if lazy.packed]
    largest = max(held, key=lambda lazy: lazy.nbytes)
    return FORMATS[largest.packed.spec.format].bits if largest.packed else 0


def forget(found: dict[str, Lazy]) -> None:
    """From here on `found` are plain numbers."""
    for name, lazy in found.items():
        if lazy.packed is not None:
            found[name] = replace(lazy, packed=None)


def uniform(found: dict[str, Lazy]) -> None:
    """Where decoded values, fp32, are among the tensors, the others become fp32, too: a model has one type. Exact."""
    if any(lazy.quantized and lazy.packed is None for lazy in found.values()):
        for name, lazy in found.items():
            if lazy.packed is None and lazy.dtype != torch.float32:
                found[name] = lazy.cast(torch.float32)


def plain_dtype(found: Mapping[str, Lazy]) -> str:
    """The type of most of the numbers that aren't quantized, by its name in config.json."""
    plain = [lazy for n, lazy in found.items() if not lazy.quantized and n.rpartition(".")[2] not in KEEP_FP32]
    return str(max(plain or found.values(), key=lambda lazy: lazy.nbytes).dtype).removeprefix("torch.")


def note(found: Mapping[str, Lazy], *, kept: bool) -> str | None:
    """What became of the quantized matrices, for the report, or None where there are none."""
    every = [lazy for lazy in found.values() if lazy.quantized]
    held = [lazy for lazy in every if lazy.packed] if kept else []
    if not every:
        return None
    parts = [f"{len(held)} quantized matrices kept as they are"] if held else []
    if len(every) > len(held):
        parts.append(f"{len(every) - len(held)} quantized matrices decoded to fp32")
    return ", ".join(parts)
