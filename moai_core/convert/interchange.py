"""Quantized models in the layouts of other tools: GPTQ, AWQ, compressed-tensors. What is written has the shape of a
Jamba (jamba.py), whose names transformers knows; what is read may have that of any Mamba that transformers has.

Quantized are in_proj, out_proj and the feed-forward, as far as they have a format that the layout holds; x_proj and
dt_proj are not (they are small, and transformers' fast path reads dt_proj's weight), nor embedding and head, for which
no reader's configuration has a place. What moai has quantized beyond that is decoded to the type of the other weights,
and the report says so. GPTQ and AWQ have one setting for the whole model: where matrices differ, most numbers decide.
Packing, bit for bit, is done by moai_core/quant/layout_*.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moai_core import __version__, storage
from moai_core.convert import folder as hf
from moai_core.convert import jamba, mamba, packed, parity
from moai_core.convert.runtimes import TransformersRuntime, quiet
from moai_core.convert.source import Lazy, OnEvent, Options, Packed, Parity, Refused, Runtime, Source
from moai_core.errors import MoaiError, UsageError
from moai_core.quant import formats, packing
from moai_core.quant.formats import Spec

FORMATS = tuple(packed.LAYOUTS)
COMPRESSED = "compressed-tensors"
LEAVES = ("mamba.in_proj", "mamba.out_proj", *(f"feed_forward.{part}_proj" for part in ("gate", "up", "down")))
# Matrix products of a Jamba that are never quantized here.
PLAIN = ("lm_head", "mamba.x_proj", "mamba.dt_proj", *(f"self_attn.{part}_proj" for part in "qkvo"))
_BASES = {"jamba": jamba, "mamba": mamba, "falcon_mamba": mamba}
_CLASSES = {"jamba": "JambaForCausalLM", "mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}


# ---- reading -----------------------------------------------------------------------------------------------------


def detect(path: Path) -> str | None:
    """See source.py."""
    if not path.is_dir() or hf.model_type(path) not in _BASES:
        return None
    try:
        found = packed.method(path, hf.read_config(path).values)
    except MoaiError:
        return None
    return found if found in FORMATS else None


def read(path: Path) -> Source:
    """See source.py."""
    source = _BASES[str(hf.model_type(path))].read(path)
    source.format = str(packed.method(path, hf.read_config(path).values))
    return source


def open_runtime(path: Path, format: str) -> Runtime:
    """transformers' model of the decoded weights: its config and names, moai's decoding. See source.py."""
    import transformers

    kind = str(hf.model_type(path))
    values = {n: v for n, v in hf.read_config(path).values.items() if n not in ("quantization_config", "dtype")}
    cls = getattr(transformers, _CLASSES[kind])
    with quiet():
        model = cls(cls.config_class(**values))
        model.tie_weights()
    held = model.state_dict()
    for name, lazy in hf.read_tensors(path).items():
        held.pop(name).copy_(lazy.load())
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    assert not held.keys() - tied, f"never loaded: {sorted(held)}"
    runtime = TransformersRuntime(path, _CLASSES[kind], model)
    runtime.name += f" ({format} decoded by moai)"
    return runtime


def judge(found: Parity, options: Options) -> str | None:
    """See source.py. Embedding and head may have been rounded to 16 bits."""
    if parity.judge(found, Options(options.format)) is None:
        return None
    return parity.judge(found, Options(options.format, "bf16"))


# ---- writing -----------------------------------------------------------------------------------------------------


def write(source: Source, target: Any, options: Options, on_event: OnEvent | None = None) -> None:
    """See source.py. Raises Refused also where nothing of the model is quantized in a way that the layout holds."""
    layout = packed.LAYOUTS[options.format]
    values, found = jamba.shaped(source)
    depth = values["num_hidden_layers"] - 1
    chosen = _choose(options.format, layout, found, depth)
    if not chosen:
        raise Refused(
            f"{source.path}: no matrix is quantized so that {options.format} can hold it",
            hint=f"quantize it first: `moai quantize --method gptq --format {options.format}`",
        )
    dtype = getattr(torch, packed.plain_dtype(source.tensors))
    if options.format != COMPRESSED:  # a reader takes the null layer's feed-forward for quantized
        chosen |= _null(found, chosen, depth)
    written: dict[str, Lazy] = {}
    for name, lazy in found.items():
        module = name.removesuffix(".weight")
        if module in chosen:
            written |= {f"{module}.{leaf}": part for leaf, part in _parts(layout, module, chosen[module]).items()}
        else:
            written[name] = lazy.cast(dtype) if lazy.quantized and lazy.dtype != dtype else lazy
    decoded = sum(lazy.quantized for name, lazy in found.items() if name.removesuffix(".weight") not in chosen)
    source.notes.append(f"{len(chosen)} quantized matrices kept bit for bit, {decoded} decoded to {_name(dtype)}")
    if options.format == COMPRESSED and not all(one.spec.symmetric for one in chosen.values()):
        source.notes.append("zero points: transformers loads them with CompressedTensorsConfig(dequantize=True)")
    quantization = _config(options.format, layout, chosen, depth)
    hf.write(
        target, {**values, "dtype": _name(dtype), "quantization_config": quantization}, written, source.files, on_event
    )
    if options.format == "gptq":
        target.write("quantize_config.json", storage.json_bytes(quantization))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choose(format: str, layout: Any, found: Mapping[str, Lazy], depth: int) -> dict[str, Packed]:
    """The modules that the layout holds as they are. For GPTQ and AWQ all modules of one name, in one setting, or
    none."""
    held = {}
    for name, lazy in found.items():
        module = name.removesuffix(".weight")
        if lazy.packed is not None and module.endswith(LEAVES) and lazy.packed.spec.format in ("int4", "int8"):
            spec = _spec(format, lazy.packed.spec)
            if layout.fits(spec, *lazy.shape) is None:
                held[module] = lazy.packed
    if format == COMPRESSED or not held:
        return held
    sizes: Counter[Spec] = Counter()
    for module, one in held.items():
        sizes[_spec(format, one.spec)] += found[f"{module}.weight"].shape[0] * found[f"{module}.weight"].shape[1]
    spec = sizes.most_common(1)[0][0]
    held = {module: one for module, one in held.items() if _spec(format, one.spec) == spec}
    whole = {leaf for leaf in LEAVES if sum(module.endswith(leaf) for module in held) == depth}
    return {module: one for module, one in held.items() if module.endswith(tuple(whole))}


def _spec(format: str, spec: Spec) -> Spec:
    """What matters of a spec: AWQ always has zero points."""
    return Spec(spec.format, spec.group_size, False) if format == "awq" else spec


def _null(found: Mapping[str, Lazy], chosen: Mapping[str, Packed], depth: int) -> dict[str, Packed]:
    """The null layer's feed-forward, zeros that are quantized as the other layers' is."""
    made = {}
    for leaf in LEAVES[2:]:
        like = chosen.get(f"model.layers.0.{leaf}")
        if like is not None:
            name = f"model.layers.{depth}.{leaf}"
            made[name] = _zeros(like.spec, *found[f"{name}.weight"].shape)
    return made


def _zeros(spec: Spec, out: int, columns: int) -> Packed:
    """A matrix of zeros: every code is the zero point, and every scale 1."""
    fill = {"qweight": 0x88 if spec.format == "int4" else 0, "scales": 1.0, "zeros": 8.0}

    def full(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
        return Lazy(dtype, shape, lambda: torch.full(shape, fill[name], dtype=dtype), "zeros")

    layout = formats.FORMATS[spec.format].tensors(spec, out, columns)
    return Packed(spec, {name: full(name, *entry) for name, entry in layout.items()}, "zeros")


def _parts(layout: Any, module: str, one: Packed) -> dict[str, Lazy]:
    """The layout's tensors of a matrix, none made yet."""
    out, half = one.tensors["qweight"].shape
    made = packing.made(layout, one.spec, out, half * 8 // formats.FORMATS[one.spec.format].bits)
    loading = packed.Loading(one.tensors)

    def part(leaf: str) -> Lazy:
        def load() -> Tensor:
            try:
                return layout.MADE[leaf](loading, one.spec)
            except UsageError as exc:
                raise Refused(f"{module}: {exc.message}", hint=exc.hint) from exc

        return Lazy(made[leaf][1], made[leaf][0], load, module)

    return {leaf: part(leaf) for leaf in made}


# ---- what readers are told ---------------------------------------------------------------------------------------


def _config(format: str, layout: Any, chosen: Mapping[str, Packed], depth: int) -> dict[str, Any]:
    """config.json's quantization_config."""
    if format == COMPRESSED:
        return _compressed(layout, chosen, depth)
    spec = next(iter(chosen.values())).spec
    leaves = [leaf for leaf in LEAVES if f"model.layers.0.{leaf}" in chosen]
    if format == "gptq":
        return {
            **layout.write_config(spec),
            "block_name_to_quantize": "model.layers",
            "modules_in_block_to_quantize": [[leaf] for leaf in leaves],
            "meta": {"quantizer": [f"moai:{__version__}"]},
        }
    return {**layout.write_config(spec), "modules_to_not_convert": [*PLAIN, *(n for n in LEAVES if n not in leaves)]}


def _compressed(layout: Any, chosen: Mapping[str, Packed], depth: int) -> dict[str, Any]:
    """Groups of modules with one setting each; the null layer is none of them."""
    specs: dict[Spec, list[str]] = {}
    for module, one in chosen.items():
        specs.setdefault(one.spec, []).append(module)
    groups = {}
    for number, (spec, modules) in enumerate(specs.items()):
        whole = [leaf for leaf in LEAVES if sum(module.endswith(leaf) for module in modules) == depth]
        targets = ["re:.*" + leaf.replace(".", "[.]") + "$" for leaf in whole]
        targets += [module for module in modules if not module.endswith(tuple(whole))]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": layout.write_config(spec),
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": COMPRESSED,
        "format": layout.FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", f"re:model[.]layers[.]{depth}[.].*"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
