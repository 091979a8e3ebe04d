"""Paths to documents: which files a path means, and their records as documents, streaming.

A path is a file, a folder (read recursively in name order; links are followed, loops cut) or a glob; formats.py reads
the files, records.py says what a record means. The kind of the records is detected from a file's first one and then
holds for the file. A bad line raises DataError `file:line: why`, or is counted where `on_error` is skip (`Problems`).
Files of other kinds in a folder are passed over and told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moai_core.data.formats import PACKED, TEXT, read_records, read_texts
from moai_core.data.records import ALIASES, KINDS, BadRecord, Document, Problems, kind_of, left_out, segments_of
from moai_core.errors import DataError, UsageError, storage_error

__all__ = ["Problems", "check_format", "documents_of", "find_files", "left_out", "read_documents", "suffix"]

SUFFIXES = (*TEXT, ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_EXPECTED = "txt, md, jsonl, json, csv, tsv or parquet, all but the last also as .gz or .zst"


def check_format(format: str) -> str:
    """The canonical kind for `data.format` (`auto` or a kind or its alias). Raises UsageError."""
    kind = ALIASES.get(format, format)
    if kind != "auto" and kind not in KINDS:
        raise UsageError(
            f"unknown kind of records {format!r}", hint=f"use auto, {', '.join(KINDS)} (or {', '.join(ALIASES)})"
        )
    return kind


# ---- which files ---------------------------------------------------------------------------------------------------


def suffix(path: Path) -> str:
    """`.jsonl` for both a.jsonl and a.jsonl.gz; '' when moai can't read such a file."""
    name = path.name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    ending = os.path.splitext(name[: len(name) - len(packed)])[1]
    return ending if ending in SUFFIXES and not (packed and ending == ".parquet") else ""


def find_files(path: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """`(files to read, files passed over because of their ending)` for a file, a folder or a glob, in name order.

    Raises DataError when nothing is there, nothing readable is in it, or a file named outright has an ending of
    another kind."""
    if str(path).startswith("hf://"):
        fetch = "`hf download --repo-type dataset NAME --local-dir DIR`"
        raise DataError(f"{path}: only files are read here, no stream", hint=f"fetch it with {fetch} and give DIR")
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
            hint="on the command line relative paths start from the current folder, in a recipe from the recipe's",
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


# ---- documents -----------------------------------------------------------------------------------------------------


def read_documents(
    files: Iterable[Path], *, format: str = "auto", problems: Problems | None = None
) -> Iterator[Document]:
    """The documents of `files`, in order. Raises DataError (bad data), StorageError (a file can't be read)."""
    problems = problems or Problems()
    kind = check_format(format)
    for path in files:
        try:
            if suffix(path) in TEXT:
                yield from read_texts(path, problems)
            else:
                yield from documents_of(read_records(path, suffix(path), problems), kind, problems)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError):
                raise DataError(f"{path}: no such file") from exc
            raise storage_error(exc, path) from exc


def documents_of(records: Iterable[tuple[str, int, Any]], kind: str, problems: Problems) -> Iterator[Document]:
    """Records `(file, line, value)` of ONE file or stream to documents; with kind auto the first good record
    decides.
    """
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
