"""Checks of a data recipe's files and of a finished mix, apart from the code that built it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moai_core import storage
from moai_core.data.mix import report
from moai_core.data.mix.recipe import Mix
from moai_core.data.mix.sources import place as located
from moai_core.data.read import find_files
from moai_core.errors import DataError, MoaiError

# Letters and digits a line needs for its presence in training to say anything.
_LEAST = 24
_ROLES = ("user: ", "system: ", "assistant: ")


def files(mix: Mix | None, root: Path) -> list[MoaiError]:
    """An error for each source, and each file to hold against, that isn't there."""
    errors: list[MoaiError] = []
    for source in mix.sources if mix is not None else ():
        if not source.path.startswith("hf://"):
            errors += _missing(root, source.path, source.place)
    for path in mix.against if mix is not None else ():
        errors += _missing(root, path, "against")
    return errors


def _missing(root: Path, path: str, place: str) -> list[MoaiError]:
    try:
        find_files(located(root, path))
    except DataError as exc:
        return [DataError(f"{place}: {exc.message}", hint="say with --root where the files are")]
    return []


def _fold(line: str) -> str:
    return re.sub(r"[\W_]+", "", line.lower())


def _lines(folder: Path, part: str) -> Iterator[tuple[str, int]]:
    """(source, hash) of every folded line of a part that is long enough to say anything; a chat is one line, since many
    questions have the same short answer."""
    for source, text in report.records(folder, part, between=" "):
        for line in map(_fold, [text] if text.startswith(_ROLES) else text.split("\n")):
            if len(line) >= _LEAST or (len(line) >= _LEAST // 2 and not line.isascii()):
                yield source, hash(line)


def folder(path: Path) -> dict[str, Any]:
    """Counts of a mix, and `errors`: lines that stand in two parts. Raises CheckpointError for a damaged file.

    Lines are compared as text, without the windows and hashes that `build` uses; code is left out, whose lines repeat
    everywhere."""
    if not (path / storage.MANIFEST).exists():
        report.read(path)  # says so where this is no mix at all
    storage.verify(path)
    made = report.read(path)
    spared = {source["name"] for source in made["sources"] if source["lang"] == "code"}
    held = {part: {line for name, line in _lines(path, part) if name not in spared} for part in ("valid", "calib")}
    errors: list[MoaiError] = []
    if shared := len(held["valid"] & held["calib"]):
        errors.append(DataError(f"{path}: {shared} lines stand in both valid and calib"))
    every = held["valid"] | held["calib"]
    found: dict[str, int] = {}
    lines = 0
    for source, line in _lines(path, "train"):
        lines += 1
        if line in every and source not in spared:
            found[source] = found.get(source, 0) + 1
    for source, count in found.items():
        errors.append(DataError(f"{path}: {count} lines of {source} in training stand in held-out text"))
    return {"files": len(made["files"]), "lines in training": lines, "lines held out": len(every), "errors": errors}
