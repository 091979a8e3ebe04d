"""One reader a file format, streaming: txt, md, jsonl, json arrays, csv, tsv, parquet; all but the last also as .gz and
.zst.

One .txt or .md file is ONE document (paragraphs belong together); a line that holds only `<|endoftext|>` separates
documents inside a file. .jsonl has one record a line, .json an array of records (or one record a line), .csv, .tsv and
.parquet one a row under the names of the first. UTF-8 only (a byte order mark is fine); CRLF counts as a line end.

Bad lines go to `Problems`. Damage of the container (truncated gzip, broken parquet, an array that ends early) always
raises DataError: what follows it can't be trusted. Memory stays bounded: texts longer than `TEXT_PART` come in parts,
cut at a line break, and a record may have at most `MAX_RECORD` bytes. Sources: RFC 1952 (gzip), RFC 8878 (zstd), RFC
8259 (JSON), jsonlines.org, RFC 4180 (CSV)."""

from __future__ import annotations

import codecs
import csv
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moai_core.data.records import BadRecord, Document, Problems, Segment
from moai_core.errors import DataError, shell

TEXT = (".txt", ".text", ".md", ".markdown")
PACKED = (".gz", ".zst")
SEPARATOR = b"<|endoftext|>"
TEXT_PART = 256 << 10
MAX_RECORD = 64 << 20
_BLOCK = 1 << 20
_COLUMNS = ("text", "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system")
_DECODER = json.JSONDecoder()


def read_records(path: Path, ending: str, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    """`(file, line, value)` for each record of a file of records; `ending` is its format."""
    if ending == ".parquet":
        return _parquet(path, problems)
    blocks = read_blocks(path, problems)
    if ending in (".csv", ".tsv"):
        return _rows(path, blocks, "\t" if ending == ".tsv" else ",", problems)
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


# ---- bytes ---------------------------------------------------------------------------------------------------------


def read_blocks(path: Path, problems: Problems) -> Iterator[bytes]:
    """The decompressed bytes of a file in blocks, without a byte order mark. Raises DataError for a damaged or
    truncated archive.
    """
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
                        hint=f"iconv -f UTF-16 -t UTF-8 {shell(path.name)}",
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


def split_lines(path: Path, blocks: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
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


def decode(raw: bytes, offset: int) -> str:
    """`raw` as text. Raises BadRecord naming the byte offset in the file of what is not UTF-8 text."""
    if (nul := raw.find(b"\0")) >= 0:
        raise BadRecord(f"byte {offset + nul} is NUL: a binary file?")
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise BadRecord(f"byte {offset + exc.start} (0x{raw[exc.start]:02x}) is not valid UTF-8") from exc


# ---- one reader a format -------------------------------------------------------------------------------------------


def _lines_json(path: Path, blocks: Iterable[bytes], problems: Problems) -> Iterator[tuple[str, int, Any]]:
    name = str(path)
    for number, offset, raw in split_lines(path, blocks):
        if not raw.strip():
            continue
        try:
            record = _parse(decode(raw, offset + problems.origin))
        except BadRecord as exc:
            problems.bad(name, number, str(exc))
            continue
        yield name, number, record


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadRecord(
            _why(exc) + (f" (column {exc.colno})" if isinstance(exc, json.JSONDecodeError) else "")
        ) from exc


def _why(exc: Exception) -> str:
    if isinstance(exc, json.JSONDecodeError):
        return f"not valid JSON: {exc.msg}"
    if isinstance(exc, RecursionError):
        return "not valid JSON: nested too deep"
    return f"not usable JSON: {str(exc)[:80]}"  # an integer of more than 4300 digits


class _ArrayText:
    """The text of a JSON array as far as it was read: `text` from `at` on is unread, `line` is where `at` stands."""

    def __init__(self, path: Path, blocks: Iterator[bytes]) -> None:
        self.path, self.blocks = path, blocks
        self.text, self.at, self.line, self.done = "", 0, 1, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def more(self) -> bool:
        """Reads on; doubling what is held keeps a record of n bytes at O(n log n). False at the end."""
        want, pieces, got = max(_BLOCK, len(self.text) - self.at), [self.text[self.at :]], 0
        while not self.done and got < want:
            block = next(self.blocks, None)
            self.done = block is None
            try:
                piece = self._utf8.decode(block or b"", self.done)
            except UnicodeDecodeError as exc:
                before = sum(piece.count("\n") for piece in pieces) + exc.object[: exc.start].count(b"\n")
                byte = exc.object[exc.start]
                raise DataError(f"{self.path}:{self.line + before}: byte 0x{byte:02x} is not valid UTF-8") from exc
            pieces.append(piece)
            got += len(piece)
        self.text, self.at = "".join(pieces), 0
        return got > 0

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def sign(self) -> str:
        """The next character that is no white space, passed over; '' at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.advance(end)
            if self.at < len(self.text):
                self.at += 1
                return self.text[self.at - 1]
            if not self.more():
                return ""

    def record(self) -> tuple[int, Any]:
        """(its line, the value that begins after white space)."""
        if not self.sign():
            raise DataError(f"{self.path}:{self.line}: the array ends early")
        self.at -= 1
        while True:
            begin, held = self.at, self.text
            try:
                value, end = _DECODER.raw_decode(held, begin)
            except (ValueError, RecursionError) as exc:
                if isinstance(exc, ValueError) and len(held) - begin <= MAX_RECORD and self.more():
                    continue
                row = self.line + (held.count("\n", begin, exc.pos) if isinstance(exc, json.JSONDecodeError) else 0)
                hint = "a broken array can't be read past the damage; mend it or use one record a line (.jsonl)"
                raise DataError(f"{self.path}:{row}: {_why(exc)}", hint=hint) from exc
            if end == len(held) and self.more():
                continue  # a number may go on
            line = self.line
            self.advance(self.at + end - begin)
            return line, value


def _array(path: Path, blocks: Iterator[bytes]) -> Iterator[tuple[str, int, Any]]:
    """The elements of a JSON array, one at a time. Damage can't be skipped: where the next element begins is
    unknown.
    """
    array = _ArrayText(path, blocks)
    array.sign()  # the bracket that made this an array
    sign = array.sign()
    array.at -= sign not in ("", "]")
    while sign != "]":
        line, value = array.record()
        yield str(path), line, value
        sign = array.sign()
        if sign not in (",", "]"):
            why = f"expected a comma or ] after a record, got {sign!r}" if sign else "the array ends early"
            raise DataError(f"{path}:{array.line}: {why}")
    if array.sign():
        raise DataError(f"{path}:{array.line}: text after the end of the array")


def _rows(path: Path, blocks: Iterable[bytes], comma: str, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    """Rows as {name in the first row: text}. A row of another length is bad; an open quote damages what follows."""
    text = (_decoded(path, number, offset, raw) for number, offset, raw in split_lines(path, blocks))
    rows, names, began = csv.reader(text, delimiter=comma, strict=True), None, 1
    try:
        for row in rows:
            if names is None:
                names = row
            elif len(row) == len(names):
                yield str(path), began, dict(zip(names, row, strict=True))
            elif row:
                problems.bad(str(path), began, f"{len(row)} fields, the first row has {len(names)}")
            began = rows.line_num + 1
    except csv.Error as exc:
        hint = "a quote inside a field is written twice"
        raise DataError(f"{path}:{began}: not valid CSV ({exc})", hint=hint) from exc


def _decoded(path: Path, number: int, offset: int, raw: bytes) -> str:
    try:
        return decode(raw, offset) + "\n"
    except BadRecord as exc:  # a row may go on over lines, so none can be left out
        raise DataError(f"{path}:{number}: {exc}") from exc


def _parquet(path: Path, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = [name for name in names if name in _COLUMNS]
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


def read_texts(path: Path, problems: Problems) -> Iterator[Document]:
    """The documents of a text file, in parts of about TEXT_PART bytes, cut before a line that starts with a word
    after one that ends with one.
    """
    name = str(path)
    held: list[str] = []
    size, first, begun, after_word = 0, True, 1, False
    number, offset = 1, 0
    for raw in _text_lines(read_blocks(path, problems)):
        line = ""
        try:
            line = decode(raw[:-2] + b"\n" if raw.endswith(b"\r\n") else raw, offset + problems.origin)
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
    """Lines with their ends; one longer than 16 parts comes in pieces, cut after a space or else between two
    characters.
    """
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
