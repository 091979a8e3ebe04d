"""Every unit of a mix while it is built: texts and signatures in files, a few numbers a unit in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moai_core.data.mix import kernels as k
from moai_core.data.mix.text import signatures

SEPARATOR = "\x1e"  # between the messages of a chat; cleaned text holds none
BATCH = 2 << 20


@dataclass
class Tally:
    """What became of a source. Bytes are UTF-8 bytes of text, of chats the messages'."""

    units: int = 0
    bytes: int = 0
    cut: int = 0
    bad: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, size: int) -> None:
        """One unit of `size` bytes is left out."""
        entry = self.dropped.setdefault(reason, [0, 0])
        entry[0] += 1
        entry[1] += size

    def keep(self, part: str, units: int, records: int, size: int) -> None:
        """So much goes into `part`: units, the records they are written as, their bytes."""
        entry = self.kept.setdefault(part, [0, 0, 0])
        for index, value in enumerate((units, records, size)):
            entry[index] += value

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with names for the counts."""
        dropped = {reason: {"units": n, "bytes": b} for reason, (n, b) in sorted(self.dropped.items())}
        kept = {part: {"units": u, "records": r, "bytes": b} for part, (u, r, b) in self.kept.items()}
        read = {"units": self.units, "bytes": self.bytes, "bad": self.bad}
        return {"read": read, "cut": self.cut, "dropped": dropped, "kept": kept}


class Ledger:
    """Units by number, in the order they were added. `close` makes the columns arrays: source, offset, size, hash,
    shingles, roles (a number of `role_sets`)."""

    def __init__(self, folder: Path) -> None:
        self._texts, self._signatures = folder / "texts", folder / "signatures"
        self._text_file, self._signature_file = open(self._texts, "wb"), open(self._signatures, "wb")  # noqa: SIM115
        self._columns = {name: array(code) for name, code in zip(_COLUMNS, "HQIQIH", strict=True)}
        self.role_sets: list[tuple[str, ...]] = [()]
        self._known: dict[tuple[str, ...], int] = {(): 0}
        self._at = 0

    def add(self, source: int, contents: list[str], roles: list[tuple[str, ...]]) -> None:
        """Units of one source: their text (messages joined by SEPARATOR) and roles."""
        if not contents:
            return
        values, hashes, shingles = signatures(contents)
        self._signature_file.write(values.tobytes())
        columns = self._columns
        for text, who, digest, count in zip(contents, roles, hashes.tolist(), shingles.tolist(), strict=True):
            raw = text.encode()
            self._text_file.write(raw)
            if who not in self._known:
                self._known[who] = len(self.role_sets)
                self.role_sets.append(who)
            row = (source, self._at, len(raw), digest, count, self._known[who])
            for name, value in zip(_COLUMNS, row, strict=True):
                columns[name].append(value)
            self._at += len(raw)

    def close(self) -> None:
        """No more units."""
        self._text_file.close()
        self._signature_file.close()
        made = {name: np.frombuffer(column, dtype=column.typecode) for name, column in self._columns.items()}
        self.source, self.offset, self.size, self.hash, self.shingles, self.roles = (made[name] for name in _COLUMNS)
        self._raw = np.memmap(self._texts, np.uint8, "r") if self._at else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self._columns["source"])

    def signatures(self) -> np.ndarray:
        """(units, BINS) uint16, mapped from the file."""
        if not len(self):
            return np.zeros((0, k.BINS), np.uint16)
        return np.memmap(self._signatures, np.uint16, "r", shape=(len(self), k.BINS))

    def batches(self, units: np.ndarray) -> Iterator[tuple[np.ndarray, list[str]]]:
        """`units` in groups of about BATCH bytes, each with its texts."""
        ends = np.cumsum(self.size[units], dtype=np.int64)
        first = 0
        while first < len(units):
            last = int(np.searchsorted(ends, (ends[first - 1] if first else 0) + BATCH)) + 1
            group = units[first:last]
            yield group, [self._raw[o : o + n].tobytes().decode() for o, n in zip(*self._where(group), strict=True)]
            first = last

    def _where(self, group: np.ndarray) -> tuple[list[int], list[int]]:
        return self.offset[group].tolist(), self.size[group].tolist()


_COLUMNS = ("source", "offset", "size", "hash", "shingles", "roles")
