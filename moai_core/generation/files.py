"""What generation reads and writes besides text: model folders, files of prompts, files of completions.

Prompt files: `.jsonl`/`.json` has an object a line, {"prompt": text} or {"messages": [{"role", "content"}]}, with an
optional "id" and any of the settings of sampling.Settings for that row; any other file is plain text with a prompt a
line. Everything is checked before a model is loaded: a bad line is a DataError `file:line: why`. Completions are
written in the order of the prompts, all at once, atomically.
A chat session is one safetensors file (https://github.com/huggingface/safetensors#format): the state's tensors
(`state.…`), `tokens` (int32) and `session` (uint8, UTF-8 JSON: messages, settings, draws, turns); its metadata: format,
version, model, tokenizer, sha256.
Left out: compressed files, chat formats other than messages (data/read.py reads those for training).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moai_core import storage, tensors
from moai_core.device import place
from moai_core.errors import CheckpointError, DataError, StorageError, UsageError, storage_error
from moai_core.generation.sampling import SETTINGS, Settings, check_settings
from moai_core.generation.text import check_messages, check_text

if TYPE_CHECKING:
    from moai_core.generation.engine import Completion

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Bytes of weights up to which a model becomes fp32 on a CPU.
SMALL = 1 << 29
_KEYS = ("prompt", "messages", "id", *SETTINGS)
# Controls (but newline, tab), and what reorders a line; they stay legible in JSON and can't steer a terminal that
# shows the file.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


SESSION_FORMAT = "moai-session"
SESSION_VERSION = "1"
_JSON_LIMIT = 256 << 20


# ---- models ---------------------------------------------------------------------------------------------------------


def _dtype(folder: Path, device: str | torch.device) -> torch.dtype | None:
    """What `auto` means for a model's folder; None: as stored."""
    if torch.device(device).type != "cpu":
        return None
    try:
        quantized = bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, ValueError, AttributeError):
        return None  # whoever loads it says what is wrong
    return torch.float32 if quantized or 0 < size <= SMALL else None


def open_model(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    scan: str = "auto",
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Any, Any, Path]:
    """Model, tokenizer and the folder they came from: `path` itself or the latest checkpoint of the run folder `path`.

    tokenizer: a folder or name, if not the model's own. device: auto (CUDA if there is one), cpu, cuda, cuda:N.
    dtype: one of DTYPES; auto keeps what is stored, but on a CPU a small model and what isn't quantized of a quantized
    one become fp32, with which processors are faster. Raises UsageError for a device or dtype that can't be,
    CheckpointError for the rest.
    """
    from moai_core import checkpoint
    from moai_core.data.tokenize import check_tokenizer, load_tokenizer

    if dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)} (got {dtype!r})")
    where = place(device)
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        folder = checkpoint.latest(folder, on_event=on_event or (lambda event: None)) or folder
    model = checkpoint.load_model(
        folder, dtype=_dtype(folder, where) if dtype == "auto" else getattr(torch, dtype), device=where, scan=scan
    )
    if tokenizer is None and not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder}: has no tokenizer.json", hint="name its tokenizer with --tokenizer")
    made = load_tokenizer(folder if tokenizer is None else tokenizer)
    check_tokenizer(made, model.config.vocab_size)
    own = tokenizer is not None and (folder / "tokenizer.json").exists()
    if own and on_event and not load_tokenizer(folder).get_vocab().items() <= made.get_vocab().items():
        text = f"the tokenizer {tokenizer} gives ids other meanings than the one in {folder}; the text may be nonsense"
        on_event({"event": "warning", "message": text})
    return model, made, folder


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One row of a prompt file: text or messages, its settings, and its "id" (None if it has none)."""

    prompt: str | list[dict[str, str]]
    settings: Settings
    id: Any = None


def read_prompts(path: str | Path, settings: Settings, *, raw: bytes | None = None) -> list[Request]:
    """The rows of a prompt file in order; `settings` holds where a row says nothing.

    raw: the content, if it comes from a pipe (path then only names it in messages, and an opening brace means jsonl).
    Raises DataError naming `file:line` for the first bad row, StorageError for a file that can't be read.
    """
    if raw is None:
        try:
            raw = Path(path).read_bytes()
        except OSError as exc:
            raise storage_error(exc, path) from exc
        as_json = Path(path).suffix in (".jsonl", ".json")
    else:
        as_json = raw.lstrip().startswith(b"{")
    # A newline at the end ends the last line and begins no other.
    lines = raw.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n") if raw.strip() else []
    if not lines:
        raise DataError(f"{path}: no prompts in it", hint="a prompt a line, or .jsonl with an object a line")
    return [_row(f"{path}:{number}", line, settings, as_json) for number, line in enumerate(lines, 1)]


def _row(where: str, line: bytes, settings: Settings, as_json: bool) -> Request:
    try:
        text = line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as exc:
        raise DataError(f"{where}: not valid UTF-8 (byte {exc.start + 1} of the line)") from exc
    if not text.strip():
        raise DataError(f"{where}: empty line", hint='a prompt a line; .jsonl can hold an empty one, {"prompt": ""}')
    if not as_json:
        return Request(text, settings)
    try:
        row = storage.parse_json(text.encode(), where)
    except CheckpointError as exc:
        raise DataError(exc.message, hint='an object a line, such as {"prompt": "Once upon a time"}') from exc
    if not isinstance(row, dict):
        raise DataError(f'{where}: must be an object such as {{"prompt": "..."}} (got {type(row).__name__})')
    for key in row:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a row may have: {', '.join(_KEYS)}"
            raise DataError(f"{where}: unknown key {key[:60]!r}", hint=hint)
    if ("prompt" in row) == ("messages" in row):
        raise DataError(f'{where}: must have either "prompt" or "messages"')
    if not isinstance(row.get("id", ""), (str, int)):
        raise DataError(f"{where}: id must be a text or a whole number")
    try:
        own = {key: value for key, value in row.items() if key in SETTINGS}
        check_settings(own, lambda key: f"{where}: {key}")
        if "messages" in row:
            check_messages(row["messages"], f"{where}: messages")
        elif not isinstance(row["prompt"], str):
            raise DataError(f"{where}: prompt must be a text (got {type(row['prompt']).__name__})")
        else:
            check_text(row["prompt"], f"{where}: prompt")
    except DataError:
        raise
    except UsageError as exc:
        raise DataError(exc.message, hint=exc.hint) from exc
    return Request(row["prompt"] if "prompt" in row else row["messages"], replace(settings, **own), row.get("id"))


# ---- completions ----------------------------------------------------------------------------------------------------


def record(request: Request, answer: Completion) -> dict[str, Any]:
    """A completion as JSON: id (if given), prompt or messages, text, finish_reason, counts, seed, seconds, logprobs
    (if asked for)."""
    about: dict[str, Any] = {} if request.id is None else {"id": request.id}
    about["prompt" if isinstance(request.prompt, str) else "messages"] = request.prompt
    about |= {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "seed": answer.seed,
        "prefill_seconds": round(answer.prefill_seconds, 4),
        "decode_seconds": round(answer.decode_seconds, 4),
    }
    return about if answer.logprobs is None else {**about, "logprobs": answer.logprobs}


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON with readable Korean, Japanese and Chinese, and control characters escaped, so that a terminal may show
    it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    r"""A completion as a line of a text file: line breaks as `\n`, other control characters left out."""
    return _UNSAFE.sub("", text.replace("\r\n", "\n").replace("\n", "\\n"))


def write_completions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records atomically: `.jsonl` an object a line, `.json` one array, any other suffix the texts alone, one
    a line.

    Raises StorageError."""
    if path.suffix == ".json":
        text = dumps(list(records), indent=2) + "\n"
    elif path.suffix == ".jsonl":
        text = "".join(dumps(one) + "\n" for one in records)
    else:
        text = "".join(one_line(one["text"]) + "\n" for one in records)
    storage.write_file(path, text.encode())


def check_output(path: Path, flag: str, *, force: bool) -> None:
    """Raise UsageError if a result can't be written to `path`, which the user gave with `flag`, or would replace
    something (unless force), StorageError if its folder refuses files: all before any work is done."""
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder")
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} {path}: is not a regular file", hint="give the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: the folder {path.parent} doesn't exist")
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{flag} {path}: no permission to write to {path.parent}", hint="choose another folder")
    if path.exists() and not force:
        raise UsageError(f"{flag} {path}: exists already", hint="choose another name, or --force to replace it")


# ---- chat sessions --------------------------------------------------------------------------------------------------


def write_session(path: str | Path, held: dict[str, Tensor], *, model: str, tokenizer: str) -> None:
    """Write a session atomically: `state.…`, `tokens` (int32) and `session` (uint8), made with these fingerprints.

    Raises StorageError."""
    metadata = {"format": SESSION_FORMAT, "version": SESSION_VERSION, "model": model, "tokenizer": tokenizer}
    metadata["sha256"] = _digest(held, metadata)
    storage.write_file(path, tensors.encode(held, metadata))


def model_fingerprint(model: Any) -> str:
    """SHA-256 over names, types, shapes and values of a model's weights; takes seconds for billions of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> Any:
    """A tensor's bytes, as a buffer."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest(held: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over a session file's metadata and tensors: safetensors itself notices hardly any damage."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(held):
        tensor = held[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def read_session(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a session file that is whole. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    found = tensors.inspect(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{path}: can't be read ({exc})") from exc
    if metadata.get("format") != SESSION_FORMAT or not {"session", "tokens"} <= set(found):
        raise CheckpointError(f"{path}: not a moai chat session", hint="sessions are written by /save in `moai chat`")
    if metadata.get("version") != SESSION_VERSION:
        raise CheckpointError(
            f"{path}: session format {metadata.get('version')!r}, this moai reads {SESSION_VERSION!r}"
        )
    if set(metadata) != {"format", "version", "model", "tokenizer", "sha256"}:
        raise CheckpointError(f"{path}: damaged (metadata are missing)")
    if (
        found["session"].dtype != torch.uint8
        or found["session"].nbytes > _JSON_LIMIT
        or found["tokens"].dtype != torch.int32
    ):
        raise CheckpointError(f"{path}: not a valid session (transcript or tokens of the wrong kind)")
    held = tensors.read(path)
    if _digest(held, metadata) != metadata["sha256"]:
        raise CheckpointError(
            f"{path}: damaged (its SHA-256 doesn't match)", hint="restore it from a copy, or start a new session"
        )
    return metadata, held
