"""Sources to units: what the readers of moai give, cut as the data recipe says.

A unit is a text, or the messages of a chat: what is filtered, compared and held out as one. Text files are read whole,
in blocks between blank lines, or line by line; of one large file a slice of bytes may be a source of its own. Slices of
a packed file are read in one pass as long as they come in their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from moai_core import paths
from moai_core.data.formats import TEXT, decode, read_blocks, read_records, read_texts, split_lines
from moai_core.data.hub import hub_error, open_hub
from moai_core.data.mix.recipe import MixSource
from moai_core.data.mix.text import sections
from moai_core.data.read import check_format, documents_of, find_files, suffix
from moai_core.data.records import BadRecord, Document, Problems, Segment
from moai_core.errors import DataError, storage_error


class Unit(NamedTuple):
    """`contents` of a chat's messages with their `roles`, or one text and no roles; where it began."""

    contents: list[str]
    roles: tuple[str, ...]
    file: str
    line: int


class Reader:
    """Reads the sources of a mix one after the other. `problems` counts bad lines; `hashes` is SHA-256 by file."""

    def __init__(self, root: Path, problems: Problems) -> None:
        self.root, self.problems = root, problems
        self.hashes: dict[str, str] = {}
        self._open: _Slices | None = None

    def units(self, source: MixSource) -> Iterator[Unit]:
        """The units of one source, in order. Raises DataError, StorageError."""
        if source.path.startswith("hf://"):
            yield from self._records(source, _hub_records(source.path))
            return
        path = place(self.root, source.path)
        if source.slice is not None:
            yield from self._slice(source, path)
            return
        for file in find_files(path)[0]:
            try:
                if suffix(file) not in TEXT:
                    yield from self._records(source, read_records(file, suffix(file), self.problems))
                elif source.split == "file":
                    yield from self._documents(source, read_texts(file, self.problems))
                else:
                    yield from self._parts(source, read_blocks(file, self.problems), file, 1)
            except OSError as exc:
                raise storage_error(exc, file) from exc

    def _slice(self, source: MixSource, path: Path) -> Iterator[Unit]:
        assert source.slice is not None
        if not path.is_file() or suffix(path) not in TEXT:
            raise DataError(f"{source.place}: slice of {path}: no such text file", hint="check path, or --root")
        first, size = source.slice
        try:
            if self._open is None or self._open.path != path or self._open.at > first:
                self._open = _Slices(path)
            line = self._open.skip(first)
            yield from self._parts(source, self._open.take(size), path, line)
        except OSError as exc:
            raise storage_error(exc, path) from exc
        digest = self._open.digest.hexdigest()
        self.hashes[f"{source.path}[{first}:{first + size}]"] = digest
        if source.sha256 is not None and digest != source.sha256:
            raise DataError(
                f"{source.place}: {source.path} holds other bytes than the recipe was made for (SHA-256 {digest[:12]}…"
                f", expected {source.sha256[:12]}…)",
                hint="fetch the version that `origin` names, or take the new text with a new sha256",
            )

    def _parts(self, source: MixSource, blocks: Iterator[bytes], file: Path, line: int) -> Iterator[Unit]:
        """Units of a text file that is cut at line ends."""
        name, lines = str(file), (raw for _, _, raw in split_lines(file, blocks))
        held: list[bytes] = []
        begun, blank = line, 0
        for raw in lines:
            if source.split == "lines":
                yield from self._text(source, [raw], name, line)
            elif source.split == "file" or raw.strip():
                if held and blank >= source.blank_lines and source.split == "blocks":
                    yield from self._text(source, held, name, begun)
                    held, begun = [], line
                held, begun = (held, begun) if held else (held, line)
                held += [b""] * (blank if held else 0) + [raw]
                blank = 0
            else:
                blank += 1
            line += 1
        if held:
            yield from self._text(source, held, name, begun)

    def _text(self, source: MixSource, lines: list[bytes], file: str, line: int) -> Iterator[Unit]:
        try:
            text = decode(b"\n".join(lines), 0)
        except BadRecord as exc:
            self.problems.bad(file, line, f"{str(exc).replace('byte', 'byte (from the line on)', 1)}")
            return
        for part in sections(text, source.section_chars):
            yield Unit([part], (), file, line)

    def _documents(self, source: MixSource, documents: Iterator[Document]) -> Iterator[Unit]:
        held: list[Segment] = []
        for document in documents:
            held += document.segments
            if document.last or (source.section_chars and sum(len(s.text) for s in held) > 64 * source.section_chars):
                yield from self._document(source, Document(held, document.file, document.line))
                held = []

    def _document(self, source: MixSource, document: Document) -> Iterator[Unit]:
        if document.segments[0].role is not None:
            for turns in _turns(document.segments, source.section_chars):
                roles = tuple(str(segment.role) for segment in turns)
                yield Unit([segment.text for segment in turns], roles, document.file, document.line)
            return
        for part in sections("".join(segment.text for segment in document.segments), source.section_chars):
            yield Unit([part], (), document.file, document.line)

    def _records(self, source: MixSource, records: Iterator[tuple[str, int, Any]]) -> Iterator[Unit]:
        chosen = (one for one in records if _wanted(one[2], source))
        if source.columns:
            chosen = ((file, line, _renamed(record, source)) for file, line, record in chosen)
        for document in documents_of(chosen, check_format(source.format), self.problems):
            yield from self._document(source, document)


def _turns(segments: list[Segment], limit: int | None) -> list[list[Segment]]:
    """A chat in parts of at most `limit` characters where that can be done; each but the first begins with a user."""
    parts: list[list[Segment]] = [[]]
    size = 0
    for index, segment in enumerate(segments):
        ahead = sum(len(one.text) for one in segments[index : index + 2])
        if limit and parts[-1] and segment.role == "user" and size + ahead > limit:
            parts.append([])
            size = 0
        parts[-1].append(segment)
        size += len(segment.text)
    return [part for part in parts if any(segment.trainable for segment in part)]


def place(root: Path, path: str) -> Path:
    """`path` below the root; what isn't there is looked for among the packaged recipes (`corpus/train`)."""
    here, packaged = root / path, paths.RECIPES / path
    first = next((index for index, part in enumerate(here.parts) if set(part) & set("*?[")), len(here.parts))
    return packaged if not Path(*here.parts[:first]).exists() and (path.startswith("corpus/")) else here


def _wanted(record: Any, source: MixSource) -> bool:
    where = source.where
    return not where or (isinstance(record, dict) and all(str(record.get(key)) == v for key, v in where.items()))


def _renamed(record: Any, source: MixSource) -> Any:
    """A record under the keys that moai knows; what is missing is said by whoever reads it."""
    if not isinstance(record, dict):
        return record
    if "text" in source.columns.values():
        return {want: record[name] for name, want in source.columns.items() if name in record}
    turns = [{"role": want, "content": record.get(name)} for name, want in source.columns.items()]
    return {"messages": turns}


def _hub_records(path: str) -> Iterator[tuple[str, int, Any]]:
    dataset = open_hub(path)
    try:
        for row, record in enumerate(dataset, 1):
            yield path, row, record
    except DataError:
        raise
    except Exception as exc:  # network, damaged files: the library has no common base for them
        raise hub_error(path, exc) from exc


class _Slices:
    """A text file, unpacked on the way, of which slices are taken in ascending order."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.line = path, 0, 1
        self.digest = hashlib.sha256()
        self._blocks = read_blocks(path, Problems())
        self._rest = b""

    def _some(self, most: int) -> bytes:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        piece, self._rest = self._rest[:most], self._rest[most:]
        self.at += len(piece)
        self.line += piece.count(b"\n")
        return piece

    def skip(self, first: int) -> int:
        """Goes to byte `first`; its line."""
        while self.at < first:
            if not self._some(first - self.at):
                raise DataError(f"{self.path}: ends at byte {self.at}, before the slice from {first} on")
        self.digest = hashlib.sha256()
        return self.line

    def take(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes."""
        while size > 0:
            piece = self._some(size)
            if not piece:
                raise DataError(f"{self.path}: ends at byte {self.at}, {size} bytes before the slice does")
            size -= len(piece)
            self.digest.update(piece)
            yield piece


def size_of(source: MixSource, root: Path) -> int:
    """About how much there is to read, for a progress bar: bytes of the slice or of the files."""
    if source.slice is not None:
        return source.slice[1]
    if source.path.startswith("hf://"):
        return 0
    total = 0
    for file in find_files(place(root, source.path))[0]:
        with suppress(OSError):
            total += file.stat().st_size
    return total
