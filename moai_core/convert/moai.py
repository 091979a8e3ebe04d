"""moai's own folders: a run, a step of it, or a model in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moai_core import checkpoint, storage, weights
from moai_core.config import MODEL_TYPE
from moai_core.convert import folder as hf
from moai_core.convert import packed
from moai_core.convert.runtimes import MoaiRuntime
from moai_core.convert.source import OnEvent, Options, Runtime, Source
from moai_core.errors import CheckpointError

FORMATS = ("moai",)


def detect(path: Path) -> str | None:
    """See source.py."""
    if not path.is_dir():
        return None
    ours = hf.model_type(path) == MODEL_TYPE or (not (path / "config.json").exists() and storage.steps(path))
    return "moai" if ours else None


def read(path: Path) -> Source:
    """See source.py. `path`: a model folder, or a run folder, of which the latest intact step is taken."""
    notes = []
    if not (path / "config.json").exists():
        newest = checkpoint.latest(path)
        if newest is None:
            raise CheckpointError(f"{path}: none of its checkpoints is complete and undamaged")
        notes.append(f"the latest checkpoint was taken: {newest.name}")
        path = newest
    if (path / storage.MANIFEST).exists():  # a flipped bit is a number like others to all that follows
        storage.verify(path, only=lambda name: name.startswith("model") and name.endswith(".safetensors"))
    fields = hf.read_config(path)
    found = hf.read_tensors(path)
    hf.check_layers(fields.file, "num_hidden_layers", fields.integer("num_hidden_layers", 24), found)
    values = weights.read_config(path, found).numbers()
    if fields.values.get("quantization"):  # from here on it is a plain model, until one is written
        values["use_quantization"] = False
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    hf.untie(path, found, embedding, head, values["tie_word_embeddings"])
    wanted = {name: (name, shape) for name, shape in hf.shapes(values, fields.file).items()}
    taken = hf.adopt(path, found, wanted, {head} if values["tie_word_embeddings"] else set())
    return Source(path, "moai", values, taken, hf.read_files(path), notes=notes)


def write(source: Source, target: Any, options: Options, on_event: OnEvent | None = None) -> None:
    """See source.py; every model that moai can read, moai can hold, quantized as it is."""
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    found, quantization = packed.keep(source.tensors)
    extra = {} if quantization is None else {"use_quantization": True, "quantization_bits": packed.bits(source.tensors)}
    config: Any = MoaiMambaConfig(**source.config | extra, quantization=quantization)
    config.architectures = [MoaiMambaForCausalLM.__name__]
    values = json.loads(config.to_json_string())
    if quantization is not None:
        values["dtype"] = packed.plain_dtype(source.tensors)
    hf.write(target, values, found, source.files, on_event)


def open_runtime(path: Path, format: str) -> Runtime:
    """See source.py."""
    return MoaiRuntime(path)
