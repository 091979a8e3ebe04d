"""Files to documents, streaming: txt, md, jsonl, json arrays, parquet (text kinds also as .gz and .zst), and `hf://` through datasets.

One .txt or .md file is ONE document (paragraphs belong together); a line that holds only `<|endoftext|>` separates documents inside a file.
.jsonl has one record a line, .json an array of records (or one record a line), .parquet one a row; records.py says what they mean. The kind is
detected from a file's first record and then holds for the file. UTF-8 only (a byte order mark is fine); CRLF counts as a line end.

A bad line raises DataError `file:line: why`, or is counted where `on_error` is skip. Damage of the container (truncated gzip, broken parquet,
an array that ends early) always raises: what follows it can't be trusted. Memory stays bounded: texts longer than `TEXT_PART` characters come in parts,
cut at a line break, and a record may have at most `MAX_RECORD` bytes. Folders are read recursively in name order; links are followed, loops cut.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moai_core.data.records import ALIASES, KINDS, BadRecord, Document, Segment, kind_of, segments_of
from moai_core.errors import DataError, UsageError, storage_error

TEXT = (".txt", ".text", ".md", ".markdown")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*TEXT, *LINES, ".json", ".parquet")
PACKED = (".gz", ".zst")
SEPARATOR = b"<|endoftext|>"
TEXT_PART = 256 << 10
MAX_RECORD = 64 << 20
_BLOCK = 1 << 20
_EXPECTED = "txt, md, jsonl, json or parquet, the first four also as .gz or .zst"


@dataclass
class Problems:
    """What `on_error` decides, the exact count of what was left out, and how far the reader is.

    skipped: bad records; empty: valid records without text; examples: the first messages; consumed: bytes read from the disk;
    kind: what the last file's records are; origin: bytes of its byte order mark.
    """

    on_error: str = "stop"
    skipped: int = 0
    empty: int = 0
    examples: list[str] = field(default_factory=list)
    consumed: int = 0
    kind: str = "auto"
    origin: int = 0

    def bad(self, file: str, line: int, why: str) -> None:
        message = f"{file}:{line}: {why}"
        if self.on_error != "skip":
            raise DataError(
                message, hint="mend the line, or set data.on_error=skip to leave such lines out and count them"
            )
        self.skipped += 1
        if len(self.examples) < 20:
            self.examples.append(message)


def left_out(skipped: int, examples: list[str]) -> str:
    """`3 bad lines left out, the first: file:line: why`; empty for none."""
    return f"{skipped} bad line{'s' * (skipped != 1)} left out, the first: {examples[0]}" if skipped else ""


def check_format(format: str) -> str:
    """The canonical kind for `data.format` (`auto` or a kind or its alias). Raises UsageError."""
    kind = ALIASES.get(format, format)
    if kind != "auto" and kind not in KINDS:
        raise UsageError(
            f"data.format: unknown kind {format!r}", hint=f"use auto, {', '.join(KINDS)} (or {', '.join(ALIASES)})"
        )
    return kind


# ---- which files ----------------------------------------------------------------------------------------------------------------------------


def suffix(path: Path) -> str:
    """`.jsonl` for both a.jsonl and a.jsonl.gz; '' when moai can't read such a file."""
    name = path.name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    ending = os.path.splitext(name[: len(name) - len(packed)])[1]
    return ending if ending in SUFFIXES and not (packed and ending == ".parquet") else ""


def find_files(path: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """`(files to read, files passed over because of their ending)` for a file, a folder or a glob, in name order.

    Raises DataError when nothing is there, nothing readable is in it, or a file named outright has an ending of another kind.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        found = list(_walk(where))
    elif where.exists():
        if not suffix(where):
            raise DataError(
                f"{where}: can't tell its format from the ending {where.suffix or '(none)'!r}",
                hint=f"expected {_EXPECTED}",
            )
        return [where], []
    elif re.search(r"[*?\[]", str(where)):
        found = _glob(str(where))
    else:
        raise DataError(
            f"{where}: no such file or folder",
            hint="check data.train and data.valid; relative paths start from the current folder",
        )
    files = [file for file in found if suffix(file)]
    if not files:
        seen = f"{len(found)} file{'s' * (len(found) != 1)}, none of them readable" if found else "no files"
        raise DataError(f"{where}: {seen}", hint=f"expected {_EXPECTED}")
    return files, [file for file in found if not suffix(file)]


def _walk(folder: Path) -> Iterator[Path]:
    """Every visible file below `folder`; a folder met a second time (a link that leads back) is not entered again."""
    seen: set[tuple[int, int]] = set()

    def fail(exc: OSError) -> None:
        raise storage_error(exc, exc.filename or folder)

    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(root, name)
            for name in sorted(names)
            if not name.startswith(".") and os.path.isfile(os.path.join(root, name))
        )


def _glob(pattern: str) -> list[Path]:
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if re.search(r"[*?\[]", part))
    base = Path(*parts[:first]) if first else Path(".")
    if not base.is_dir():
        raise DataError(f"{base}: no such folder (of the pattern {pattern!r})")
    wanted = re.compile(_regex("/".join(parts[first:])))
    return sorted(file for file in _walk(base) if wanted.fullmatch(file.relative_to(base).as_posix()))


def _regex(pattern: str) -> str:
    """A shell pattern as a regular expression: `**/` any folders, `*` and `?` inside one name, `[...]` a set."""
    made = []
    for piece in re.findall(r"\*\*/|\*+|\?|\[[^\]]+\]|[^*?\[]+|\[", pattern):
        if piece == "**/":
            made.append("(?:.*/)?")
        elif piece[0] == "*":
            made.append(".*" if len(piece) > 1 else "[^/]*")
        elif piece == "?":
            made.append("[^/]")
        elif piece[0] == "[" and len(piece) > 1:
            made.append("[" + piece[1:-1].replace("!", "^", 1).replace("\\", r"\\") + "]" if piece[1] == "!" else piece)
        else:
            made.append(re.escape(piece))
    return "".join(made)


# ---- documents ------------------------------------------------------------------------------------------------------------------------------


def read_documents(
    files: Iterable[Path], *, format: str = "auto", problems: Problems | None = None
) -> Iterator[Document]:
    """The documents of `files`, in order. Raises DataError (bad data), StorageError (a file can't be read)."""
    problems = problems or Problems()
    kind = check_format(format)
    for path in files:
        try:
            if suffix(path) in TEXT:
                yield from _texts(path, problems)
            else:
                yield from documents_of(_records(path, problems), kind, problems)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError):
                raise DataError(f"{path}: no such file") from exc
            raise storage_error(exc, path) from exc


def documents_of(records: Iterable[tuple[str, int, Any]], kind: str, problems: Problems) -> Iterator[Document]:
    """Records `(file, line, value)` of ONE file or stream to documents; with kind auto the first good record decides."""
    decided = 0
    for file, line, record in records:
        try:
            if kind == "auto":
                kind, decided = kind_of(record), line
                problems.kind = kind
            segments = segments_of(record, kind)
        except BadRecord as exc:
            problems.bad(
                file, line, f"{exc}{f' (decided by line {decided})' if decided and 'is missing' in str(exc) else ''}"
            )
            continue
        if segments:
            yield Document(segments, file, line)
        else:
            problems.empty += 1


def _records(path: Path, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    ending = suffix(path)
    if ending == ".parquet":
        return _parquet(path, problems)
    blocks = _blocks(path, problems)
    if ending == ".json":
        first = b""
        for block in blocks:
            first += block
            if (head := first.lstrip(b"\xef\xbb\xbf \t\r\n")) or len(first) > MAX_RECORD:
                blocks = _chain(first, blocks)
                return _array(path, blocks) if head.startswith(b"[") else _lines_json(path, blocks, problems)
    return _lines_json(path, blocks, problems)


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


# ---- bytes ----------------------------------------------------------------------------------------------------------------------------------


def _blocks(path: Path, problems: Problems) -> Iterator[bytes]:
    """The decompressed bytes of a file in blocks, without a byte order mark. Raises DataError for a damaged or truncated archive."""
    with open(path, "rb") as file:

        def read() -> bytes:
            data = file.read(_BLOCK)
            problems.consumed += len(data)
            return data

        source = _inflate(path, read) if path.name.lower().endswith(PACKED) else iter(read, b"")
        start = True
        for block in source:
            if start:
                if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(
                        f"{path}:1: starts with a UTF-16 byte order mark; moai reads UTF-8",
                        hint=f"iconv -f UTF-16 -t UTF-8 {path.name}",
                    )
                problems.origin = 3 if block.startswith(b"\xef\xbb\xbf") else 0
                block, start = block[problems.origin :], False
            yield block


def _inflate(path: Path, read: Callable[[], bytes]) -> Iterator[bytes]:
    import zstandard

    packed_gz = path.name.lower().endswith(".gz")
    kind = "gzip" if packed_gz else "zstd"

    def fresh() -> Any:
        # 2^27 is what `zstd --long` writes at most without being asked for more; a larger window is a memory bomb.
        return (
            zlib.decompressobj(31) if packed_gz else zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        )

    inflater, open_frame = fresh(), False
    try:
        while data := read():
            while data:
                open_frame = True
                if block := inflater.decompress(data):
                    yield block
                data = inflater.unused_data if inflater.eof else b""
                if inflater.eof:
                    inflater, open_frame = fresh(), False
                    data = data.lstrip(b"\0") if packed_gz else data  # gzip allows zero padding after a member
    except (zlib.error, zstandard.ZstdError) as exc:
        raise DataError(f"{path}: damaged {kind} file ({exc})") from exc
    if open_frame:
        raise DataError(
            f"{path}: truncated {kind} file: it ends inside a compressed block", hint="download or copy it again"
        )


def _lines(path: Path, blocks: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """`(line number, byte offset, line without its end)`; a line over MAX_RECORD raises DataError."""
    number, offset, rest = 1, 0, b""
    for block in blocks:
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield number, offset, line[:-1] if line.endswith(b"\r") else line
            number, offset = number + 1, offset + len(line) + 1
        if len(rest) > MAX_RECORD:
            raise DataError(
                f"{path}:{number}: the line is longer than {MAX_RECORD >> 20} MiB",
                hint="one record a line; split it, or use txt for plain text",
            )
    if rest:
        yield number, offset, rest


def _decode(raw: bytes, offset: int) -> str:
    """`raw` as text. Raises BadRecord naming the byte offset in the file of what is not UTF-8 text."""
    if (nul := raw.find(b"\0")) >= 0:
        raise BadRecord(f"byte {offset + nul} is NUL: a binary file?")
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise BadRecord(f"byte {offset + exc.start} (0x{raw[exc.start]:02x}) is not valid UTF-8") from exc


# ---- one reader a format --------------------------------------------------------------------------------------------------------------------


def _lines_json(path: Path, blocks: Iterable[bytes], problems: Problems) -> Iterator[tuple[str, int, Any]]:
    name = str(path)
    for number, offset, raw in _lines(path, blocks):
        if not raw.strip():
            continue
        try:
            record = _parse(_decode(raw, offset + problems.origin))
        except BadRecord as exc:
            problems.bad(name, number, str(exc))
            continue
        yield name, number, record


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise BadRecord(f"not valid JSON: {exc.msg} (column {exc.colno})") from exc
    except RecursionError as exc:
        raise BadRecord("not usable JSON: nested too deep") from exc
    except ValueError as exc:  # an integer of more than 4300 digits
        raise BadRecord(f"not usable JSON: {str(exc)[:80]}") from exc


def _array(path: Path, blocks: Iterator[bytes]) -> Iterator[tuple[str, int, Any]]:
    """The elements of a JSON array, one at a time. Damage inside can't be skipped: where the next element begins is unknown."""
    import codecs

    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, line, at, done = "", 1, 0, False

    def more() -> bool:
        # Doubling what is read keeps a record of n bytes at O(n log n).
        nonlocal text, at, done
        want = max(_BLOCK, len(text) - at)
        pieces, got = [text[at:]], 0
        while not done and got < want:
            block = next(blocks, None)
            done = block is None
            try:
                piece = utf8.decode(block or b"", done)
            except UnicodeDecodeError as exc:
                bad = (
                    line
                    + text.count("\n", at)
                    + sum(p.count("\n") for p in pieces[1:])
                    + exc.object[: exc.start].count(b"\n")
                )
                raise DataError(f"{path}:{bad}: byte 0x{exc.object[exc.start]:02x} is not valid UTF-8") from exc
            pieces.append(piece)
            got += len(piece)
        text, at = "".join(pieces), 0
        return got > 0

    def skip(characters: str) -> None:
        nonlocal at, line
        while True:
            start = at
            while at < len(text) and text[at] in characters:
                at += 1
            line += text.count("\n", start, at)
            if at < len(text) or not more():
                return

    more()
    skip(" \t\r\n")
    at += 1  # the bracket that made this an array
    skip(" \t\r\n")
    if text[at : at + 1] == "]":
        return
    while True:
        try:
            begin = at
            record, end = decoder.raw_decode(text, at)
            if end == len(text) and more():
                continue
        except (ValueError, RecursionError) as exc:
            if isinstance(exc, ValueError) and len(text) - at <= MAX_RECORD and more():
                continue
            row = line + (exc.doc.count("\n", begin, exc.pos) if isinstance(exc, json.JSONDecodeError) else 0)
            why = (
                exc.msg
                if isinstance(exc, json.JSONDecodeError)
                else "nested too deep"
                if isinstance(exc, RecursionError)
                else str(exc)[:80]
            )
            raise DataError(
                f"{path}:{row}: not valid JSON: {why}",
                hint="a broken array can't be read past the damage; mend it or use one record a line (.jsonl)",
            ) from exc
        yield str(path), line, record
        line += text.count("\n", at, end)
        at = end
        skip(" \t\r\n")
        sign = text[at : at + 1]
        at += 1
        skip(" \t\r\n")
        if sign == "]":
            if at < len(text):
                raise DataError(f"{path}:{line}: text after the end of the array")
            return
        if sign != ",":
            raise DataError(
                f"{path}:{line}: {'the array ends early' if not sign else f'expected a comma or ] after a record, got {sign!r}'}"
            )


def _parquet(path: Path, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = [
            name
            for name in names
            if name
            in ("text", "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system")
        ]
        if not wanted:
            raise DataError(
                f"{path}:1: unknown kind of record (columns: {', '.join(map(str, names[:6]))})",
                hint="expected a column 'text', 'messages', 'conversations', …",
            )
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                row += 1
                yield str(path), row, record
        problems.consumed += os.path.getsize(path)
    except (pyarrow.ArrowException, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: damaged parquet file ({str(exc).splitlines()[0][:120]})") from exc
    except OSError as exc:
        if exc.errno is not None:
            raise
        raise DataError(f"{path}: damaged parquet file ({str(exc).splitlines()[0][:120]})") from exc


def _texts(path: Path, problems: Problems) -> Iterator[Document]:
    """The documents of a text file, in parts of about TEXT_PART bytes, cut before a line that starts with a word after one that ends with one."""
    name = str(path)
    held: list[str] = []
    size, first, begun, after_word = 0, True, 1, False
    number, offset = 1, 0
    for raw in _text_lines(_blocks(path, problems)):
        line = ""
        try:
            line = _decode(raw[:-2] + b"\n" if raw.endswith(b"\r\n") else raw, offset + problems.origin)
        except BadRecord as exc:
            problems.bad(name, number, str(exc))
        here, number, offset = number, number + raw.endswith(b"\n"), offset + len(raw)
        if raw.rstrip() == SEPARATOR:
            if not first or any(map(str.strip, held)):
                yield Document(_segment(held), name, begun, first, True)
            held, size, first = [], 0, True
            continue
        if size >= TEXT_PART and ((after_word and not line[:1].isspace()) or size >= 16 * TEXT_PART):
            yield Document(_segment(held), name, begun, first, False)
            held, size, first = [], 0, False
        if not held:
            begun = here
        held.append(line)
        size += len(line)
        after_word = line.endswith("\n") and not line[-2:-1].isspace()
    if not first or any(map(str.strip, held)):
        yield Document(_segment(held), name, begun, first, True)
    elif held:
        problems.empty += 1


def _segment(lines: list[str]) -> list[Segment]:
    return [Segment("".join(lines), True)]


def _text_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends; one longer than 16 parts comes in pieces, cut after a space or else between two characters."""
    rest, longest = b"", 16 * TEXT_PART
    for block in blocks:
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield line + b"\n"
        while len(rest) > longest:
            cut = rest.rfind(b" ", TEXT_PART, longest)
            cut = cut if cut > 0 else longest
            while rest[cut] & 0xC0 == 0x80:
                cut -= 1
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest
