"""In and out of the formats that Mamba users have, each conversion compared at its end with other people's runtimes.

One module a format; all of them meet in moai's names (source.py). A new one is a module with the functions named there
and its place in MODULES. Quantized models are decoded on the way (packed.py), unless the target holds them as they are:
moai without an outtype, interchange.py's layouts. Left out: optimizer states.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from moai_core import storage
from moai_core.convert import folder as hf
from moai_core.convert import hub, legacy, packed, parity
from moai_core.convert.card import card
from moai_core.convert.source import Lazy, OnEvent, Options, Source
from moai_core.errors import CheckpointError, UsageError, storage_error
from moai_core.weights import KEEP_FP32

# interchange before the formats whose quantized models it reads
MODULES = ("moai", "interchange", "mamba", "jamba", "mamba_ssm", "gguf", "legacy")
QUANTIZED = ("gptq", "awq", "compressed-tensors")
TARGETS = ("moai", "transformers-mamba", "falcon-mamba", "jamba", "mamba-ssm", "gguf", "qwen3", *QUANTIZED)
OUTTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": None, "q4_0": None}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def _modules() -> list[Any]:
    return [import_module(f"moai_core.convert.{name}") for name in MODULES]


def detect(path: Path) -> str:
    """The format of a folder or file: one of TARGETS, or `moai-transformer`. Raises CheckpointError."""
    return _detect(path)[1]


def _detect(path: Path) -> tuple[Any, str]:
    for module in _modules():
        if format := module.detect(path):
            return module, format
    if not path.exists():
        raise CheckpointError(f"{path}: doesn't exist", hint="give a folder, a .gguf file or a name of the hub")
    if path.is_file():
        raise CheckpointError(f"{path}: not a GGUF file", hint="of other formats give the folder with its config.json")
    kind = hf.read_config(path).values.get("model_type")
    raise CheckpointError(
        f"{path / 'config.json'}: model_type is {str(kind)[:60]!r}, which is none that can be converted",
        hint="known: mamba_moai, mamba, falcon_mamba, jamba, moai (MOAI-LLM's transformer), mamba_ssm's own, GGUF",
    )


def read(path: Path) -> Source:
    """The model at `path` in moai's names, nothing but headers read. Raises CheckpointError."""
    return _detect(path)[0].read(path)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    outtype: str | None = None,
    trim_vocab: bool = False,
    check: bool = True,
    force: bool = False,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Writes the model `src` (folder, .gguf file, or name of the hub) as `to` (one of TARGETS) into `dst`, which
    appears complete and compared, or not at all.

    outtype None keeps the stored dtypes; f32, f16 and bf16 cast (A_log, D and the dt bias stay as they are); q8_0 and
    q4_0 are GGUF's. trim_vocab drops the rows that pad the vocabulary. force replaces an earlier result. Events: fetch
    (name), tensor (name, done, total, bytes), check, compared. Returns the report: source, target, parameters, tensors,
    bytes, dtype, vocab_size, notes, parity (the numbers of source.Parity, or why it was skipped), seconds.

    Raises UsageError (flags, a target that exists), CheckpointError (the source is damaged or doesn't fit the format,
    the check failed), StorageError.
    """
    begun = time.perf_counter()
    options = _options(to, outtype)
    target = _target(Path(dst), to, force)
    path = _find(os.fspath(src), on_event)
    if target == path.resolve() or target in path.resolve().parents:
        raise UsageError(f"{dst}: would replace the source", hint="choose another target")
    module, format = _detect(path)
    writer = next(module for module in _modules() if to in module.FORMATS)
    source = module.read(path)
    if (format == legacy.SOURCE) != (to == "qwen3"):
        legacy.refuse(format)
    if trim_vocab:
        _trim(source)
    _decode(source, options)
    options = options if to == "gguf" else Options(to, _cast(source, options))
    if not any(name in source.files for name in hf.TOKENIZER):
        source.notes.append("no tokenizer was found beside the model: copy its files into the result")
    report = _report(source, {"name": _name(src, path), "format": format}, {"path": str(dst), "format": to}, outtype)
    storage.sweep(target)
    new = _new_file if getattr(writer, "FILE", False) else storage.new_folder
    with new(target, replace=force) as place:
        writer.write(source, place, options, on_event)
        written = place if isinstance(place, Path) else place.path
        if check:
            report["parity"] = _compare(source, (module, format), (writer, to), written, Path(dst), options, on_event)
        report["bytes"] = sum(file.stat().st_size for file in ([written] if written.is_file() else written.iterdir()))
        if isinstance(place, storage.FolderWriter):
            place.write(hf.CARD, card(source.files.get(hf.CARD), report))
    return {**report, "seconds": round(time.perf_counter() - begun, 2)}


def _report(source: Source, before: dict[str, str], after: dict[str, str], outtype: str | None) -> dict[str, Any]:
    return {
        "source": {**before, "path": str(source.path)},
        "target": after,
        "parameters": sum(torch.Size(lazy.shape).numel() for lazy in source.tensors.values()),
        "tensors": len(source.tensors),
        "dtype": outtype or hf.dtype(source.tensors),
        "vocab_size": source.config["vocab_size"],
        "notes": source.notes,
        "parity": {"skipped": "--no-check"},
    }


def _compare(
    source: Source,
    before: tuple[Any, str],
    after: tuple[Any, str],
    written: Path,
    dst: Path,
    options: Options,
    on_event: OnEvent | None,
) -> dict[str, Any]:
    """The comparison's report. before and after: module and format. Raises CheckpointError where it fails."""
    (module, format), (writer, to) = before, after
    ends = [lambda: module.open_runtime(source.path, format), lambda: writer.open_runtime(written, to)]
    # moai's runtime comes first where it takes part, as it makes the greedy tokens a step at a time; one with a judge
    # of its own comes second.
    if to == "moai" or (hasattr(module, "judge") and module is not writer):
        ends.reverse()
    judge = getattr(writer, "judge", getattr(module, "judge", parity.judge))
    return parity.check(source, dst, ends, judge, options, on_event=on_event)


# ---- arguments -----------------------------------------------------------------------------------


def _options(to: str, outtype: str | None) -> Options:
    if to not in TARGETS:
        raise UsageError(f"--to can't be {to!r}", hint=f"formats: {', '.join(TARGETS)}")
    if outtype is not None and outtype not in OUTTYPES:
        raise UsageError(f"--outtype can't be {outtype!r}", hint=f"types: {', '.join(OUTTYPES)}")
    if to != "gguf" and outtype is not None and OUTTYPES[outtype] is None:
        raise UsageError(f"--outtype {outtype} is for --to gguf", hint="f32, f16 and bf16 are for every format")
    if to in QUANTIZED and outtype is not None:
        raise UsageError(f"--outtype {outtype}: --to {to} keeps the numbers of a quantized model as they are")
    return Options(to, outtype)


def _target(dst: Path, to: str, force: bool) -> Path:
    """The absolute target, which doesn't exist, or which an earlier conversion made and `force` replaces."""
    target = Path(os.path.realpath(dst))
    if to == "gguf":
        replaceable = target.is_file() and import_module("moai_core.convert.gguf").detect(target) is not None
    else:
        replaceable = (target / storage.MANIFEST).is_file()
        if target.is_dir() and not any(target.iterdir()):
            return target
    if os.path.lexists(target):
        if not replaceable:
            raise UsageError(
                f"{dst}: already exists and is nothing that moai wrote, so it isn't replaced",
                hint="choose another name",
            )
        if not force:
            raise UsageError(f"{dst}: already exists", hint="choose another name, or replace it with --force")
    return target


def _find(src: str, on_event: OnEvent | None) -> Path:
    if not src:
        raise UsageError("the source's name is empty", hint="give a folder, a .gguf file or a name of the hub")
    src = src.removeprefix("hf://")
    path = Path(src).expanduser()
    if path.is_file() and (path.parent / "config.json").is_file() and path.suffix in (".safetensors", ".bin", ".json"):
        return path.parent
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UsageError(f"{src}: holds {len(files)} GGUF files", hint=f"name one: {files[0]}")
        return files[0] if files else path
    return hub.fetch(src, on_event) if not path.exists() and hub.is_name(src) else path


def _name(src: str | os.PathLike[str], path: Path) -> str:
    """How the source is called in a card: a name of the hub, or the last part of its path."""
    return path.resolve().name if Path(src).expanduser().exists() else os.fspath(src)


# ---- changes that no format needs to know --------------------------------------------------------


def _decode(source: Source, options: Options) -> None:
    """Makes plain numbers of quantized matrices (in fp32, where no type is asked for), unless the target holds them."""
    if options.format in QUANTIZED:
        return
    keep = options.format == "moai" and options.outtype is None
    if note := packed.note(source.tensors, kept=keep):
        source.notes.append(note)
    if not keep:
        packed.forget(source.tensors)
    if options.outtype is None:
        packed.uniform(source.tensors)


def _cast(source: Source, options: Options) -> str | None:
    """Casts the weights to the outtype; returns it where that rounds any."""
    dtype = OUTTYPES[options.outtype] if options.outtype else None
    rounded = None
    for name, lazy in source.tensors.items():
        if dtype is not None and lazy.dtype != dtype and name.rsplit(".", 1)[-1] not in KEEP_FP32:
            source.tensors[name] = lazy.cast(dtype)
            if dtype != torch.float32:
                rounded = options.outtype
    return rounded


def _trim(source: Source) -> None:
    """Drops the rows of embedding and head beyond the vocabulary in use. Raises UsageError where that isn't known."""
    rows = source.config["vocab_size"]
    used = source.used_vocab or hf.tokenizer_size(source.files)
    if used is None:
        raise UsageError(
            f"{source.path}: --trim-vocab can't tell which of the {rows} entries are in use",
            hint="put the model's tokenizer.json beside its config.json",
        )
    if used > rows:
        raise CheckpointError(f"{source.path}: its tokenizer has {used} entries, its embedding {rows}")
    ids = [source.config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    special = [i for found in ids for i in (found if isinstance(found, list) else [found]) if i is not None]
    if special and max(special) >= used:
        raise UsageError(f"{source.path}: --trim-vocab would drop token {max(special)}, which config.json names")
    if used == rows:
        source.notes.append(f"the vocabulary of {rows} has no padding")
        return
    for name in _VOCABULARY:
        if name in source.tensors:
            source.tensors[name] = _first_rows(source.tensors[name], used)
    source.config = {**source.config, "vocab_size": used}
    source.used_vocab = used
    source.notes.append(f"the vocabulary was trimmed from {rows} to the {used} entries in use")


def _first_rows(lazy: Lazy, rows: int) -> Lazy:
    return lazy.map(lambda tensor: tensor[:rows], (rows, *lazy.shape[1:]))


@contextmanager
def _new_file(final: Path, *, replace: bool) -> Iterator[Path]:
    """A name to write a file under, which then appears as `final`, flushed, or not at all: see storage.new_folder."""
    tmp = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        tmp.unlink(missing_ok=True)
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        if not replace:
            storage.check_free(final)
        os.replace(tmp, final)
    except BaseException as exc:
        with suppress(OSError):
            shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise storage_error(exc, final) from exc
        raise
