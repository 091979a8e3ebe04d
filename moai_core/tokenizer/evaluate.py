"""Tokenizers side by side: how many bytes of each text one token of theirs stands for.

Every tokenizer reads the same text (its normalizer included, what it puts before and after a text not), with special
tokens in the text taken as plain characters. Bytes per token compare fairly across scripts only within one column: a
Hangul syllable has three bytes, a Latin letter one. `exact` says whether the text comes back byte for byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moai_core.data.hub import reason, unreachable
from moai_core.data.regexes import check_patterns
from moai_core.errors import CheckpointError, StorageError, UsageError, at_least
from moai_core.paths import TOKENIZERS
from moai_core.storage import parse_json, read_limited, tokenizer_folder
from moai_core.tokenizer.layout import load_backend
from moai_core.tokenizer.text import OnEvent, Source, Texts

_LIMIT = 128 << 20
_BATCH = 64


def open_tokenizer(name: str) -> tuple[Any, dict[str, Any]]:
    """`(backend, its tokenizer.json)` of a folder (a model's or a run's too), a tokenizer.json, one of moai's by name,
    or one of the hub.

    The backend takes no text for a special token. Raises UsageError when there is none, CheckpointError.
    """
    path = find_tokenizer(name)
    raw = read_limited(path, _LIMIT)
    state = parse_json(raw, str(path))
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{path}: not a tokenizer.json (it has no model)")
    check_patterns(state, path)
    backend = load_backend(raw, path)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend, state


def find_tokenizer(name: str) -> Path:
    """The tokenizer.json of what `open_tokenizer` takes. Raises UsageError, StorageError where the hub is silent."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (folder := tokenizer_folder(name)) is not None:
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
        raise UsageError(f"{name}: no tokenizer.json in it", hint="transformers' save_pretrained writes one")
    own = ", ".join(sorted(p.name for p in TOKENIZERS.glob("*") if (p / "tokenizer.json").exists()))
    hint = f"give a folder, a tokenizer.json, a name of the hub (owner/name), or one of moai's: {own}"
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise UsageError(f"tokenizer {name!r}: no such folder or name", hint=hint)
    return _fetch(name, hint)


def _fetch(name: str, hint: str) -> Path:
    from huggingface_hub import hf_hub_download

    silent = unreachable(name, "model")
    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=silent is not None))
    except Exception as exc:  # no such repository, no such file, gated: the library has a class for each
        if silent is not None:
            raise StorageError(
                f"tokenizer {name!r}: no such folder, and the hub can't be reached ({reason(silent)})", hint=hint
            ) from exc
        why = (str(exc).splitlines() or [type(exc).__name__])[0][:120]
        raise UsageError(f"tokenizer {name!r}: no such folder, and the hub gives none ({why})", hint=hint) from exc


def evaluate(
    tokenizers: Sequence[str],
    data: Sequence[str],
    *,
    limit: int | None = None,
    on_error: str = "stop",
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Bytes, tokens and bytes per token of each file of `data` under each tokenizer.

    A file's label is its name up to the first dot, or LABEL in LABEL=PATH; files with one label count together, so that
    a language may have several. `limit` takes the first so many bytes of a label. Raises UsageError, DataError.
    """
    if not tokenizers:
        raise UsageError("no tokenizer named", hint="folders, tokenizer.json files or names: --tokenizer moai")
    at_least(("--limit", limit, 1), hint="leave it out to read all")
    labels: dict[str, list[str]] = {}
    for text in data:
        label, path = _label(text)
        labels.setdefault(label, []).append(path)
    opened = {name: open_tokenizer(name) for name in dict.fromkeys(tokenizers)}
    made: list[dict[str, Any]] = [
        {"tokenizer": name, "vocab_size": backend.get_vocab_size(), "texts": {}, "exact": True, "seconds": 0.0}
        for name, (backend, _) in opened.items()
    ]
    for label, paths in labels.items():
        texts = Texts([Source(path) for path in paths], on_error=on_error, whole=True, on_event=on_event)
        counted = {"bytes": 0, "characters": 0}
        tokens = dict.fromkeys(opened, 0)
        for batch in _batches(texts.read("encoding"), limit):
            counted["bytes"] += sum(len(text.encode()) for text in batch)
            counted["characters"] += sum(map(len, batch))
            for row in made:
                tokens[row["tokenizer"]] += _encode(opened[row["tokenizer"]][0], batch, row)
        if not counted["bytes"]:
            raise UsageError(f"{', '.join(paths)}: no text in it", hint="an empty file, or only blank records")
        for row in made:
            count = tokens[row["tokenizer"]]
            row["texts"][label] = {**counted, "tokens": count, "bytes_per_token": counted["bytes"] / max(1, count)}
    for row in made:
        ratios = [text["bytes_per_token"] for text in row["texts"].values()]
        row["mean"] = len(ratios) / sum(1 / ratio for ratio in ratios)
        size = sum(text["bytes"] for text in row["texts"].values())
        row["megabytes_per_second"] = size / 1e6 / max(row.pop("seconds"), 1e-9)
    return {"tokenizers": made, "labels": list(labels)}


def _encode(backend: Any, batch: list[str], row: dict[str, Any]) -> int:
    begin = time.perf_counter()
    encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
    row["seconds"] += time.perf_counter() - begin
    ids = [encoding.ids for encoding in encodings]
    row["exact"] = row["exact"] and backend.decode_batch(ids, skip_special_tokens=False) == batch
    return sum(map(len, ids))


def _label(text: str) -> tuple[str, str]:
    label, found, path = text.partition("=")
    if found and not os.path.exists(text) and label and "/" not in label:
        return label, path
    return Path(text).name.split(".")[0] or text, text


def _batches(texts: Iterator[str], limit: int | None) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if len(batch) == _BATCH or (limit and size >= limit):
            yield batch
            batch = []
        if limit and size >= limit:
            return
    if batch:
        yield batch
