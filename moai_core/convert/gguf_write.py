"""Writing GGUF: which architecture a model is, its tensors under llama.cpp's names and in its types, its keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from moai_core.convert import gguf_tokenizer
from moai_core.convert.gguf_file import BF16, BLOCK, F16, F32, PLAIN, library
from moai_core.convert.source import Lazy, OnEvent, Options, Refused, Source, emit, holders
from moai_core.errors import CheckpointError

Q4_0, Q8_0 = 2, 8
_KINDS = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
_FROM_DTYPE = {torch.bfloat16: BF16, torch.float16: F16}
_FILE_TYPE = {F32: "ALL_F32", F16: "MOSTLY_F16", BF16: "MOSTLY_BF16", Q8_0: "MOSTLY_Q8_0", Q4_0: "MOSTLY_Q4_0"}
# Fields of config.json without a key of their own in GGUF; they travel in moai.config.
EXTRA = (
    "pad_token_id", "bos_token_id", "eos_token_id", "dt_bc_norm_eps", "initializer_range", "residual_in_fp32",
    "use_fast_scan", "use_checkpoint", "quantization_bits", "use_quantization", "intermediate_size",
)  # fmt: skip

# GGUF's name, moai's name.
MODEL = (
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.final_layernorm.weight"),
    ("output.weight", "lm_head.weight"),
)
LAYER = (
    ("attn_norm.weight", "input_layernorm.weight"),
    ("ssm_in.weight", "mamba.in_proj.weight"),
    ("ssm_conv1d.weight", "mamba.conv1d.weight"),
    ("ssm_conv1d.bias", "mamba.conv1d.bias"),
    ("ssm_x.weight", "mamba.x_proj.weight"),
    ("ssm_dt_norm.weight", "mamba.dt_layernorm.weight"),
    ("ssm_b_norm.weight", "mamba.b_layernorm.weight"),
    ("ssm_c_norm.weight", "mamba.c_layernorm.weight"),
    ("ssm_dt.weight", "mamba.dt_proj.weight"),
    ("ssm_dt.bias", "mamba.dt_bias"),
    ("ssm_a", "mamba.A_log"),
    ("ssm_d", "mamba.D"),
    ("ssm_out.weight", "mamba.out_proj.weight"),
    ("ffn_norm.weight", "pre_ff_layernorm.weight"),
    ("ffn_gate.weight", "feed_forward.gate_proj.weight"),
    ("ffn_up.weight", "feed_forward.up_proj.weight"),
    ("ffn_down.weight", "feed_forward.down_proj.weight"),
)
INNER_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
# An FFN that adds nothing, for models that have none, as wide as the smallest group of a quantized row.
_ZERO_FFN = 32


class _Part(NamedTuple):
    """A tensor to write: where its numbers come from, or the number that fills it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    source: Lazy | float


def write(source: Source, target: Path, options: Options, on_event: OnEvent | None = None) -> None:
    """See source.py. Tensors go out one at a time, in blocks of rows. Raises Refused, UsageError without gguf."""
    gguf = library()
    architecture, weightless = _architecture(source)
    parts = _parts(source, architecture, options)
    writer = gguf.GGUFWriter(target, architecture)
    try:
        for name, value in _keys(source, architecture, weightless, parts, options).items():
            _add_key(writer, name, value)
        for part in parts:
            kind = gguf.GGMLQuantizationType(part.kind)
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), _nbytes(part), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with open(target, "ab") as file:
        file.write(bytes(-file.tell() % writer.data_alignment))
        for number, part in enumerate(parts, start=1):
            size = sum(file.write(raw) for raw in _encoded(part))
            assert size == _nbytes(part), part.name
            file.write(bytes(-size % writer.data_alignment))
            emit(on_event, part.name, number, len(parts), size)


def _architecture(source: Source) -> tuple[str, bool]:
    """The architecture, and whether dt, B and C are normed without weights. Raises Refused."""
    config = source.config
    if config.get("mixer") != "mamba" or config.get("ffn") not in ("swiglu", "none"):
        what = f"mixer {config['mixer']}, ffn {config['ffn']}" if "mixer" in config else source.format
        hint = "--to qwen3 holds it" if source.format == "moai-transformer" else "moai's own format holds it"
        raise Refused(f"only Mamba-1 models without experts are written as GGUF, this one is {what}", hint=hint)
    if config["expand_factor"] != 2:
        raise Refused(
            f"llama.cpp runs Mamba with an expand_factor of 2, this model has {config['expand_factor']}",
            hint="moai's own format and transformers' hold it",
        )
    if config["ffn"] == "swiglu" and not config["dt_bc_norm"]:
        raise Refused(
            "llama.cpp has no Mamba with a feed-forward but without norms on dt, B and C", hint=holders(config)
        )
    if config["ffn"] == "none" and not config["dt_bc_norm"]:
        return "mamba", False
    if config["ffn"] == "none" and all(
        bool((source.tensors[f"model.layers.{layer}.mamba.{norm}.weight"].load() == 1).all())
        for layer in range(config["num_hidden_layers"])
        for norm in INNER_NORMS
    ):
        return "mamba", True  # llama.cpp norms dt, B and C with the other norms' epsilon (said in `notes`)
    if config["dt_bc_norm_eps"] != config["rms_norm_eps"]:
        raise Refused(
            f"a GGUF has one epsilon for all norms, this model has {config['rms_norm_eps']} and, for dt, B and C, "
            f"{config['dt_bc_norm_eps']}",
            hint="moai's own format holds both",
        )
    return "jamba", False


def _parts(source: Source, architecture: str, options: Options) -> list[_Part]:
    """All tensors of the file in llama.cpp's order; those of the null layer last."""
    config, tensors = source.config, source.tensors
    hidden, depth = config["hidden_size"], config["num_hidden_layers"]
    like, tied = tensors["model.embed_tokens.weight"].dtype, "lm_head.weight" not in tensors
    parts: list[_Part] = []

    def add(name: str, source: Lazy | float, shape: tuple[int, ...]) -> None:
        kind = _kind(name, shape, source.dtype if isinstance(source, Lazy) else like, options.outtype, tied)
        parts.append(_Part(name, shape, kind, source))

    for theirs, ours in MODEL:
        if ours in tensors:
            add(theirs, tensors[ours], tensors[ours].shape)
    for layer in range(depth):
        for theirs, ours in LAYER:
            found = tensors.get(f"model.layers.{layer}.{ours}")
            if found is None or (architecture == "mamba" and ours.startswith(tuple(f"mamba.{n}" for n in INNER_NORMS))):
                continue
            shape = (found.shape[0], found.shape[2]) if ours == "mamba.conv1d.weight" else found.shape
            add(f"blk.{layer}.{theirs}", found, shape)
        if architecture == "jamba" and config["ffn"] == "none":
            for name, value, shape in _zero_ffn(hidden, _ZERO_FFN):
                add(f"blk.{layer}.{name}", value, shape)
    if architecture == "jamba":
        for name, value, shape in _null_layer(hidden, _ffn_width(config)):
            add(f"blk.{depth}.{name}", value, shape)
    return parts


def _ffn_width(config: dict[str, Any]) -> int:
    return config["intermediate_size"] if config["ffn"] == "swiglu" else _ZERO_FFN


def _zero_ffn(hidden: int, width: int) -> list[tuple[str, float, tuple[int, ...]]]:
    return [
        ("ffn_norm.weight", 1.0, (hidden,)),
        ("ffn_gate.weight", 0.0, (width, hidden)),
        ("ffn_up.weight", 0.0, (width, hidden)),
        ("ffn_down.weight", 0.0, (hidden, width)),
    ]


def _null_layer(hidden: int, width: int) -> list[tuple[str, float, tuple[int, ...]]]:
    """An attention layer with one KV head through which the residual stream passes unchanged."""
    narrow = hidden // _heads(hidden)
    attention: list[tuple[str, float, tuple[int, ...]]] = [
        ("attn_norm.weight", 1.0, (hidden,)),
        ("attn_q.weight", 0.0, (hidden, hidden)),
        ("attn_k.weight", 0.0, (narrow, hidden)),
        ("attn_v.weight", 0.0, (narrow, hidden)),
        ("attn_output.weight", 0.0, (hidden, hidden)),
    ]
    return attention + _zero_ffn(hidden, width)


def _heads(hidden: int) -> int:
    """The fewest heads that are at most 128 wide."""
    return next(heads for heads in range(1, hidden + 1) if hidden % heads == 0 and hidden // heads <= 128)


def _kind(name: str, shape: tuple[int, ...], dtype: torch.dtype, outtype: str | None, tied: bool) -> int:
    """The type that a tensor is stored in; see the module's docstring."""
    if len(shape) == 1 or "_norm." in name or "ssm_conv1d" in name or name.endswith("ssm_a"):
        return F32
    kind = _FROM_DTYPE.get(dtype, F32) if outtype is None else _KINDS[outtype]
    if kind == Q4_0 and (
        "ssm_x" in name or "ssm_dt" in name or name == ("token_embd" if tied else "output") + ".weight"
    ):
        kind = Q8_0
    return F16 if kind in (Q4_0, Q8_0) and shape[-1] % 32 else kind


def _nbytes(part: _Part) -> int:
    group, size = library().GGML_QUANT_SIZES[part.kind]
    return math.prod(part.shape) // group * size


def _encoded(part: _Part) -> Iterator[Any]:
    """The tensor's bytes, a block of rows at a time."""
    columns, step = part.shape[-1], max(1, BLOCK // part.shape[-1])
    if not isinstance(part.source, Lazy):
        if part.source == 0:  # zero in every type
            left = _nbytes(part)
            while left:
                left -= len(chunk := bytes(min(left, BLOCK)))
                yield chunk
        else:
            yield np.full(part.shape, part.source, np.float32)
        return
    rows = part.source.load().reshape(-1, columns)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        if part.name.endswith("ssm_a"):
            block = -torch.exp(block.double())
        yield _encode(block, part)


def _encode(block: torch.Tensor, part: _Part) -> np.ndarray:
    if part.kind in PLAIN:
        made = block.to(PLAIN[part.kind]).contiguous()
        if part.kind == F16 and bool((made.isinf() & block.isfinite()).any()):
            raise CheckpointError(
                f"tensor {part.name} holds numbers beyond 65504, the largest of f16", hint="take --outtype bf16 or f32"
            )
        return made.view(torch.int16).numpy() if part.kind == BF16 else made.numpy()
    gguf = library()
    with np.errstate(all="ignore"):  # a group of zeros or of denormals
        return gguf.quantize(block.float().numpy(), gguf.GGMLQuantizationType(part.kind))


# ---- keys ----------------------------------------------------------------------------------------


def _keys(source: Source, architecture: str, weightless: bool, parts: list[_Part], options: Options) -> dict[str, Any]:
    gguf, config = library(), source.config
    tokenizer, notes = gguf_tokenizer.to_keys(source.files, config["vocab_size"], source.path)
    source.notes += notes
    if weightless and config["dt_bc_norm_eps"] != config["rms_norm_eps"]:
        source.notes.append(
            f"llama.cpp norms dt, B and C with the epsilon of the other norms, {config['rms_norm_eps']}, not with "
            f"{config['dt_bc_norm_eps']}"
        )
    depth = config["num_hidden_layers"]
    bytes_ = {kind: sum(_nbytes(part) for part in parts if part.kind == kind) for kind in _KINDS.values()}
    main = _KINDS[options.outtype] if options.outtype else max(bytes_, key=lambda kind: bytes_[kind])
    count = sum(math.prod(part.shape) for part in parts if isinstance(part.source, Lazy))
    if options.outtype in ("q8_0", "q4_0") and (odd := [part for part in parts if part.kind == F16]):
        source.notes.append(f"{len(odd)} tensors are f16: groups of 32 don't divide their rows (such as {odd[0].name})")
    own = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": depth,
        "feed_forward_length": 0,  # of mamba not used, but older versions of llama.cpp want them
        "attention.head_count": 0,
        "ssm.conv_kernel": config["conv_kernel_size"],
        "ssm.inner_size": config["expand_factor"] * config["hidden_size"],
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": config["time_step_rank"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }
    if architecture == "jamba":
        own |= {"block_count": depth + 1, "feed_forward_length": _ffn_width(config)}
        own |= {"attention.head_count": _heads(config["hidden_size"]), "attention.head_count_kv": [0] * depth + [1]}
    else:
        own["ssm.dt_b_c_rms"] = weightless
    return {
        "general.type": "model",
        "general.name": _title(source.path),
        "general.size_label": gguf.size_label(count, count, 0, 0),
        **_card_keys(source.files),
        "general.file_type": int(gguf.LlamaFileType[_FILE_TYPE[main]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture}.{name}": value for name, value in own.items()},
        **tokenizer,
        **gguf_tokenizer.settings_to_keys(source.files, source.path),
        "moai.config": json.dumps({name: config[name] for name in EXTRA}),
    }


def _title(path: Path) -> str:
    """The model's name: the folder's, the run's and the step's, or the one on the hub of a folder in its cache."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    named = f"{path.parent.name}-{path.name}" if re.fullmatch(r"step-\d+", path.name) else path.name
    return named.removesuffix(".gguf") or "moai"


def _card_keys(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Licence, languages and tags from the front matter of the model card, as far as it has them."""
    front = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(errors="replace"), re.DOTALL)
    try:
        given = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:  # a card is for people; what can't be parsed stays where it is
        given = None
    keys: dict[str, Any] = {}
    for ours, theirs in (("license", "license"), ("language", "languages"), ("tags", "tags")):
        value = given.get(ours) if isinstance(given, dict) else None
        listed = [str(item) for item in (value if isinstance(value, list) else [value]) if item]
        if listed:
            keys[f"general.{theirs}"] = listed[0] if ours == "license" else listed
    return keys


def _add_key(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
