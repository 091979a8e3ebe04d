"""Sources in, a folder of training, validation and calibration text out.

1. Read, clean and filter every source, in the recipe's order, into a ledger (text.py, sources.py, ledger.py).
2. Drop the later of equal and of nearly equal units (near.py): the recipe's order is the order of preference.
3. Hold out: the hash of a unit's folded text and the seed decide, so more data moves nothing. Calibration loses what
   is near to validation; training what is near to either, or to `against`: prose loses the lines, a unit of which half
   is near goes as a whole.
4. Write `PART-GROUP-NNN.jsonl.zst` (records like {"source", "lang", "text"}), mix.json, ATTRIBUTION.md, manifest.json.

The same input, recipe and release give the same bytes. Memory: about 100 bytes a unit and the windows of held-out text;
texts and signatures lie on the disk. A folder appears whole or not at all (storage.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from moai_core import storage
from moai_core.data.mix import report
from moai_core.data.mix.ledger import BATCH, SEPARATOR, Ledger, Tally
from moai_core.data.mix.near import BANDS, FEWEST, Windows, duplicates
from moai_core.data.mix.recipe import Mix, MixSource
from moai_core.data.mix.sources import Reader, Unit, size_of
from moai_core.data.mix.text import Judge
from moai_core.data.read import Problems, find_files, left_out, read_documents
from moai_core.errors import DataError, UsageError

OnEvent = Callable[[dict[str, Any]], None]
PARTS = ("valid", "calib", "train")
SHARD = 256 << 20
_WINDOW = 27  # what moai's readers unpack at most


def build(
    mix: Mix,
    out: Path,
    *,
    root: Path,
    force: bool = False,
    level: int = 9,
    shard_bytes: int = SHARD,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Builds `mix` from files below `root` into the folder `out`; what mix.json says of it.

    level: zstd's, 1 to 19. shard_bytes: unpacked bytes of a file.
    Events: progress (read, compare, write), warning. Raises DataError, UsageError, StorageError."""
    tell = on_event or (lambda event: None)
    if out.exists() and not (force and report.is_mix(out)):
        why = "exists" if report.is_mix(out) else "exists and is no mix"
        raise UsageError(f"{out}: {why}", hint="--force replaces a mix; choose another folder with --output")
    with storage.new_folder(out, replace=force) as writer:
        spool = writer.path / ".spool"
        spool.mkdir()
        work = _Work(mix, root, spool, Problems(mix.on_error), tell)
        work.collect()
        work.drop_duplicates()
        work.hold_out()
        files = work.write(writer.path, level, shard_bytes)
        shutil.rmtree(spool)
        made = report.of(mix, work.tallies, files, work.reader.hashes, left_out(*work.bad))
        writer.write(report.NAME, storage.json_bytes(made))
        writer.write("ATTRIBUTION.md", report.attribution(mix, made).encode())
    return made


class _Work:
    """The state between the steps."""

    def __init__(self, mix: Mix, root: Path, spool: Path, problems: Problems, tell: OnEvent) -> None:
        self.mix, self.root, self.spool, self.problems, self.tell = mix, root, spool, problems, tell
        self.tallies = [Tally() for _ in mix.sources]
        self.ledger = Ledger(spool)
        self.reader = Reader(root, problems)

    @property
    def bad(self) -> tuple[int, list[str]]:
        """Bad lines left out, and examples."""
        return self.problems.skipped, self.problems.examples

    def _progress(self, task: str, done: int, total: int, unit: str) -> None:
        self.tell({"event": "progress", "task": task, "done": done, "total": total, "unit": unit})

    # ---- 1

    def collect(self) -> None:
        """Reads, cleans and filters all sources."""
        sizes = [size_of(source, self.root) for source in self.mix.sources]
        for number, source in enumerate(self.mix.sources):
            judge = Judge(source.rules, source.lang)
            tally, before, consumed = self.tallies[number], self.problems.skipped, self.problems.consumed
            for batch in _batches(self.reader.units(source)):
                done = tally.bytes if source.slice is not None else self.problems.consumed - consumed
                self._progress("read", sum(sizes[:number]) + min(done, sizes[number]), max(1, sum(sizes)), "bytes")
                self._judge(number, judge, batch)
            tally.bad = self.problems.skipped - before
            if not tally.units:
                raise DataError(f"{source.place}: {source.name} holds no text ({self.root / source.path})")
            if tally.units == sum(count for count, _ in tally.dropped.values()):
                reasons = ", ".join(f"{reason} {count}" for reason, (count, _) in tally.dropped.items())
                self.tell({"event": "warning", "message": f"{source.name}: nothing is left of it ({reasons})"})
        self._progress("read", max(1, sum(sizes)), max(1, sum(sizes)), "bytes")
        self.ledger.close()

    def _judge(self, number: int, judge: Judge, units: list[Unit]) -> None:
        tally, contents, roles = self.tallies[number], [], []
        prepared = [[judge.prepare(text) for text in unit.contents] for unit in units]
        chat = any(unit.roles for unit in units)
        verdicts = judge.judge([SEPARATOR.join(texts) for texts in prepared], cut=not chat)
        for unit, texts, verdict in zip(units, prepared, verdicts, strict=True):
            size = sum(len(text.encode()) for text in texts)
            tally.units += 1
            tally.bytes += size
            reason = "short" if not all(text.strip() for text in texts) else verdict.reason
            if reason:
                tally.drop(reason, size)
                continue
            tally.cut += verdict.cut
            contents.append(verdict.text)
            roles.append(unit.roles)
        self.ledger.add(number, contents, roles)

    # ---- 2

    def drop_duplicates(self) -> None:
        """Marks units that are equal to, or near to an earlier one."""
        ledger = self.ledger
        _, first = np.unique(ledger.hash, return_index=True)
        self.kept = np.zeros(len(ledger), bool)
        self.kept[first] = True
        # What has no letters or digits has no fold to compare.
        self._dropped("duplicate", ~self.kept)
        near = np.array([self.mix.near if s.near is None else s.near for s in self.mix.sources], np.float32)
        units = np.flatnonzero(self.kept & (ledger.shingles >= FEWEST) & (near[ledger.source] < 1))
        if len(units):
            step = lambda band: self._progress("compare", band, BANDS, "bands")  # noqa: E731
            gone = units[duplicates(ledger.signatures(), units, near[ledger.source[units]], step)]
            self.kept[gone] = False
            mask = np.zeros(len(ledger), bool)
            mask[gone] = True
            self._dropped("near duplicate", mask)

    def _dropped(self, reason: str, units: np.ndarray) -> None:
        for number, tally in enumerate(self.tallies):
            mine = units & (self.ledger.source == number)
            if count := int(np.count_nonzero(mine)):
                tally.dropped[reason] = [count, int(self.ledger.size[mine].sum(dtype=np.int64))]

    # ---- 3

    def hold_out(self) -> None:
        """Gives each unit its part, and collects the windows of held-out text."""
        ledger, mix = self.ledger, self.mix
        share = {
            part: np.array([getattr(mix, part) if getattr(s, part) is None else getattr(s, part) for s in mix.sources])
            for part in ("valid", "calib")
        }
        draw = _draws(ledger.hash, mix.seed)
        valid, both = share["valid"][ledger.source], (share["valid"] + share["calib"])[ledger.source]
        self.part = np.where(draw < valid, 0, np.where(draw < both, 1, 2)).astype(np.uint8)
        others = self._against()
        texts = list(self._texts(np.flatnonzero(self.kept & (self.part == 0))))
        self.windows = {0: None, 1: Windows([*others, *texts])}
        texts += list(self._texts(np.flatnonzero(self.kept & (self.part == 1))))
        self.windows[2] = Windows([*others, *texts])

    def _texts(self, units: np.ndarray) -> Iterator[list[str]]:
        return (texts for _, texts in self.ledger.batches(units))

    def _against(self) -> list[list[str]]:
        files = [file for path in self.mix.against for file in find_files(self.root / path)[0]]
        found = read_documents(files, problems=self.problems)
        return [["\n".join(segment.text for segment in document.segments)] for document in found]

    # ---- 4

    def write(self, folder: Path, level: int, shard_bytes: int) -> dict[str, dict[str, int]]:
        """Writes all parts; counts by file."""
        groups = list(dict.fromkeys(source.group or source.lang for source in self.mix.sources))
        files: dict[str, dict[str, int]] = {}
        total, done = len(PARTS) * len(groups), 0
        for number, part in enumerate(PARTS):
            for group in groups:
                self._progress("write", done, total, "files")
                done += 1
                lines = _Lines(self.spool / "lines")
                self._gather(number, group, lines)
                lines.close()
                passes = self._passes(lines, part)
                for index, (size, chunks) in enumerate(_shards(passes, shard_bytes)):
                    name = f"{part}-{group}-{index:03d}.jsonl.zst"
                    files[name] = {"records": size} | _pack(folder / name, chunks, level)
        self._progress("write", total, total, "files")
        return files

    def _gather(self, part: int, group: str, lines: _Lines) -> None:
        """The records of one part and group into `lines`; sources that come more than once stand last, near to their
        next copy."""
        order = sorted(range(len(self.mix.sources)), key=lambda n: (self.mix.sources[n].weight > 1, n))
        for number in order:
            source = self.mix.sources[number]
            if (source.group or source.lang) != group:
                continue
            units = np.flatnonzero(self.kept & (self.part == part) & (self.ledger.source == number))
            units = self._chosen(units, source, number) if part == 2 else units
            if source.shuffle:
                units = units[np.argsort(_draws(self.ledger.hash[units], self.mix.seed + 2), kind="stable")]
            for record, count, size in self._records(source, number, part, units):
                lines.add(record, number, size)
                self.tallies[number].keep(PARTS[part], count, 1, size)

    def _chosen(self, units: np.ndarray, source: MixSource, number: int) -> np.ndarray:
        """A random part of at most max_bytes, in the old order."""
        sizes = self.ledger.size[units].astype(np.int64)
        if source.max_bytes is None or sizes.sum() <= source.max_bytes:
            return units
        order = np.argsort(_draws(self.ledger.hash[units], self.mix.seed + 1), kind="stable")
        count = int(np.searchsorted(np.cumsum(sizes[order]), source.max_bytes, side="right"))
        left = order[count:]
        self.tallies[number].dropped["max_bytes"] = [len(left), int(sizes[left].sum())]
        return units[np.sort(order[:count])]

    def _records(
        self, source: MixSource, number: int, part: int, units: np.ndarray
    ) -> Iterator[tuple[bytes, int, int]]:
        """(line of JSON, units in it, bytes of text), units joined as the recipe says."""
        held: list[str] = []
        for unit, text in self._apart(source, number, part, units):
            roles = self.ledger.role_sets[self.ledger.roles[unit]]
            if roles:
                contents = text.split(SEPARATOR)
                turns = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=True)]
                yield _line(source, "messages", turns), 1, sum(len(one.encode()) for one in contents)
                continue
            held.append(text)
            if sum(map(len, held)) >= (source.join_chars or 0):
                yield _joined(source, held)
                held = []
        if held:
            yield _joined(source, held)

    def _apart(self, source: MixSource, number: int, part: int, units: np.ndarray) -> Iterator[tuple[int, str]]:
        """(unit, text) without what is near to text held out for a purpose that comes before this part's."""
        windows, tally = self.windows[part], self.tallies[number]
        for group, texts in self.ledger.batches(units):
            marks = windows.near([text.replace(SEPARATOR, "\n") for text in texts]) if windows else [None] * len(texts)
            for unit, text, near in zip(group.tolist(), texts, marks, strict=True):
                if near is None or not near.any():
                    yield unit, text
                    continue
                lines = text.replace(SEPARATOR, "\n").split("\n")
                close = sum(len(line) for line, mark in zip(lines, near, strict=True) if mark)
                if 2 * close >= len(text):
                    tally.drop("near held-out text", len(text.encode()))
                elif self.ledger.roles[unit] or source.lang == "code":
                    yield unit, text
                else:
                    tally.cut += sum(len(line.encode()) + 1 for line, mark in zip(lines, near, strict=True) if mark)
                    yield unit, "\n".join(line for line, mark in zip(lines, near, strict=True) if not mark).strip("\n")

    def _passes(self, lines: _Lines, part: str) -> Iterator[bytes]:
        """The records once, or as often as the weights of their sources say."""
        weights = np.array([source.weight if part == "train" else 1.0 for source in self.mix.sources])
        ends, sources = np.array(lines.ends, np.int64), np.array(lines.sources, np.int64)
        draw = _draws(np.arange(len(ends), dtype=np.uint64), self.mix.seed + 3)
        raw = np.memmap(lines.path, np.uint8, "r") if len(ends) else np.zeros(0, np.uint8)
        copies = int(np.ceil(weights[sources].max())) if len(ends) else 0
        for copy in range(copies):
            for index in np.flatnonzero(draw < weights[sources] - copy).tolist():
                yield raw[ends[index - 1] if index else 0 : ends[index]].tobytes()
                if part == "train":
                    self.tallies[sources[index]].keep("train with weight", 0, 1, lines.sizes[index])


class _Lines:
    """Lines of JSON on the disk, before they are packed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends: list[int] = []
        self.sources: list[int] = []
        self.sizes: list[int] = []
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._at = 0

    def add(self, line: bytes, source: int, size: int) -> None:
        self._at += self._file.write(line)
        self.ends.append(self._at)
        self.sources.append(source)
        self.sizes.append(size)

    def close(self) -> None:
        self._file.close()


def _batches(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    group: list[Unit] = []
    size = 0
    for unit in units:
        group.append(unit)
        size += sum(map(len, unit.contents)) + 64
        if size >= BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group


def _draws(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) from each hash and the seed."""
    value = hashes + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((value ^ (value >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def _line(source: MixSource, key: str, value: Any) -> bytes:
    record = {"source": source.name, "lang": source.lang, key: value}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _joined(source: MixSource, texts: list[str]) -> tuple[bytes, int, int]:
    text = "\n".join(texts)
    return _line(source, "text", text), len(texts), len(text.encode())


def _shards(lines: Iterator[bytes], limit: int) -> Iterator[tuple[int, list[bytes]]]:
    """(records, their lines) of each file."""
    held: list[bytes] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= limit:
            yield len(held), held
            held, size = [], 0
    if held:
        yield len(held), held


def _pack(path: Path, lines: list[bytes], level: int) -> dict[str, int]:
    parameters = zstandard.ZstdCompressionParameters.from_level(level, window_log=_WINDOW, enable_ldm=True)
    size = sum(map(len, lines))
    with open(path, "wb") as file:
        packer = zstandard.ZstdCompressor(compression_params=parameters)
        with packer.stream_writer(file, size=size, closefd=False) as stream:
            for first, last in pairwise([*range(0, len(lines), 1000), len(lines)]):
                stream.write(b"".join(lines[first:last]))
    return {"bytes": size, "packed": path.stat().st_size}
