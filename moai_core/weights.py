"""A model as a folder in the Hugging Face layout: written in shards, and read with every claim checked beforehand.

    config.json, generation_config.json
    model.safetensors, or model-0000I-of-0000K.safetensors and model.safetensors.index.json
    adapter_config.json, adapter_model.safetensors    LoRA adapters, where it has any (moai_core/quant/lora.py)

Why not transformers' `from_pretrained`: a folder from elsewhere may be truncated, hostile or of another model; here it
is refused with one line that names file and tensor before memory is given to it, nothing missing is quietly initialised
at random, and no code of the folder runs. What `save_pretrained` wrote loads here, and the other way round. Left out:
`.bin` files, other model types (converters are separate).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moai_core import storage, tensors
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import linear as quant
from moai_core.quant import lora

if TYPE_CHECKING:
    from moai_core.model import MoaiMambaForCausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The recurrence multiplies these thousands of times over: they stay fp32 whatever the other weights are.
KEEP_FP32 = ("A_log", "D", "dt_bias")
EXPECTED = "give a run folder, a step-N folder or a folder with config.json and model.safetensors"
_CONFIG_LIMIT = 1 << 20

Found = Mapping[str, tensors.TensorInfo]


def write(folder: storage.FolderWriter, model: torch.nn.Module, *, max_shard_size: int | str = "5GB") -> None:
    """config.json, generation_config.json and shards. A tensor with several names is written once, under the first."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state, seen = {}, set()
    held, adapters = lora.split(model.state_dict()) if lora.adapted(model) else (model.state_dict(), {})
    for name, tensor in held.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            state[name] = tensor
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = _main_dtype(state)
    folder.write("config.json", config.to_json_string().encode())
    if getattr(model, "generation_config", None) is not None:
        generation: Any = model.generation_config
        folder.write("generation_config.json", generation.to_json_string().encode())
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        folder.write(file, tensors.encode({name: state[name] for name in names}, {"format": "pt"}))
    if adapters:
        lora.write(folder, model, adapters)
    if split.is_sharded:
        folder.write(INDEX, storage.json_bytes({"metadata": split.metadata, "weight_map": split.tensor_to_filename}))


def read(folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> MoaiMambaForCausalLM:
    """The model in `folder`. `dtype` casts the weights (None: as stored); A_log, D and dt_bias are fp32 in any case.

    Raises CheckpointError naming the file or tensor, and what would be right."""
    from moai_core.model import MoaiMambaForCausalLM

    _refuse_foreign(folder)
    files = shards(folder)
    found = {name: info for names in files.values() for name, info in names.items()}
    config = _config(folder, found)
    try:
        with torch.device("meta"):
            model = MoaiMambaForCausalLM(config)
    except UsageError as exc:
        raise CheckpointError(f"{folder / 'config.json'}: {exc.message}", hint=exc.hint) from exc
    except (RuntimeError, ValueError, OverflowError) as exc:
        raise CheckpointError(f"{folder / 'config.json'}: no model has these sizes ({_line(exc)})") from exc
    # With a tied head the file usually has one of the two names.
    optional = {"lm_head.weight"} if config.tie_word_embeddings and "lm_head.weight" in model.state_dict() else set()
    stored = _stored(model)
    _compare(folder, {name: tuple(t.shape) for name, t in model.state_dict().items()}, found, optional, stored)
    state = {}
    for file in files:
        for name, tensor in tensors.iterate(folder / file):
            state[name] = tensor.to(device=device, dtype=stored.get(name) or _dtype(name, tensor, dtype))
    for name in optional & state.keys():
        if not torch.equal(state.pop(name), state["model.embed_tokens.weight"]):
            raise CheckpointError(f"{folder}: config.json ties {name} to the embedding, but the two differ")
    model.load_state_dict(state, strict=not optional, assign=True)
    if isinstance(embedding := model.model.embed_tokens, quant.QuantEmbedding):
        embedding.dtype = model.dtype
    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never loaded: {left}"
    if (folder / lora.CONFIG).exists():
        lora.read(folder, model, device)
    if (folder / "generation_config.json").exists():
        model.generation_config = _generation(folder / "generation_config.json")
    return model.eval()


def read_config(folder: Path, found: Mapping[str, Any]) -> Any:
    """The MoaiMambaConfig of `folder`, whose layers agree with the names of the tensors `found`. Raises CheckpointError
    for another model type, code, impossible values.
    """
    _refuse_foreign(folder)
    return _config(folder, found)


def shards(folder: Path) -> dict[str, dict[str, tensors.TensorInfo]]:
    """`{file: {tensor: info}}` of a folder's weights, each header checked and compared with the index.

    Raises CheckpointError.
    """
    if (folder / INDEX).exists():
        return _indexed(folder)
    if (folder / SINGLE).exists():
        return {SINGLE: tensors.inspect(folder / SINGLE)}
    other = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if other:
        raise CheckpointError(
            f"{folder / other[0]}: pickle files can run code when opened, only safetensors files are read",
            hint="open it where you trust it and write it again with model.save_pretrained(FOLDER), as safetensors",
        )
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}", hint=EXPECTED)


def _indexed(folder: Path) -> dict[str, dict[str, tensors.TensorInfo]]:
    index = folder / INDEX
    content = storage.read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map")
    files: dict[str, dict[str, tensors.TensorInfo]] = {}
    for name, file in places.items():
        if not storage.plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {name[:80]!r} points to {str(file)[:80]!r}, which is not a .safetensors file of this folder"
            )
        if file not in files:
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder / file}: missing, though {INDEX} names it")
            files[file] = tensors.inspect(folder / file)
        if name not in files[file]:
            raise CheckpointError(f"{folder / file}: has no tensor {name[:80]!r}, though {INDEX} says so")
    for file, names in files.items():
        if extra := [name for name in names if places.get(name) != file]:
            raise CheckpointError(f"{folder / file}: tensor {extra[0][:80]!r} is not in {INDEX}")
    return files


def _refuse_foreign(folder: Path) -> None:
    """config.json must be there, ask for no code of its own and be of our model type."""
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: no config.json", hint=EXPECTED)
    values = storage.read_json(file, limit=_CONFIG_LIMIT)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(values).__name__}")
    if "auto_map" in values:
        raise CheckpointError(
            f"{file}: auto_map asks to run code from the folder, which is never done",
            hint="remove auto_map if this is a plain mamba_moai model",
        )
    if large := [name for name, value in values.items() if isinstance(value, int) and value >= 1 << 31]:
        raise CheckpointError(f"{file}: {large[0][:80]} is {str(values[large[0]])[:40]}, no model is that large")
    kind = values.get("model_type")
    if kind != "mamba_moai":
        convertible = kind in ("mamba", "falcon_mamba", "jamba") or (kind is None and "d_model" in values)
        raise CheckpointError(
            f"{file}: model_type is {str(kind)[:60]!r}, only 'mamba_moai' can be loaded",
            hint="`moai convert FOLDER NEW --to moai` makes one of it" if convertible else None,
        )


def _config(folder: Path, found: Mapping[str, Any]) -> Any:
    """The configuration. Its layers are compared with the tensors before a model with that many of them is built."""
    from moai_core.model import load_mamba_config

    try:
        config = load_mamba_config(folder)
    except UsageError as exc:
        raise CheckpointError(exc.message, hint=exc.hint) from exc
    numbers = {int(match[1]) for name in found if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    layers = len(numbers)
    if config.num_hidden_layers != layers:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, the weights have {layers}"
        )
    return config


def _main_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The type of the weights: that of most numbers, what is quantized or kept in fp32 aside."""
    quantized = {name.rpartition(".")[0] for name in state if name.endswith(".qweight")}
    parts = {name: name.rpartition(".") for name in state}
    plain = [state[n] for n, (module, _, leaf) in parts.items() if module not in quantized and leaf not in KEEP_FP32]
    return max(plain or state.values(), key=torch.Tensor.numel).dtype


def _stored(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """The tensors of quantized layers and the types that their formats give them."""
    layers = quant.quantized(model).items()
    return {f"{name}.{part}": dtype for name, layer in layers for part, (_, dtype) in layer.stored.items()}


def _compare(
    folder: Path,
    wanted: Mapping[str, tuple[int, ...]],
    found: Found,
    optional: set[str],
    stored: Mapping[str, torch.dtype],
) -> None:
    def some(names: Sequence[str]) -> str:
        return ", ".join(name[:80] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    for name, shape in wanted.items():
        if name in found and found[name].shape != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(found[name].shape)}, config.json asks for {list(shape)}"
            )
    if missing := [name for name in wanted if name not in found and name not in optional]:
        raise CheckpointError(f"{folder}: missing tensors: {some(missing)}")
    if extra := [name for name in found if name not in wanted]:
        raise CheckpointError(f"{folder}: unexpected tensors: {some(extra)}")
    # transformers writes scales as fp32, which loses nothing.
    wide = {torch.float16: torch.float32}
    for name, dtype in stored.items():
        if found[name].dtype not in (dtype, wide.get(dtype)):
            raise CheckpointError(
                f"{folder}: tensor {name} has type {found[name].dtype}, its format is stored as {dtype}"
            )
    plain = {name: info.dtype for name, info in found.items() if name not in stored}
    if odd := [name for name, dtype in plain.items() if not dtype.is_floating_point or dtype.itemsize < 2]:
        raise CheckpointError(
            f"{folder}: tensor {odd[0]} has type {found[odd[0]].dtype}, expected a floating-point one"
        )


def _dtype(name: str, tensor: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    return torch.float32 if name.rsplit(".", 1)[-1] in KEEP_FP32 else wanted or tensor.dtype


def _generation(file: Path) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(storage.read_json(file, limit=_CONFIG_LIMIT))
    except (ValueError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"{file}: not a generation configuration ({_line(exc)})") from exc


def _line(exc: Exception) -> str:
    """The first line of a library's message, which may go on for many."""
    return (str(exc).splitlines() or [type(exc).__name__])[0][:160]
