"""What a tokenizer learns from and is measured on: files and folders with weights, as pieces of text.

The readers are those of training data (moai_core/data/read.py). A weight says how often a text counts: 3 thrice, 0.25 a
quarter of it, drawn by a seed. Drawn are pieces of about a thousand characters, cut at line ends, because one text file
is one document however long. Of a chat its roles are read, too, so that the words of the template become tokens.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai_core.data.read import Problems, find_files, left_out, read_documents
from moai_core.errors import UsageError

OnEvent = Callable[[dict[str, Any]], None]
_PIECE = 1000
_HEAVIEST = 1000.0


@dataclass(frozen=True)
class Source:
    """A file, folder or glob, and how often its text counts."""

    path: str
    weight: float = 1.0


def parse_source(text: str) -> Source:
    """`PATH` or `PATH=WEIGHT`. Raises UsageError for a weight that is none."""
    path, found, weight = text.rpartition("=")
    if not found or os.path.exists(text):
        return Source(text)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not 0 < value <= _HEAVIEST:
        raise UsageError(
            f"{text!r}: the weight must be a number above 0, at most {_HEAVIEST:.0f} (got {weight!r})",
            hint="FILE=3 counts its text thrice, FILE=0.25 a quarter of it",
        )
    return Source(path, value)


class Texts:
    """The pieces of text of several sources, in order; may be read several times and gives the same each time. `whole`
    gives documents uncut and without the roles of chats.

    Emits `{"event": "read", "phase", "done", "total"}` (bytes on the disk) and warnings. After a reading `bytes`
    counts its weighted text, `counts` that of each source.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int = 0,
        on_error: str = "stop",
        whole: bool = False,
        on_event: OnEvent | None = None,
    ) -> None:
        if not sources:
            raise UsageError("no text given", hint="name files, folders or globs: txt, md, jsonl, json, parquet")
        if on_error not in ("stop", "skip"):
            raise UsageError(f"--on-error must be stop or skip (got {on_error!r})", hint="skip counts bad lines")
        self.sources, self.seed, self.on_error, self.whole = list(sources), seed, on_error, whole
        self._tell = on_event or (lambda event: None)
        self.files: list[list[Path]] = []
        for source in self.sources:
            files, passed = find_files(source.path)
            self.files.append(files)
            if passed:
                message = f"{source.path}: {len(passed)} files of other kinds passed over, the first: {passed[0]}"
                self._tell({"event": "warning", "message": message})
        self.total = sum(file.stat().st_size for files in self.files for file in files)
        self.bytes = 0
        self.counts: list[int] = []
        self._warned = False

    def read(self, phase: str) -> Iterator[str]:
        """The pieces, each as often as its source's weight says. Raises DataError, StorageError."""
        self.bytes = 0
        self.counts = [0] * len(self.sources)
        done = 0
        for number, (source, files) in enumerate(zip(self.sources, self.files, strict=True)):
            problems = Problems(self.on_error)
            draw = random.Random(f"{self.seed} {number}")
            whole, part, told = int(source.weight), source.weight % 1, -1
            for piece in _pieces(files, problems, self.whole):
                times = whole + (part > 0 and draw.random() < part)
                self.counts[number] += times * len(piece.encode())
                for _ in range(times):
                    yield piece
                if problems.consumed > told:
                    told = problems.consumed
                    self._tell({"event": "read", "phase": phase, "done": done + told, "total": self.total})
            done += problems.consumed
            if problems.skipped and not self._warned:
                self._tell({"event": "warning", "message": left_out(problems.skipped, problems.examples)})
        self._warned = True
        self.bytes = sum(self.counts)

    def report(self) -> dict[str, Any]:
        """`bytes` and `sources` (path, weight, bytes of each) of the last reading."""
        found = zip(self.sources, self.counts, strict=True)
        made = [{"path": source.path, "weight": source.weight, "bytes": count} for source, count in found]
        return {"bytes": self.bytes, "sources": made}


def _pieces(files: list[Path], problems: Problems, whole: bool) -> Iterator[str]:
    for document in read_documents(files, problems=problems):
        for segment in document.segments:
            if whole:
                yield segment.text
                continue
            if segment.role is not None:
                yield f"{segment.role}\n"
            yield from cut(segment.text)


def cut(text: str) -> Iterator[str]:
    """`text` in pieces of about a thousand characters that end with a line and the empty ones after it."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin + _PIECE) + 1 or len(text)
        while text[end : end + 1] == "\n":
            end += 1
        yield text[begin:end]
        begin = end
