"""Rows from a source that is read while training: a window of documents at a time is tokenized, packed and used up.

A window is 1024 documents or 4 million characters, whichever comes first; its rows are permuted by (seed, epoch,
window). The position is what the reader needs to stand at the window's start (the state of a
`datasets.IterableDataset`, or file and document for local files), the rows used of the window, and the counts so far.
Restoring local files reads over the documents before it in that one file. A text longer than a part (formats.py) is a
document a part here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from moai_core.data.cache import text_hash
from moai_core.data.hub import hub_error, open_hub
from moai_core.data.pack import below, pack, split_documents
from moai_core.data.read import Problems, check_format, documents_of, find_files, read_documents
from moai_core.data.records import Document
from moai_core.data.tokenize import Encoder
from moai_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENTS = 1024
CHARACTERS = 4 << 20
_COUNTS = ("documents", "pieces", "rows", "tokens", "trained", "first", "masked", "padding", "skipped", "empty")
Row = list[tuple[np.ndarray, np.ndarray]]


class StreamRows:
    """The rows of a stream: `next()` gives one after the other, without end; `state()` and `restore()` as small
    JSON.
    """

    def __init__(
        self, path: str, tokenizer: PreTrainedTokenizerFast, max_length: int, *, all_turns: bool, seed: int,
        shuffle: bool, part: str | None, fraction: float, format: str, on_error: str,
    ) -> None:  # fmt: skip
        self.path, self.tokenizer, self.max_length, self.all_turns = path, tokenizer, max_length, all_turns
        self.seed, self.shuffle, self.part, self.fraction = seed, shuffle, part, fraction
        self.format, self.on_error = check_format(format), on_error
        self._reader = _hub if path.startswith("hf://") else _local
        if not path.startswith("hf://"):
            find_files(path)  # a wrong path is told now, not in a worker
        self.restore(None)

    def key(self) -> str:
        """What the position depends on beside the path."""
        return f"{self.format} {self.on_error} {DOCUMENTS} {CHARACTERS}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_windows": None, "_encoder": None, "_rows": []}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Stand where `state` says, or at the beginning. Nothing is read before the first `next`."""
        start = {
            "epoch": 0,
            "window": 0,
            "row": 0,
            "position": None,
            "counted": False,
            "account": dict.fromkeys(_COUNTS, 0),
        }
        self._at: dict[str, Any] = start if state is None else {**state, "account": dict(state["account"])}
        self._windows: Iterator[tuple[list[Document], Any]] | None = None
        self._encoder: Encoder | None = None
        self._rows: list[Row] = []
        self._after: Any = None
        self._loaded = self._any = self._whole = False
        self._problems = Problems(self.on_error)

    def state(self) -> dict[str, Any]:
        """The position after the last `next`; small, JSON."""
        return {**self._at, "account": dict(self._at["account"])}

    def next(self) -> Row:
        """The next row as its pieces (ids int64, trainable bool). Raises DataError for bad data or a stream without
        text.
        """
        while self._at["row"] >= len(self._rows):
            if self._loaded:
                self._at |= {"position": self._after, "window": self._at["window"] + 1, "row": 0, "counted": False}
            self._load()
        self._at["row"] += 1
        return self._rows[self._at["row"] - 1]

    def _load(self) -> None:
        if self._windows is None:
            self._whole = self._at["position"] is None
            self._windows = self._reader(self.path, self.format, self._at["position"], self._problems)
        got = next(self._windows, None)
        if got is None:
            if self._whole and not self._any:
                raise DataError(
                    f"{self.path}: holds no text{f' for {self.part}' if self.part else ''}",
                    hint="an empty source, or only blank or bad records",
                )
            self._at |= {"epoch": self._at["epoch"] + 1, "window": 0, "row": 0, "position": None, "counted": False}
            self._windows, self._rows, self._loaded, self._any = None, [], False, False
            return
        documents, self._after = got
        self._rows, counts = self._pack(documents)
        self._loaded, self._any = True, self._any or bool(self._rows)
        if not self._at["counted"]:
            counts |= {"skipped": self._problems.skipped, "empty": self._problems.empty}
            self._at["account"] = {name: value + counts[name] for name, value in self._at["account"].items()}
            self._at["counted"] = True
        self._problems.skipped = self._problems.empty = 0

    def _pack(self, documents: list[Document]) -> tuple[list[Row], dict[str, int]]:
        if self._encoder is None:
            self._encoder = Encoder(self.tokenizer)
        encoded = self._encoder.encode(documents)
        ids = np.concatenate([one.ids for one in encoded]).astype(np.int64)
        flags = [
            np.ones(len(one.ids), dtype=bool) if self.all_turns or one.trainable is None else one.trainable
            for one in encoded
        ]
        trainable = np.concatenate(flags)
        pieces = split_documents(
            np.cumsum([len(one.ids) for one in encoded]),
            np.array([text_hash(d) for d in documents], dtype=np.uint64),
            self.max_length,
        )
        if self.part is not None:
            held = below(pieces.hashes, self.fraction)
            pieces = pieces.take(held if self.part == "valid" else ~held)
        order, bounds = pack(pieces.lengths, self.max_length)
        rows: list[Row] = []
        masked = 0
        for first, last in pairwise(bounds):
            spans = [
                slice(int(pieces.starts[p]), int(pieces.starts[p]) + int(pieces.lengths[p])) for p in order[first:last]
            ]
            rows.append([(ids[span], trainable[span]) for span in spans])
            masked += sum(int(np.count_nonzero(~trainable[span][1:])) for span in spans)
        if self.shuffle and rows:
            words = np.random.Philox(
                key=[self.seed & (2**64 - 1), self._at["epoch"] << 32 | self._at["window"]]
            ).random_raw(len(rows))
            rows = [rows[i] for i in np.argsort(words, kind="stable")]
        tokens, firsts = int(pieces.lengths.sum(dtype=np.int64)), len(pieces.lengths)
        counts = {"documents": sum(document.last for document in documents), "pieces": firsts, "rows": len(rows)}
        counts |= {"tokens": tokens, "trained": tokens - firsts - masked, "first": firsts, "masked": masked}
        return rows, counts | {"padding": len(rows) * self.max_length - tokens}


def _local(path: str, format: str, position: Any, problems: Problems) -> Iterator[tuple[list[Document], Any]]:
    """Windows of local files, each with the position after it: [file, documents of that file that were read]."""
    files, _ = find_files(path)
    index, done = position or (0, 0)
    group, size = [], 0
    for number in range(index, len(files)):
        for count, document in enumerate(read_documents([files[number]], format=format, problems=problems), 1):
            if number == index and count <= done:
                if count == done:
                    problems.skipped = problems.empty = 0  # counted before
                continue
            group.append(document)
            size += sum(len(segment.text) for segment in document.segments)
            if len(group) >= DOCUMENTS or size >= CHARACTERS:
                yield group, [number, count]
                group, size = [], 0
    if group:
        yield group, [len(files), 0]


def _hub(path: str, format: str, position: Any, problems: Problems) -> Iterator[tuple[list[Document], Any]]:
    """Windows of an `hf://` dataset, each with the position after it: the library's state, the row, and the kind
    its records have.
    """
    dataset = open_hub(path)
    row = 0
    if position is not None:
        dataset.load_state_dict(position["dataset"])
        row, format = position["row"], position["kind"]
    problems.kind = format

    def records() -> Iterator[tuple[str, int, Any]]:
        nonlocal row
        try:
            for record in dataset:
                row += 1
                yield path, row, record
        except DataError:
            raise
        except Exception as exc:  # network, damaged files: the library has no common base for them
            raise hub_error(path, exc) from exc

    group, size = [], 0
    for document in documents_of(records(), format, problems):
        group.append(document)
        size += sum(len(segment.text) for segment in document.segments)
        if len(group) >= DOCUMENTS or size >= CHARACTERS:
            yield group, {"dataset": dataset.state_dict(), "row": row, "kind": problems.kind}
            group, size = [], 0
    if group:
        yield group, {"dataset": dataset.state_dict(), "row": row, "kind": problems.kind}
