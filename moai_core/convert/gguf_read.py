"""Reading GGUF: keys into moai's fields, tensors under moai's names, null layers and zero feed-forwards dropped."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from moai_core import config as numbers
from moai_core.convert import folder as hf
from moai_core.convert import gguf_tokenizer
from moai_core.convert.gguf_file import PLAIN, Header, inspect, library
from moai_core.convert.gguf_write import EXTRA, INNER_NORMS, LAYER, MODEL
from moai_core.convert.source import Lazy, Source
from moai_core.errors import CheckpointError, UsageError
from moai_core.storage import parse_json
from moai_core.weights import KEEP_FP32


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
        if weightless and name.endswith(tuple(f"{norm}.weight" for norm in INNER_NORMS)):
            taken[name] = hf.ones(taken["model.embed_tokens.weight"], shape)
        else:
            taken[name] = _lazy(header, theirs[name], name, shape, dtype)
    spare = {f"blk.{number}." for number in nulls} | ({f"blk.{n}.ffn_" for n in layers} if not ffn else set())
    used = {theirs[name] for name in taken}
    if unknown := [name for name in header.tensors if name not in used and not name.startswith(tuple(spare) or "\n")]:
        raise CheckpointError(f"{path}: tensor {unknown[0]} has no place in this model")
    files, entries, notes = gguf_tokenizer.from_keys(header.keys, values["vocab_size"], path)
    ids = {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files |= gguf_tokenizer.settings_from_keys(header.keys, ids) | _card(header)
    notes = [f"null attention layer {number} dropped: it changes nothing" for number in nulls] + notes
    if architecture == "jamba" and not ffn:
        notes.append("the feed-forwards are zero, they were dropped")
    kinds = sorted({library().GGMLQuantizationType(entry.kind).name for entry in header.tensors.values()} - {"F32"})
    if dtype == torch.float32 and kinds:
        verb = "is" if len(kinds) == 1 else "are"
        notes.append(f"{', '.join(kinds)} {verb} read as fp32, which holds every number exactly")
    return Source(path, "gguf", values, taken, files, entries, notes)


def _card(header: Header) -> dict[str, bytes]:
    """A model card of what the keys say of licence, languages and tags."""
    found = {}
    for ours, theirs, kind in (("license", "license", str), ("language", "languages", list), ("tags", "tags", list)):
        value = header.keys.get(f"general.{theirs}")
        if isinstance(value, kind):
            found[ours] = value
    name = header.keys.get("general.name")
    title = f"# {name}\n" if isinstance(name, str) else ""
    text = f"---\n{yaml.safe_dump(found, allow_unicode=True)}---\n\n{title}"
    return {"README.md": text.encode()} if found else {}


def _names(layers: list[int]) -> list[tuple[str, str]]:
    """GGUF's and moai's name of every tensor that a model may have; `layers` are the numbers of the Mamba layers."""
    inside = [(f"blk.{n}.{a}", f"model.layers.{i}.{b}") for i, n in enumerate(layers) for a, b in LAYER]
    return [*MODEL, *inside]


def _layers(header: Header, keys: _Keys) -> tuple[list[int], list[int]]:
    """The numbers of the Mamba layers and those of the null attention layers. Raises CheckpointError."""
    path, depth = header.path, keys.count("block_count")
    there = {int(match[1]) for name in header.tensors if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if len(there) != depth or max(there) >= depth:
        raise CheckpointError(
            f"{path}: the key {keys.architecture}.block_count is {depth}, the tensors have {len(there)}"
        )
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
        values[name] = (
            given if value is None or given == value or (isinstance(given, list) and value in given) else value
        )
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
    return {name: own[name] for name in EXTRA if name in own}


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
    kept = torch.float32 if ours.endswith(KEEP_FP32) else dtype

    def load() -> torch.Tensor:
        if not ours.endswith("A_log"):
            return header.load(theirs, kept).reshape(shape)
        a = header.load(theirs, torch.float32).reshape(shape)
        if not bool((a < 0).all()):
            raise CheckpointError(f"{path}: tensor {theirs} must be negative throughout")
        return torch.log(-a.double()).float()

    return Lazy(kept, shape, load, f"{path}: tensor {theirs}")
