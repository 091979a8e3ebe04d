"""Checkpoints of a run: `run/step-N/` with the model, the tokenizer, the optimizer's state and the trainer's.

    config.json, generation_config.json, model*.safetensors   the model in the Hugging Face layout (weights.py)
    tokenizer.json, tokenizer_config.json ...                 the tokenizer, likewise loadable anywhere
    optimizer-0000R-of-0000W.safetensors and .json            one pair a rank, keyed by parameter name
    trainer.json                                              step, tokens, RNG states, loader state, resolved recipe
    manifest.json                                             size and SHA-256 of each file, written last (storage.py)

Why: a run must survive a kill, a full disk or a damaged file at any moment, and resume bit-exactly. No pickle is
written or read. Left out: gathering the pieces of a sharded model or optimizer, which the caller does; each list entry
of `optimizer_state` becomes one rank's file, and all are merged on loading, whatever the world size then is.
"""

from __future__ import annotations

import copy
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

from moai_core import storage, tensors, weights
from moai_core.data.tokenize import compact
from moai_core.errors import CheckpointError, StorageError, UsageError, storage_error
from moai_core.locks import lock
from moai_core.storage import verify

if TYPE_CHECKING:
    from moai_core.model import MoaiMambaForCausalLM

__all__ = [
    "find",
    "fingerprint",
    "latest",
    "load_model",
    "load_optimizer_state",
    "load_training",
    "lock",
    "optimizer_state",
    "purge",
    "rng_state",
    "save",
    "save_model",
    "set_rng_state",
    "verify",
]

FORMAT = 1
_TREE_LIMIT = 32 << 20
_OPTIMIZER = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")

OnEvent = Callable[[dict[str, Any]], None]


# ---- writing -------------------------------------------------------------------------------------


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
    spare: int | None = None,
    max_shard_size: int | str = "5GB",
    on_event: OnEvent | None = None,
) -> Path:
    """Write `run_dir/step-N` as a whole and return it; then delete the oldest complete steps beyond `keep_last`.

    `optimizer_state` is a nested dict of tensors and JSON values (see `optimizer_state()`), or a list of them, one a
    rank. `trainer` and `recipe` must be JSON. A `step-N` that exists is replaced, also as a whole. `keep_last=None`
    keeps all; the step `spare` is never deleted. Nothing is deleted before the new folder was read back and found equal
    to what was meant. Emits `{"event": "checkpoint", "step", "path"}`. Raises StorageError; the earlier steps are then
    untouched.
    """
    run_dir = Path(run_dir)
    final = run_dir / f"step-{step}"
    storage.tidy(run_dir)
    with storage.new_folder(final) as folder:
        weights.write(folder, model, max_shard_size=max_shard_size)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, folder.path)
        if optimizer_state is not None:
            _write_optimizer(folder, [optimizer_state] if isinstance(optimizer_state, Mapping) else optimizer_state)
        folder.write(
            "trainer.json", storage.json_bytes({"format": FORMAT, "step": step, **(trainer or {}), "recipe": recipe})
        )
    purge(run_dir, newest=step, keep_last=keep_last, spare=spare, on_event=on_event)
    _tell(on_event, event="checkpoint", step=step, path=str(final))
    return final


def purge(
    run_dir: str | os.PathLike[str],
    *,
    newest: int,
    keep_last: int | None,
    spare: int | None = None,
    on_event: OnEvent | None = None,
) -> None:
    """Delete the oldest complete steps up to `newest`, which was verified, until `keep_last` remain (None: keep all);
    the step `spare` stays in any case.

    A failure is a warning: the newest step is safe, and an old one that can't be deleted is no reason to stop.
    """
    if keep_last is None:
        return
    try:
        storage.purge(Path(run_dir), newest=newest, keep_last=keep_last, spare=spare)
    except StorageError as exc:
        _tell(on_event, event="warning", message=f"old checkpoints could not be deleted: {exc}")


def save_model(
    folder: str | os.PathLike[str], model: torch.nn.Module, tokenizer: Any = None, *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write the model (and tokenizer) alone into `folder`, as a whole, with a manifest.

    A folder that was written so before is replaced. Raises UsageError if `folder` holds anything else, StorageError.
    """
    if os.path.lexists(folder) and not (Path(folder) / storage.MANIFEST).is_file():
        raise UsageError(
            f"{folder}: exists and is no saved model", hint="choose another folder, nothing is overwritten"
        )
    with storage.new_folder(Path(folder)) as writer:
        weights.write(writer, model, max_shard_size=max_shard_size)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, writer.path)
    return Path(folder)


def _tell(on_event: OnEvent | None, **event: Any) -> None:
    if on_event is not None:
        on_event(event)


def _write_tokenizer(tokenizer: Any, path: Path) -> None:
    """What `save_pretrained` writes, with a small tokenizer.json: its own is indented, each merge a list, two and a
    half times the bytes."""

    def write(save_directory: str, file_names: tuple[str, ...], **_: Any) -> tuple[str, ...]:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        (Path(save_directory) / "tokenizer.json").write_bytes(compact(state))
        return file_names

    saved = copy.copy(tokenizer)  # the caller's stays as it is
    saved._save_pretrained = write  # the step of save_pretrained that writes tokenizer.json
    saved.save_pretrained(path)


def _write_optimizer(folder: storage.FolderWriter, ranks: Sequence[Mapping[str, Any]]) -> None:
    for rank, state in enumerate(ranks, start=1):
        tree, named = tensors.flatten(state)
        name = f"optimizer-{rank:05d}-of-{len(ranks):05d}"
        folder.write(f"{name}.safetensors", tensors.encode(named))
        folder.write(f"{name}.json", storage.json_bytes(tree))


# ---- finding -------------------------------------------------------------------------------------


def latest(run_dir: str | os.PathLike[str], *, on_event: OnEvent | None = None) -> Path | None:
    """The newest `step-N` of a run whose every file verifies, or None; emits a warning for each newer one that doesn't.

    Leftovers of dead processes are removed on the way. Raises StorageError if the folder can't be listed.
    """
    run_dir = Path(run_dir)
    storage.tidy(run_dir)
    told: set[Path] = set()
    while True:
        vanished = False
        for _, path in reversed(storage.steps(run_dir)):
            try:
                verify(path)
                return path
            except CheckpointError as exc:
                if not path.exists():  # a trainer purged it while it was read, so there is a newer one: look again
                    vanished = True
                elif path not in told:
                    told.add(path)
                    _tell(on_event, event="warning", message=f"damaged checkpoint passed over: {exc}")
        if not vanished:
            return None


def find(path: str | os.PathLike[str], on_event: OnEvent | None = None) -> Path:
    """The folder that holds the model: `path` itself, or the latest step of the run folder `path`.

    Raises CheckpointError where there is none, or no complete one.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "doesn't exist"
        hint = weights.EXPECTED
        if re.fullmatch(r"(hf:/+)?[\w.-]+/[\w.-]+", str(path)) and not folder.parent.exists():
            hint += "; a model of the hub is fetched by `moai convert OWNER/NAME DIR --to moai`"
        raise CheckpointError(f"{folder}: {what}", hint=hint)
    if (folder / "config.json").exists() or not storage.steps(folder):
        return folder
    found = latest(folder, on_event=on_event)
    if found is None:
        raise CheckpointError(f"{folder}: none of its checkpoints is complete and undamaged")
    return found


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over names and hashes of the weight files: equal for folders with the same weights and shards.

    The manifest's hashes are taken where there is one, the files are read where not. Raises CheckpointError.
    """
    folder = find(path)
    if (folder / storage.MANIFEST).exists():
        hashes = {name: entry["sha256"] for name, entry in storage.read_manifest(folder).items()}
    else:
        hashes = {name: storage.sha256(folder / name) for name in weights.shards(folder)}
    digest = hashlib.sha256()
    for name in sorted(hashes):
        if name.startswith("model") and name.endswith(".safetensors"):
            digest.update(f"{name} {hashes[name]}\n".encode())
    return digest.hexdigest()


# ---- loading a model -----------------------------------------------------------------------------


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    scan: str = "auto",
    on_event: OnEvent | None = None,
) -> MoaiMambaForCausalLM:
    """The model in a run folder (its latest step), a `step-N` folder or any Hugging Face folder of type mamba_moai.

    `dtype` casts the weights (None: as stored); A_log, D and dt_bias are always fp32. A manifest is verified where
    there is one. The model is in eval mode. Raises CheckpointError naming the file and the reason, UsageError for
    a scan backend that can't run here.
    """
    while True:
        folder = find(path, on_event)
        try:
            if (folder / storage.MANIFEST).exists() or (folder / "trainer.json").exists():
                verify(folder, only=lambda name: not name.startswith("optimizer"))
            model = weights.read(folder, dtype=dtype, device=device)
            break
        except (CheckpointError, StorageError, OSError) as exc:
            # A run that is being trained may have purged the step while it was read: then there is a newer one.
            if folder == Path(path) or folder.exists():
                raise storage_error(exc, folder) if isinstance(exc, OSError) else exc from exc
    model.set_scan_backend(scan)
    return model


# ---- the training state --------------------------------------------------------------------------


def load_training(
    step_dir: str | os.PathLike[str], *, verified: bool = False
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """`(optimizer state, trainer dict)` of a step; the ranks' states are merged, None if there is none.

    The trainer dict has `step`, `recipe` and what `save` was given. The step is verified first, unless it comes from
    `latest` just now (`verified`). Raises CheckpointError.
    """
    folder = Path(step_dir)
    if not verified:
        verify(folder)
    trainer = storage.read_json(folder / "trainer.json")
    if not isinstance(trainer, dict) or trainer.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'trainer.json'}: not of format {FORMAT}", hint="was it saved by a newer moai?"
        )
    merged: dict[str, Any] | None = None
    for name in sorted(name for name in os.listdir(folder) if _OPTIMIZER.fullmatch(name)):
        tree = storage.read_json((folder / name).with_suffix(".json"), limit=_TREE_LIMIT)
        merged = _merge(merged or {}, tensors.unflatten(tree, tensors.read(folder / name)))
    return merged, trainer


def _merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for key, value in right.items():
        both = isinstance(value, dict) and isinstance(left.get(key), dict)
        merged[key] = _merge(left[key], value) if both else value
    return merged


def _parameter_names(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state keyed by parameter name: another order of parameters or world size can load it. With it go
    trained parameters that the model's own files don't hold as they are."""
    names = _parameter_names(model)
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    state: dict[str, Any] = {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}
    held = model.state_dict()
    # What the model's files hold rounded, or not at all (weights behind fake quantization).
    beside = {
        name: parameter.detach()
        for parameter, name in names.items()
        if parameter.requires_grad and (name not in held or held[name].dtype != parameter.dtype)
    }
    return {"state": state, "groups": groups, **({"parameters": beside} if beside else {})}


def load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put what `optimizer_state` gave into `optimizer`, each tensor with the type it had.

    (torch's own load_state_dict casts moments to the parameter's type, which would round the fp32 moments of bf16
    weights.) A group takes its settings (lr, betas ...) from the saved group of its first parameter.
    Raises CheckpointError if the parameters differ.
    """
    names = _parameter_names(model)
    with torch.no_grad():
        for parameter, name in names.items():
            if name in saved.get("parameters", {}):
                parameter.copy_(saved["parameters"][name])
    settings = {name: group for group in saved["groups"] for name in group["params"]}
    for group in optimizer.param_groups:
        if missing := [names[parameter] for parameter in group["params"] if names[parameter] not in settings]:
            raise CheckpointError(
                f"the saved optimizer state has no parameter {missing[0]}", hint="was it saved by another model?"
            )
        if group["params"]:
            group.update({key: value for key, value in settings[names[group["params"][0]]].items() if key != "params"})
        for parameter in group["params"]:
            values = saved["state"].get(names[parameter])
            if values is not None:
                on_device = group.get("capturable") or group.get("fused")
                optimizer.state[parameter] = {
                    key: _placed(key, value, parameter, on_device) for key, value in values.items()
                }


def _placed(key: str, value: Any, parameter: torch.nn.Parameter, step_on_device: bool | None) -> Any:
    """A copy where torch expects it: with its parameter, but `step` on the CPU unless fused or capturable."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cpu" if key == "step" and not step_on_device else parameter.device, copy=True)


# ---- random number generators --------------------------------------------------------------------


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
    """Put the generators into the states that `rng_state` gave; CUDA devices beyond those keep theirs.

    Raises CheckpointError.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        saved = state["numpy"]
        np.random.set_state(
            ("MT19937", np.array(saved["key"], dtype=np.uint32), saved["pos"], saved["has_gauss"], saved["gauss"])
        )
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
