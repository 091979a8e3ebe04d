"""What is in a checkpoint: a model in the Hugging Face layout, the tokenizer, the optimizer's state and the trainer's, as `run/step-N/`.

    config.json generation_config.json model[-00001-of-0000K].safetensors [model.safetensors.index.json]   the model, loadable anywhere
    tokenizer.json tokenizer_config.json ...                                                               the tokenizer, likewise
    optimizer-0000R-of-0000W.{safetensors,json}                                                            one pair a rank, keyed by parameter name
    trainer.json                                                                                           step, RNG states, loader, recipe
    manifest.json                                                                                          size and SHA-256 of each, written last

Why: a run must survive a kill, a full disk or a damaged file at any moment, and resume bit-exactly; how folders become atomic is in
`storage.py`. No pickle is written or read, and a folder from elsewhere (without a manifest) is checked before anything is allocated.
Left out: `.bin` files, remote code, other model types (converters are separate), gathering a sharded model's pieces (the caller does).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moai_core import storage, tensors
from moai_core.errors import CheckpointError, StorageError, UsageError
from moai_core.storage import lock, verify

if TYPE_CHECKING:
    from moai_core.model import MoaiMambaForCausalLM

__all__ = [
    "fingerprint",
    "latest",
    "load_model",
    "load_optimizer_state",
    "load_training",
    "lock",
    "optimizer_state",
    "rng_state",
    "save",
    "set_rng_state",
    "verify",
]

# The recurrence amplifies rounding of these thousands of times (Mamba paper, section 3.6): they stay fp32 whatever the rest is.
KEEP_FP32 = ("A_log", "D", "dt_bias")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OPTIMIZER = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
_CONFIG_LIMIT = 1 << 20

OnEvent = Callable[[dict[str, Any]], None]


def _ignore(event: dict[str, Any]) -> None:
    return None


# ---- writing ------------------------------------------------------------------------------------------------------------------------------


def save(
    run_dir: str | os.PathLike[str],
    step: int,
    *,
    model: torch.nn.Module,
    tokenizer: Any = None,
    optimizer_state: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    trainer: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    keep_last: int | None = 3,
    max_shard_size: int | str = "5GB",
    on_event: OnEvent = _ignore,
) -> Path:
    """Write `run_dir/step-N` as a whole and return it; then delete the oldest complete steps beyond `keep_last` (None keeps all).

    `optimizer_state` is a nested dict of tensors and JSON values (see `optimizer_state()`), or a list of them, one a rank. `trainer` and
    `recipe` must be JSON. A `step-N` that exists is replaced, also as a whole. Nothing is deleted before the new folder was read back and found
    equal to what was meant. Emits `{"event": "checkpoint", "step", "path"}`. Raises StorageError; earlier steps are then untouched.
    """
    run_dir = Path(run_dir)
    final = run_dir / f"step-{step}"
    storage.tidy(run_dir)
    with storage.new_folder(final) as folder:
        _write_model(folder, model, max_shard_size)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, folder.path)
        if optimizer_state is not None:
            _write_optimizer(folder, [optimizer_state] if isinstance(optimizer_state, Mapping) else optimizer_state)
        folder.write("trainer.json", _json({"format": 1, "step": step, **(trainer or {}), "recipe": recipe}))
    if keep_last is not None:
        try:
            storage.purge(run_dir, newest=step, keep_last=keep_last)
        except StorageError as exc:  # the new checkpoint is safe: an old one that can't be deleted is no reason to stop
            on_event({"event": "warning", "message": f"old checkpoints could not be deleted: {exc}"})
    on_event({"event": "checkpoint", "step": step, "path": str(final)})
    return final


def save_model(folder: str | os.PathLike[str], model: torch.nn.Module, tokenizer: Any = None, *, max_shard_size: int | str = "5GB") -> Path:
    """Write the model (and tokenizer) alone into `folder`, as a whole, with a manifest; a folder of that name is replaced. Raises StorageError."""
    with storage.new_folder(Path(folder)) as writer:
        _write_model(writer, model, max_shard_size)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, writer.path)
    return Path(folder)


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _write_model(folder: storage.FolderWriter, model: torch.nn.Module, max_shard_size: int | str) -> None:
    """config.json, generation_config.json and shards. A tensor that several names share is written once, under the first name."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            state[name] = tensor
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = max(state.values(), key=torch.Tensor.numel).dtype
    folder.write("config.json", config.to_json_string().encode())
    if getattr(model, "generation_config", None) is not None:
        generation: Any = model.generation_config
        folder.write("generation_config.json", generation.to_json_string().encode())
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        folder.write(file, tensors.encode({name: state[name] for name in names}, {"format": "pt"}))
    if split.is_sharded:
        folder.write(INDEX, _json({"metadata": split.metadata, "weight_map": split.tensor_to_filename}))


def _write_tokenizer(tokenizer: Any, path: Path) -> None:
    try:
        tokenizer.save_pretrained(path)
    except OSError:
        raise
    except Exception as exc:  # the tokenizers library raises a bare Exception whose text ends "(os error 28)"
        code = re.search(r"os error (\d+)", str(exc))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from exc


def _write_optimizer(folder: storage.FolderWriter, ranks: Sequence[Mapping[str, Any]]) -> None:
    for rank, state in enumerate(ranks, start=1):
        tree, named = tensors.flatten(state)
        name = f"optimizer-{rank:05d}-of-{len(ranks):05d}"
        folder.write(f"{name}.safetensors", tensors.encode(named))
        folder.write(f"{name}.json", _json(tree))


# ---- finding ------------------------------------------------------------------------------------------------------------------------------


def latest(run_dir: str | os.PathLike[str], *, on_event: OnEvent = _ignore) -> Path | None:
    """The newest `step-N` of a run whose every file verifies, or None. Emits a warning for each newer one that is damaged, and says so with why.

    Leftovers of dead processes are removed on the way. Raises StorageError if the folder can't be listed.
    """
    run_dir = Path(run_dir)
    storage.tidy(run_dir)
    for _, path in reversed(storage.steps(run_dir)):
        try:
            verify(path)
            return path
        except CheckpointError as exc:
            if path.exists():  # not purged meanwhile
                on_event({"event": "warning", "message": f"damaged checkpoint passed over: {exc}"})
    return None


def _resolve(path: str | os.PathLike[str], on_event: OnEvent = _ignore) -> Path:
    """The folder that holds the model: `path` itself, or the latest step of the run folder `path`."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "doesn't exist"
        raise CheckpointError(f"{folder}: {what}", hint="give a run folder, a step-N folder or a folder with config.json and model.safetensors")
    if (folder / "config.json").exists() or not storage.steps(folder):
        return folder
    found = latest(folder, on_event=on_event)
    if found is None:
        raise CheckpointError(f"{folder}: none of its checkpoints is complete and undamaged")
    return found


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over the hashes of the weight files, in the order of their names: tells whether two folders hold the same weights and shards.

    The manifest's hashes are taken where there is one. Raises CheckpointError."""
    folder = _resolve(path)
    if (folder / storage.MANIFEST).exists():
        hashes = {name: entry["sha256"] for name, entry in storage.read_manifest(folder).items()}
    else:
        hashes = {name: storage.sha256(folder / name) for name in _shards(folder)}
    digest = hashlib.sha256()
    for name in sorted(hashes):
        if name.startswith("model") and name.endswith(".safetensors"):
            digest.update(f"{name} {hashes[name]}\n".encode())
    return digest.hexdigest()


# ---- loading a model ----------------------------------------------------------------------------------------------------------------------


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    scan: str = "auto",
    on_event: OnEvent = _ignore,
) -> MoaiMambaForCausalLM:
    """The model in a run folder (its latest step), a `step-N` folder or any Hugging Face folder of model_type mamba_moai, in eval mode.

    `dtype` casts the weights (None: as stored); A_log, D and dt_bias are always fp32. A manifest is verified where there is one.
    Raises CheckpointError naming the file and the reason, UsageError for a scan backend that can't run here.
    """
    for last_try in (False, False, True):
        folder = _resolve(path, on_event)
        try:
            model = _load_folder(folder, dtype, torch.device(device))
            break
        except CheckpointError:
            # A run that is being trained may have purged the step between finding and reading it.
            if last_try or folder.exists():
                raise
    model.set_scan_backend(scan)
    return model.eval()


def _load_folder(folder: Path, dtype: torch.dtype | None, device: torch.device) -> MoaiMambaForCausalLM:
    from moai_core.model import MoaiMambaForCausalLM

    if (folder / storage.MANIFEST).exists() or (folder / "trainer.json").exists():
        verify(folder, only=lambda name: not name.startswith("optimizer"))
    _check_config(folder)
    shards = _shards(folder)
    found = {name: info for names in shards.values() for name, info in names.items()}
    config = _read_config(folder, found)
    try:
        with torch.device("meta"):
            model = MoaiMambaForCausalLM(config)
    except (RuntimeError, ValueError, OverflowError, MemoryError) as exc:
        raise CheckpointError(f"{folder / 'config.json'}: no model has these sizes ({str(exc).splitlines()[0][:120]})") from exc
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    _compare(folder, wanted, found, tied)
    state = {}
    for file in shards:
        for name, tensor in tensors.iterate(folder / file):
            target = torch.float32 if name.rsplit(".", 1)[-1] in KEEP_FP32 else dtype if tensor.is_floating_point() else None
            state[name] = tensor.to(device=device, dtype=target or tensor.dtype)
    _check_tied(folder, state, tied)
    model.load_state_dict(state, strict=not tied, assign=True)
    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never loaded: {left}"
    if (folder / "generation_config.json").exists():
        model.generation_config = _read_generation(folder / "generation_config.json")
    return model


def _check_config(folder: Path) -> None:
    """Refuse what must never be built: no or foreign config.json, remote code."""
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: no config.json", hint="give a run folder, a step-N folder or a folder with config.json and model.safetensors")
    values = storage.read_json(file, limit=_CONFIG_LIMIT)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(values).__name__}")
    if "auto_map" in values:
        raise CheckpointError(f"{file}: asks to run code of its own (auto_map), which is never done", hint="remove auto_map if the model is a plain mamba_moai")
    if values.get("model_type") != "mamba_moai":
        raise CheckpointError(f"{file}: model_type is {str(values.get('model_type'))[:60]!r}, only 'mamba_moai' can be loaded")


def _read_config(folder: Path, found: Mapping[str, tensors.TensorInfo]) -> Any:
    """The configuration, its layer count compared with the tensors before a model of that many layers is built."""
    from moai_core.model import load_mamba_config

    try:
        config = load_mamba_config(folder)
    except UsageError as exc:
        raise CheckpointError(exc.message, hint=exc.hint) from exc
    layers = {int(match[1]) for name in found if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    if config.num_hidden_layers != max(layers, default=-1) + 1:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, the weights have {max(layers, default=-1) + 1} layers"
        )
    return config


def _read_generation(file: Path) -> Any:
    from transformers import GenerationConfig

    values = storage.read_json(file, limit=_CONFIG_LIMIT)
    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"{file}: not a generation configuration ({str(exc).splitlines()[0][:120]})") from exc


def _shards(folder: Path) -> dict[str, dict[str, tensors.TensorInfo]]:
    """`{file: {tensor: info}}` of a folder's weights, each header checked and compared with the index. Raises CheckpointError."""
    if not (folder / INDEX).exists():
        if (folder / WEIGHTS).exists():
            return {WEIGHTS: tensors.inspect(folder / WEIGHTS)}
        other = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if other:
            raise CheckpointError(
                f"{folder / other[0]}: pickle files can run code when opened, only safetensors files are read",
                hint="open it where you trust it and write it again with model.save_pretrained(folder), which makes model.safetensors",
            )
        raise CheckpointError(f"{folder}: no {WEIGHTS} (nor {INDEX})")
    index = storage.read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder / INDEX}: no weight_map in it")
    files = {}
    for name, file in places.items():
        if not storage.plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {name[:80]!r} points to {str(file)[:80]!r}, which is not a .safetensors file of this folder")
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


def _compare(folder: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tensors.TensorInfo], optional: set[str]) -> None:
    def some(names: Sequence[str]) -> str:
        return ", ".join(name[:80] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    for name, shape in wanted.items():
        if name in found and found[name].shape != shape:
            raise CheckpointError(f"{folder}: tensor {name} has shape {list(found[name].shape)}, config.json asks for {list(shape)}")
    if missing := [name for name in wanted if name not in found and name not in optional]:
        raise CheckpointError(f"{folder}: missing tensors: {some(missing)}")
    if extra := [name for name in found if name not in wanted]:
        raise CheckpointError(f"{folder}: unexpected tensors: {some(extra)}")


def _check_tied(folder: Path, state: dict[str, torch.Tensor], tied: set[str]) -> None:
    for name in tied & state.keys():
        if not torch.equal(state.pop(name), state["model.embed_tokens.weight"]):
            raise CheckpointError(f"{folder}: config.json ties {name} to the embedding, but the two differ")


# ---- the training state -------------------------------------------------------------------------------------------------------------------


def load_training(step_dir: str | os.PathLike[str]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """`(optimizer state, trainer dict)` of a checkpoint, verified first; the ranks' parts are merged. The state is None if none was saved.

    The trainer dict has `step`, `recipe` and what `save` was given. Raises CheckpointError."""
    folder = Path(step_dir)
    verify(folder)
    trainer = storage.read_json(folder / "trainer.json")
    ranks = sorted(name for name in os.listdir(folder) if _OPTIMIZER.fullmatch(name))
    merged: dict[str, Any] | None = None
    for name in ranks:
        tree = storage.read_json((folder / name).with_suffix(".json"), limit=1 << 28)
        merged = _merge(merged or {}, tensors.unflatten(tree, tensors.read(folder / name)))
    return merged, trainer


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    return {**left, **{k: _merge(left[k], v) if isinstance(v, dict) and isinstance(left.get(k), dict) else v for k, v in right.items()}}


def _parameter_names(model: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state keyed by parameter name, not by position, so that another order of parameters or world size can load it."""
    names = _parameter_names(model)
    groups = [{**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups]
    return {"state": {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}, "groups": groups}


def load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put what `optimizer_state` gave into `optimizer`, each tensor with the type it had. Raises CheckpointError if the parameters differ.

    (torch's own load_state_dict casts moments to the parameter's type, which would round the fp32 moments of bf16 weights.) A group takes
    its settings (lr, betas ...) from the saved group of its first parameter; parameters may be grouped otherwise than before.
    """
    names = _parameter_names(model)
    settings = {name: group for group in saved["groups"] for name in group["params"]}
    for group in optimizer.param_groups:
        if missing := [names[parameter] for parameter in group["params"] if names[parameter] not in settings]:
            raise CheckpointError(f"the saved optimizer state has no parameter {missing[0]}", hint="was it saved by another model?")
        if group["params"]:
            group.update({key: value for key, value in settings[names[group["params"][0]]].items() if key != "params"})
        for parameter in group["params"]:
            values = saved["state"].get(names[parameter])
            if values is not None:
                on_device = group.get("capturable") or group.get("fused")
                optimizer.state[parameter] = {key: _placed(key, value, parameter, on_device) for key, value in values.items()}


def _placed(key: str, value: Any, parameter: torch.nn.Parameter, step_on_device: bool | None) -> Any:
    """A copy of a state tensor where torch's optimizers expect it: with its parameter, but `step` on the CPU unless fused or capturable."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cpu" if key == "step" and not step_on_device else parameter.device, copy=True)


# ---- random number generators -------------------------------------------------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's (CPU and every CUDA device's) generators, as JSON integers."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]},
        "torch": _integers(torch.get_rng_state()),
    }
    state["numpy"] |= {"has_gauss": numpy_state["has_gauss"], "gauss": numpy_state["gauss"]}
    if torch.cuda.is_available():
        state["cuda"] = [_integers(device) for device in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators into the states that `rng_state` gave; CUDA devices beyond those saved keep theirs. Raises CheckpointError."""
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        saved = state["numpy"]
        np.random.set_state(("MT19937", np.array(saved["key"], dtype=np.uint32), saved["pos"], saved["has_gauss"], saved["gauss"]))
        torch.set_rng_state(_bytes(state["torch"]))
        if torch.cuda.is_available():
            for device, values in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
                torch.cuda.set_rng_state(_bytes(values), device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as exc:
        raise CheckpointError(f"the saved state of the random number generators is malformed ({exc})") from exc


def _integers(state: torch.Tensor) -> list[int]:
    return state.view(torch.int64).tolist()


def _bytes(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).view(torch.uint8)
