"""GGUF, the format of llama.cpp: architectures `mamba` and `jamba`, written and read back.

    ffn none, no dt/B/C norms                   mamba
    ffn none, dt/B/C norms with weights of one  mamba with ssm.dt_b_c_rms (Falcon-Mamba)
    ffn none, dt/B/C norms with other weights   jamba whose FFN is zero
    ffn swiglu, dt/B/C norms                    jamba

Without any attention layer llama.cpp loads a jamba and aborts at the first token, so one null attention layer comes
last: its projections and its FFN are zero, so it adds nothing (the residual passes). Reading drops it again.
llama.cpp wants norms, biases, the convolution, A and D in F32 whatever the rest is. A is stored as -exp(A_log); read
back, A agrees to 1 ulp. Besides the standard keys `moai.config` holds the fields that GGUF has no key for.
q8_0 and q4_0 are rounded to nearest, without calibration; q4_0 keeps the head (or the embedding that is one), x_proj
and dt_proj in Q8_0: together a few percent of the bytes and the most sensitive to rounding. What has rows that
no group of 32 divides stays F16. Left out: experts, K-quants (read only), split files.
Sources: llama.cpp's src/models/{mamba,jamba}.cpp and conversion/{mamba,jamba}.py; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moai_core import config as numbers
from moai_core.convert import folder as hf
from moai_core.convert import gguf_tokenizer
from moai_core.convert.gguf_file import BF16, BLOCK, F16, F32, MAGIC, PLAIN, Header, inspect, library
from moai_core.convert.gguf_runtime import judge, open_runtime
from moai_core.convert.source import Lazy, OnEvent, Options, Refused, Source, emit, holders
from moai_core.errors import CheckpointError, UsageError
from moai_core.storage import parse_json

__all__ = ["FILE", "FORMATS", "detect", "judge", "open_runtime", "read", "write"]

FORMATS = ("gguf",)
FILE = True
Q4_0, Q8_0 = 2, 8
_KINDS = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
_FROM_DTYPE = {torch.bfloat16: BF16, torch.float16: F16}
_FILE_TYPE = {F32: "ALL_F32", F16: "MOSTLY_F16", BF16: "MOSTLY_BF16", Q8_0: "MOSTLY_Q8_0", Q4_0: "MOSTLY_Q4_0"}
# Fields of config.json without a key of their own in GGUF; they travel in moai.config.
_EXTRA = (
    "pad_token_id", "bos_token_id", "eos_token_id", "dt_bc_norm_eps", "initializer_range", "residual_in_fp32",
    "use_fast_scan", "use_checkpoint", "quantization_bits", "use_quantization",
)  # fmt: skip

# GGUF's name, moai's name.
_MODEL = (
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.final_layernorm.weight"),
    ("output.weight", "lm_head.weight"),
)
_LAYER = (
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
_INNER_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
_KEEP_FP32 = ("A_log", "D", "dt_bias")
# An FFN that adds nothing, for models that have none, as wide as the smallest group of a quantized row.
_ZERO_FFN = 32


def detect(path: Path) -> str | None:
    """See source.py: a file that begins like a GGUF, or is called so."""
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            return "gguf" if file.read(4) == MAGIC or path.suffix == ".gguf" else None
    except OSError:
        return None


# ---- writing -------------------------------------------------------------------------------------


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
        raise Refused(f"GGUF is written of Mamba-1 models without experts, this one has {what}", hint=holders(config))
    if config["expand_factor"] != 2:
        raise Refused(
            f"llama.cpp runs Mamba with an expand_factor of 2, this model has {config['expand_factor']}",
            hint=holders(config),
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
        for norm in _INNER_NORMS
    ):
        return "mamba", True  # llama.cpp norms dt, B and C with the other norms' epsilon (said in `notes`)
    if config["dt_bc_norm_eps"] != config["rms_norm_eps"]:
        raise Refused(
            f"a GGUF has one epsilon for all norms, this model has {config['rms_norm_eps']} and, for dt, B and C, "
            f"{config['dt_bc_norm_eps']}",
            hint=holders(config),
        )
    return "jamba", False


def _parts(source: Source, architecture: str, options: Options) -> list[_Part]:
    """All tensors of the file in llama.cpp's order; those of the null layer last."""
    config, tensors = source.config, source.tensors
    hidden, depth = config["hidden_size"], config["num_hidden_layers"]
    tied = "lm_head.weight" not in tensors
    parts: list[_Part] = []

    def add(name: str, source: Lazy | float, shape: tuple[int, ...]) -> None:
        kind = _kind(name, shape, source.dtype if isinstance(source, Lazy) else like, options.outtype, tied)
        parts.append(_Part(name, shape, kind, source))

    like = tensors["model.embed_tokens.weight"].dtype
    for theirs, ours in _MODEL:
        if ours in tensors:
            add(theirs, tensors[ours], tensors[ours].shape)
    for layer in range(depth):
        for theirs, ours in _LAYER:
            found = tensors.get(f"model.layers.{layer}.{ours}")
            if found is not None and not (architecture == "mamba" and "_norm." in theirs and "ssm" in theirs):
                add(f"blk.{layer}.{theirs}", found, (found.shape[0], found.shape[2]) if "conv1d.w" in ours else found.shape)
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
    if kind == Q4_0 and ("ssm_x" in name or "ssm_dt" in name or name == ("token_embd" if tied else "output") + ".weight"):
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


def _keys(
    source: Source, architecture: str, weightless: bool, parts: list[_Part], options: Options
) -> dict[str, Any]:
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
        "general.name": source.path.name.removesuffix(".gguf") or "moai",
        "general.size_label": gguf.size_label(count, count, 0, 0),
        "general.file_type": int(gguf.LlamaFileType[_FILE_TYPE[main]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture}.{name}": value for name, value in own.items()},
        **tokenizer,
        **gguf_tokenizer.settings_to_keys(source.files, source.path),
        "moai.config": json.dumps({name: config[name] for name in _EXTRA}),
    }


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


# ---- reading -------------------------------------------------------------------------------------


class _Keys:
    """The keys of one architecture, each taken with its type checked."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header, self.architecture = header, architecture

    def get(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Raises CheckpointError where the key is missing without a default, or of another type."""
        full = f"{self.architecture}.{name}"
        value = self.header.keys.get(full, default)
        if value is None:
            raise CheckpointError(f"{self.header.path}: the key {full} is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise CheckpointError(f"{self.header.path}: the key {full} can't be {str(value)[:40]!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A number of things, at least 1."""
        value = self.get(name, int, default)
        if not 0 < value < 1 << 31:
            raise CheckpointError(f"{self.header.path}: the key {self.architecture}.{name} can't be {value}")
        return value


def read(path: Path) -> Source:
    """See source.py. All tensors come in one type: the file's 16-bit one where that loses nothing, else fp32."""
    header = inspect(path)
    architecture = header.keys.get("general.architecture")
    if architecture not in ("mamba", "jamba"):
        raise CheckpointError(
            f"{path}: the architecture is {str(architecture)[:60]!r}, only 'mamba' and 'jamba' can be read"
        )
    if header.keys.get("split.count", 0) > 1:
        raise CheckpointError(f"{path}: one piece of a split file", hint="join them with llama-gguf-split --merge")
    keys = _Keys(header, architecture)
    layers, nulls = _layers(header, keys)
    ffn = architecture == "jamba" and not _all_zero_ffn(header, layers)
    values = _fields(header, keys, layers, ffn)
    dtype = _dtype(header)
    shapes = hf.shapes(values, path)
    theirs = {ours: name for name, ours in _names(layers)}
    weightless = architecture == "mamba" and values["dt_bc_norm"]
    taken: dict[str, Lazy] = {}
    for name, shape in shapes.items():
        if weightless and name.endswith(tuple(f"{norm}.weight" for norm in _INNER_NORMS)):
            taken[name] = Lazy(dtype, shape, lambda shape=shape: torch.ones(shape, dtype=dtype), "ones")
        else:
            taken[name] = _lazy(header, theirs[name], name, shape, dtype)
    spare = {f"blk.{number}." for number in nulls} | ({f"blk.{n}.ffn_" for n in layers} if not ffn else set())
    used = {theirs[name] for name in taken}
    if unknown := [name for name in header.tensors if name not in used and not name.startswith(tuple(spare) or "\n")]:
        raise CheckpointError(f"{path}: tensor {unknown[0]} has no place in this model")
    files, entries, notes = gguf_tokenizer.from_keys(header.keys, values["vocab_size"], path)
    ids = {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files |= gguf_tokenizer.settings_from_keys(header.keys, ids)
    notes = [f"null attention layer {number} dropped: it changes nothing" for number in nulls] + notes
    if architecture == "jamba" and not ffn:
        notes.append("the feed-forwards are zero, they were dropped")
    kinds = sorted({library().GGMLQuantizationType(entry.kind).name for entry in header.tensors.values()} - {"F32"})
    if dtype == torch.float32 and kinds:
        notes.append(f"{', '.join(kinds)} is read as fp32, which holds every number exactly")
    return Source(path, "gguf", values, taken, files, entries, notes)


def _names(layers: list[int]) -> list[tuple[str, str]]:
    """GGUF's and moai's name of every tensor that a model may have; `layers` are the numbers of the Mamba layers."""
    inside = [(f"blk.{n}.{a}", f"model.layers.{i}.{b}") for i, n in enumerate(layers) for a, b in _LAYER]
    return [*_MODEL, *inside]


def _layers(header: Header, keys: _Keys) -> tuple[list[int], list[int]]:
    """The numbers of the Mamba layers and those of the null attention layers. Raises CheckpointError."""
    path, depth = header.path, keys.count("block_count")
    there = {int(match[1]) for name in header.tensors if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if there != set(range(depth)) or len(there) != depth:
        raise CheckpointError(f"{path}: the key {keys.architecture}.block_count is {depth}, the tensors have {len(there)}")
    if experts := [name for name in header.tensors if "_exps." in name or "ffn_gate_inp" in name]:
        raise CheckpointError(f"{path}: has experts ({experts[0]}), mixtures of experts can't be converted yet")
    nulls = [number for number in range(depth) if f"blk.{number}.attn_q.weight" in header.tensors]
    for number in nulls:
        for last in ("attn_output.weight", "ffn_down.weight"):
            name = f"blk.{number}.{last}"
            if name not in header.tensors:
                raise CheckpointError(f"{path}: tensor {name} is missing")
            if not header.is_zero(name):
                raise CheckpointError(
                    f"{path}: layer {number} is an attention layer that does something; moai has no attention"
                )
    if len(nulls) == depth:
        raise CheckpointError(f"{path}: none of its {depth} layers is a Mamba layer")
    return [number for number in range(depth) if number not in nulls], nulls


def _all_zero_ffn(header: Header, layers: list[int]) -> bool:
    names = [f"blk.{number}.ffn_{part}.weight" for number in layers for part in ("down", "gate", "up")]
    return all(name in header.tensors and header.is_zero(name) for name in names)


def _fields(header: Header, keys: _Keys, layers: list[int], ffn: bool) -> dict[str, Any]:
    """moai's fields. Raises CheckpointError where a key is missing or no model has it."""
    path, hidden = header.path, keys.count("embedding_length")
    inner, eps = keys.count("ssm.inner_size"), _decimal(keys.get("attention.layer_norm_rms_epsilon", float))
    if inner % hidden:
        raise CheckpointError(
            f"{path}: {keys.architecture}.ssm.inner_size is {inner}, no multiple of embedding_length {hidden}"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing or not a matrix")
    values = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "state_size": keys.count("ssm.state_size"),
        "conv_kernel_size": keys.count("ssm.conv_kernel"),
        "expand_factor": inner // hidden,
        "time_step_rank": keys.count("ssm.time_step_rank"),
        "max_position_embeddings": keys.count("context_length", 32768),
        "rms_norm_eps": eps,
        "dt_bc_norm": keys.architecture == "jamba" or keys.get("ssm.dt_b_c_rms", bool, False),
        "ffn": "swiglu" if ffn else "none",
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if ffn:
        values["intermediate_size"] = keys.count("feed_forward_length")
    own = _own(header)
    for name, value in gguf_tokenizer.special_ids(header.keys, embedding.shape[0]).items():
        given = own.get(name)
        values[name] = given if value is None or given == value or (isinstance(given, list) and value in given) else value
    values |= {name: value for name, value in own.items() if name not in values}
    try:
        return numbers.fields(**values)
    except UsageError as exc:
        raise CheckpointError(f"{path}: {exc.message}") from exc


def _own(header: Header) -> dict[str, Any]:
    """What moai.config says of fields without a key, as far as it doesn't contradict the keys."""
    raw = header.keys.get("moai.config")
    own = parse_json(raw.encode(), f"{header.path}: moai.config") if isinstance(raw, str) else {}
    if not isinstance(own, dict):
        raise CheckpointError(f"{header.path}: moai.config is not a JSON object")
    return {name: own[name] for name in _EXTRA if name in own}


def _decimal(value: float) -> float:
    """1e-5, which fp32 made 9.99999974e-06, is 1e-5 again."""
    return float(str(np.float32(value)))


def _dtype(header: Header) -> torch.dtype:
    size: dict[int, int] = {}
    for entry in header.tensors.values():
        size[entry.kind] = size.get(entry.kind, 0) + math.prod(entry.shape)
    dtype = PLAIN.get(max(size, key=lambda kind: size[kind]), torch.float32)
    names = [name for name in header.tensors if not name.endswith(("ssm_a", "ssm_d", "ssm_dt.bias"))]
    return dtype if set(size) <= set(PLAIN) and all(header.fits(name, dtype) for name in names) else torch.float32


def _lazy(header: Header, theirs: str, ours: str, shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    """Raises CheckpointError where the tensor is missing or of another shape (both are named)."""
    path, wanted = header.path, (shape[0], shape[2]) if ours.endswith("conv1d.weight") else shape
    if theirs not in header.tensors:
        raise CheckpointError(f"{path}: tensor {theirs} is missing (shape {list(wanted)})")
    found = header.tensors[theirs].shape
    if [size for size in found if size > 1] != [size for size in wanted if size > 1]:
        raise CheckpointError(f"{path}: tensor {theirs} has the shape {list(found)}, the keys make it {list(wanted)}")
    kept = torch.float32 if ours.endswith(_KEEP_FP32) else dtype

    def load() -> torch.Tensor:
        if not ours.endswith("A_log"):
            return header.load(theirs, kept).reshape(shape)
        a = header.load(theirs, torch.float32).reshape(shape)
        if not bool((a < 0).all()):
            raise CheckpointError(f"{path}: tensor {theirs} must be negative throughout")
        return torch.log(-a.double()).float()

    return Lazy(kept, shape, load, f"{path}: tensor {theirs}")
