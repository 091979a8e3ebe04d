"""Tokenized text on disk: each source is tokenized once and then mapped into memory.

A folder `tokens/KEY/`, KEY from the files' contents, the tokenizer and the format, holds
    tokens.bin   every document's ids in order (uint16 when the vocabulary allows, else uint32)
    ends.bin     int64: where each document ends in tokens.bin
    hashes.bin   uint64: a hash of each document's text (decides train or valid, whatever the tokenizer)
    mask.bin     one bit a token: the loss may count it (missing when it may count all)
    meta.json    counts, dtype, what was skipped
It is written whole or not at all, with sizes and SHA-256 checked at every opening (storage.py); a damaged one is made
again with a warning. A second process that wants the same source waits for the first. Contents are hashed once a
file: size, time and inode tell whether it changed since. Left out: removal of old entries (delete the folder; all of
it can be made again)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moai_core.data.read import Problems, find_files, left_out, read_documents, suffix
from moai_core.data.records import BAD_LINE, Document
from moai_core.data.tokenize import Encoded, Encoder, fingerprint
from moai_core.errors import CheckpointError, DataError, StorageError, storage_error
from moai_core.paths import cache_dir
from moai_core.storage import new_folder, sha256, verify, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1
OnEvent = Callable[[dict[str, Any]], None]
_BATCH_CHARACTERS = 4 << 20
_BATCH_DOCUMENTS = 20_000
_CHUNK = 8 << 20


class Tokens:
    """One tokenized source, mapped into memory. Copies sent to worker processes carry the path only.

    Attributes: `documents`, `tokens` (counts), `bytes` (UTF-8 bytes of text), `skipped`, `empty`, `examples`, `key`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_bytes())
        self.documents: int = meta["documents"]
        self.tokens: int = meta["tokens"]
        self.bytes: int = meta["bytes"]
        self.skipped: int = meta["skipped"]
        self.empty: int = meta["empty"]
        self.examples: list[str] = meta["examples"]
        self.key: str = meta["key"]
        self._dtype = meta["dtype"]
        self._map()

    def _map(self) -> None:
        def load(name: str, dtype: str, length: int) -> np.ndarray:
            path = self.folder / name
            return np.memmap(path, dtype=dtype, mode="r", shape=(length,)) if length else np.zeros(0, dtype=dtype)

        self.ids = load("tokens.bin", self._dtype, self.tokens)
        self.ends = load("ends.bin", "int64", self.documents)
        self.hashes = load("hashes.bin", "uint64", self.documents)
        masked = (self.folder / "mask.bin").exists()
        self.mask = load("mask.bin", "uint8", (self.tokens + 7) // 8) if masked else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("ids", "ends", "hashes", "mask")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def read(self, start: int, length: int) -> np.ndarray:
        """(length,) int64 ids from `start` on."""
        return self.ids[start : start + length].astype(np.int64)

    def trainable(self, start: int, length: int) -> np.ndarray:
        """(length,) bool: which of those tokens the loss may count."""
        if self.mask is None:
            return np.ones(length, dtype=bool)
        first = start // 8
        bits = np.unpackbits(self.mask[first : (start + length + 7) // 8], bitorder="little")
        return bits[start - first * 8 : start - first * 8 + length].astype(bool)

    def masked_before(self, positions: np.ndarray) -> np.ndarray:
        """(n,) int64: how many of the tokens before each of `positions` (n,) the loss must not count."""
        counts = np.zeros(len(positions), dtype=np.int64)
        if self.mask is None:
            return counts
        order = np.argsort(positions, kind="stable")
        ordered, total = positions[order], 0
        for first in range(0, self.tokens, _CHUNK):
            bits = np.unpackbits(self.mask[first // 8 : (first + _CHUNK) // 8], bitorder="little")[
                : self.tokens - first
            ]
            running = np.concatenate([[0], np.cumsum(bits == 0, dtype=np.int64)])
            # A position at a chunk's end belongs to this chunk; at its start, to the one before (or to none: zero).
            begin, end = np.searchsorted(ordered, [first, first + len(bits)], side="right")
            counts[order[begin:end]] = total + running[ordered[begin:end] - first]
            total += int(running[-1])
        return counts


def tokenized(
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    format: str = "auto",
    on_error: str = "stop",
    cache: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> Tokens:
    """The tokenized source for `path` (file, folder, glob), from the cache or made now.

    Raises DataError (missing, empty or bad data), StorageError (cache can't be written). Events: progress, note,
    warning."""
    tell = on_event or (lambda event: None)
    files, passed = find_files(path)
    if passed:
        names = ", ".join(file.name for file in passed[:3]) + (", …" if len(passed) > 3 else "")
        message = f"{path}: {len(passed)} file{'s' * (len(passed) != 1)} of other kinds passed over ({names})"
        tell({"event": "note", "message": message})
    root = Path(cache).expanduser() if cache else cache_dir()
    with _told(root):
        contents = _contents(files, root)
        key = hashlib.sha256(json.dumps([VERSION, fingerprint(tokenizer), format, contents]).encode()).hexdigest()[:40]
        folder = root / "tokens" / key
        found = _open(folder, tell)
        if found is None:
            with _alone(folder, tell):
                found = _open(folder, tell)
                if found is None:
                    _build(folder, key, files, tokenizer, format, on_error, path, tell)
                    found = Tokens(folder)
    if found.skipped and on_error != "skip":
        raise DataError(found.examples[0], hint=BAD_LINE)
    if found.skipped:
        tell({"event": "warning", "message": f"{path}: {left_out(found.skipped, found.examples)}"})
    return found


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """What fails in the cache says how to have it elsewhere."""
    try:
        yield
    except StorageError as exc:
        if exc.message.startswith(str(root)):
            exc.hint = "free some space there, or set MOAI_CACHE to a folder you may write to"
        raise


def _open(folder: Path, tell: OnEvent) -> Tokens | None:
    if not folder.exists():
        return None
    try:
        verify(folder)
        return Tokens(folder)
    except (CheckpointError, OSError, ValueError, KeyError) as exc:
        tell({"event": "warning", "message": f"damaged token cache is made again: {exc}"})
        shutil.rmtree(folder, ignore_errors=True)
        return None


@contextmanager
def _alone(folder: Path, tell: OnEvent) -> Iterator[None]:
    """Holds the entry's lock, waiting for whoever makes it now; the system frees it when a process ends, however it
    ends.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell({"event": "note", "message": "another process is tokenizing the same data; waiting for it"})
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as exc:
        raise storage_error(exc, folder) from exc


# ---- what the files hold -------------------------------------------------------------------------------------------


def _contents(files: list[Path], root: Path) -> list[list[str]]:
    """[[kind of file, SHA-256]] in order; hashes are remembered by path, size, time and inode."""
    absolute = [os.path.abspath(file) for file in files]
    memo = root / "files" / (hashlib.sha256("\0".join(absolute).encode()).hexdigest()[:40] + ".json")
    known: dict[str, Any] = {}
    if memo.exists():
        try:
            known = json.loads(memo.read_bytes())
        except (OSError, ValueError):
            known = {}
    made, fresh, now = [], False, time.time_ns()
    for file, name in zip(files, absolute, strict=True):
        try:
            status = os.stat(file)
            stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
            entry = known.get(name) if isinstance(known, dict) else None
            if not (isinstance(entry, list) and entry[:3] == stamp and len(entry) == 4):
                entry = [*stamp, sha256(file)]
                # A file changed within the clock's grain could change again unnoticed.
                if now - status.st_mtime_ns > 2_000_000_000:
                    known[name], fresh = entry, True
        except OSError as exc:
            raise storage_error(exc, file) from exc
        made.append([suffix(file) + file.suffix.lower(), entry[3]])
    if fresh:
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise storage_error(exc, memo) from exc
        write_file(memo, json.dumps(known).encode())
    return made


# ---- making an entry -----------------------------------------------------------------------------------------------


def batches_of(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups large enough to keep all threads busy and small enough for memory."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += sum(len(segment.text) for segment in document.segments) + 100
        if size >= _BATCH_CHARACTERS or len(group) >= _BATCH_DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group


class Hasher:
    """A 64-bit hash of each document's text and roles, over its parts."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, document: Document) -> int | None:
        """The hash once the document's last part is in, else None."""
        for segment in document.segments:
            self._digest.update(f"{segment.role}\0{segment.text}\0".encode() if segment.role else segment.text.encode())
        if not document.last:
            return None
        value = int.from_bytes(self._digest.digest(), "little")
        self._digest = hashlib.blake2b(digest_size=8)
        return value


def text_hash(document: Document) -> int:
    """The hash of one document, or of one part alone."""
    return int(Hasher().add(document._replace(last=True)) or 0)


def _build(
    folder: Path,
    key: str,
    files: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    format: str,
    on_error: str,
    path: str,
    tell: OnEvent,
) -> None:
    encoder, hasher = Encoder(tokenizer), Hasher()
    problems = Problems(on_error)
    total = sum(os.path.getsize(file) for file in files)
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"
    tell({"event": "progress", "task": "tokenize", "source": path, "done": 0, "total": total, "unit": "bytes"})
    with new_folder(folder) as writer, ExitStack() as stack:
        out = {
            name: stack.enter_context(open(writer.path / f"{name}.bin", "wb")) for name in ("tokens", "ends", "hashes")
        }
        mask = Bits(writer.path / "mask.bin")
        stack.callback(mask.close)
        tokens = documents = size = 0
        for group in batches_of(read_documents(files, format=format, problems=problems)):
            ends, hashes = [], []
            for document, encoded in zip(group, encoder.encode(group), strict=True):
                out["tokens"].write(encoded.ids.astype(dtype).tobytes())
                mask.add(encoded)
                tokens += len(encoded.ids)
                size += sum(len(segment.text.encode()) for segment in document.segments)
                if (value := hasher.add(document)) is not None:
                    ends.append(tokens)
                    hashes.append(value)
            documents += len(ends)
            out["ends"].write(np.array(ends, dtype=np.int64).tobytes())
            out["hashes"].write(np.array(hashes, dtype=np.uint64).tobytes())
            tell(
                {
                    "event": "progress",
                    "task": "tokenize",
                    "source": path,
                    "done": min(problems.consumed, total),
                    "total": total,
                    "unit": "bytes",
                }
            )
        if not documents:
            bad = left_out(problems.skipped, problems.examples)
            raise DataError(
                f"{path}: holds no text{f' ({bad})' if bad else ''}", hint="an empty file, or only blank records"
            )
        stack.close()
        if not mask.used:
            (writer.path / "mask.bin").unlink()
        meta = {"version": VERSION, "key": key, "documents": documents, "tokens": tokens, "bytes": size, "dtype": dtype}
        counts = {name: value for name, value in asdict(problems).items() if name in ("skipped", "empty", "examples")}
        writer.write("meta.json", json.dumps(meta | counts, indent=1).encode())
    tell({"event": "progress", "task": "tokenize", "source": path, "done": total, "total": total, "unit": "bytes"})


class Bits:
    """Writes one bit a token, eight to a byte, least significant first."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._rest = np.zeros(0, dtype=bool)
        self.used = False

    def add(self, encoded: Encoded) -> None:
        """The bits of a document: which of its tokens the loss counts."""
        flags = np.ones(len(encoded.ids), dtype=bool) if encoded.trainable is None else encoded.trainable
        self.used = self.used or encoded.trainable is not None
        self._rest = np.concatenate([self._rest, flags])
        if len(self._rest) >= 1 << 16:
            whole = len(self._rest) // 8 * 8
            self._file.write(np.packbits(self._rest[:whole], bitorder="little").tobytes())
            self._rest = self._rest[whole:]

    def close(self) -> None:
        """Writes what is left; the last byte is filled with zeros."""
        if not self._file.closed:
            self._file.write(np.packbits(self._rest, bitorder="little").tobytes())
            self._file.close()
