"""What a data recipe may say: which sources a mix is made of, under which licence, and how each is read and filtered.

A YAML file in the manner of training recipes (strict keys, `extends`, errors with file and line), but with lists and
mappings of its own:

    seed: 1
    near: 0.8                       # Jaccard similarity at which the later of two units is dropped
    valid: 0.01                     # share of every source held out for validation, and for calibration
    calib: 0.005
    against: [heldout/*.txt.zst]    # nothing near to this text stays in training
    filters: {prose: {min_chars: 200, min_sentences: 0.5}}
    sources:
      - {name: novels, path: novels.txt.zst, lang: en, licence: public domain, origin: ..., filter: [prose]}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moai_core import paths
from moai_core.data.mix.text import Rules
from moai_core.errors import RecipeError
from moai_core.recipe import layers
from moai_core.recipe.layers import Node, nearest
from moai_core.recipe.schema import _f, fields
from moai_core.recipe.values import convert

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Filter:
    """What units of text must look like. A unit is a document, a block or a line; `line_*` and drop_lines cut lines out
    of text and leave chats alone."""

    min_chars: int = _f(1, "fewest characters of a unit", min=1)
    max_chars: int | None = _f(None, "most characters of a unit", min=1)
    min_letters: float = _f(0.0, "share of letters among the characters other than space", min=0, max=1)
    max_digits: float = _f(1.0, "share of digits among them", min=0, max=1)
    min_script: float = _f(0.0, "share of the language's own script among the letters (en, ko, ja, zh)", min=0, max=1)
    min_sentences: float = _f(0.0, "share of the text in lines that end like a sentence", min=0, max=1)
    max_repeats: float = _f(1.0, "share of the text in lines that stood before in the same unit", min=0, max=1)
    line_min_chars: int = _f(0, "shorter lines are cut", min=0)
    line_min_letters: float = _f(0.0, "lines with a smaller share of letters are cut", min=0, max=1)
    line_sentences: bool = _f(False, "lines that don't end like a sentence are cut")
    repeated_lines: int | None = _f(None, "a line of 20 letters or more is kept so many times in the source", min=1)
    drop: tuple[str, ...] = _f((), "regular expressions: units that hold one are dropped")
    drop_lines: tuple[str, ...] = _f((), "regular expressions: lines that hold one are cut")


@dataclass(frozen=True)
class MixSource:
    """One source of the mix. `licence`, `origin` and `attribution` go into ATTRIBUTION.md."""

    name: str = _f(dataclasses.MISSING, "what records of it carry as `source`")
    path: str = _f(
        dataclasses.MISSING, "file, folder or glob below the root, else of the packaged corpus/; or hf://dataset"
    )
    lang: str = _f(dataclasses.MISSING, "language: en, ko, ja, zh, code, …")
    licence: str = _f(dataclasses.MISSING, "licence of the text")
    origin: str = _f(dataclasses.MISSING, "where it comes from: address, or package and version")
    attribution: str = _f("", "whom to name")
    kind: str = _f("", "what it is, in a few words")
    group: str | None = _f(None, "output file it goes into: train-GROUP…; null: the language")
    slice: tuple[int, int] | None = _f(None, "first byte and bytes of the (unpacked) file to read; null: all", min=0)
    sha256: str | None = _f(None, "what these bytes must hash to, checked at every build")
    split: Literal["file", "blocks", "lines"] = _f(
        "file", "text files: one document a file, one between blank lines, or one a line"
    )
    blank_lines: int = _f(1, "blank lines that part two blocks", min=1, max=16)
    format: str = _f("auto", "records: kind, as data.format of a training recipe")
    filter: tuple[str, ...] = _f((), "names of filters; a later one's values win, its expressions are added")
    section_chars: int | None = _f(None, "longer text is cut into sections of so many characters", min=100)
    join_chars: int | None = _f(None, "units are joined, a line each, until they have so many characters", min=1)
    shuffle: bool = _f(False, "take units in a random order (of lists whose neighbours are alike)")
    near: float | None = _f(None, "null: the mix's near", above=0, max=1)
    weight: float = _f(1.0, "times each unit appears in training; a fraction is a random share", above=0, max=100)
    max_bytes: int | None = _f(None, "take a random part of so many bytes", min=1)
    valid: float | None = _f(None, "null: the mix's valid", min=0, max=1)
    calib: float | None = _f(None, "null: the mix's calib", min=0, max=1)
    where: Mapping[str, str] = dataclasses.field(
        default_factory=dict, metadata={"help": "records: keys and the value each must have"}
    )
    columns: Mapping[str, str] = dataclasses.field(
        default_factory=dict, metadata={"help": "records: which key holds `text`, or `user` and `assistant`"}
    )
    rules: Rules = dataclasses.field(default_factory=Rules)
    place: str = ""


@dataclass(frozen=True)
class Mix:
    """A resolved data recipe."""

    name: str
    sources: tuple[MixSource, ...]
    description: str = _f("", "one line")
    seed: int = _f(0, "seed of held-out parts, random parts and orders", min=0, max=2**63 - 1)
    near: float = _f(0.8, "similarity (Jaccard) from which the later of two units is dropped; 1: only equal ones",
                     above=0, max=1)  # fmt: skip
    valid: float = _f(0.0, "share of units held out for validation", min=0, max=1)
    calib: float = _f(0.0, "share of units held out for calibration", min=0, max=1)
    on_error: Literal["stop", "skip"] = _f("stop", "a bad line stops with file:line, or is skipped and counted")
    against: tuple[str, ...] = _f((), "files (relative to the root) of held-out text: what is near to it is removed")


def load(file: Path) -> Mix:
    """The data recipe in `file`. Raises RecipeError for its first error, the hint counting the others."""
    mix, errors = check(file)
    if mix is None:
        more = f"{len(errors) - 1} more: `moai data check` lists all" if len(errors) > 1 else None
        raise RecipeError(errors[0].message, hint=errors[0].hint or more)
    return mix


def find(name_or_path: str | Path) -> Path:
    """The file of a data recipe: a path, or the name of a packaged one (recipes/data). RecipeError if there is none."""
    given = Path(name_or_path).expanduser()
    packaged = paths.RECIPES / "data" / f"{name_or_path}.yaml"
    if given.is_file():
        return given
    if given.suffix not in (".yaml", ".yml") and len(given.parts) == 1 and packaged.is_file():
        return packaged
    known = sorted(path.stem for path in (paths.RECIPES / "data").glob("*.yaml"))
    hint = f"packaged: {', '.join(known)}; or the path of a YAML file"
    raise RecipeError(f"no data recipe {str(name_or_path)[:80]!r}{nearest(str(name_or_path), known)}", hint=hint)


def check(file: Path) -> tuple[Mix | None, list[RecipeError]]:
    """Like `load`, with all errors."""
    root: dict[str, Node] = {}
    errors: list[RecipeError] = []
    try:
        for layer in layers.from_file(file):
            root |= layer.root
    except RecipeError as exc:
        return None, [exc]
    known = {key: spec for key, spec in fields(Mix).items() if key not in ("name", "sources")}
    values: dict[str, Any] = {}
    for key, node in root.items():
        if key in known:
            values[key] = convert(known[key][1], node, known[key][0].metadata, key, errors)
        elif key not in ("filters", "sources"):
            names = [*known, "filters", "sources"]
            errors.append(RecipeError(f"{node.origin}: unknown key {key[:80]!r}{nearest(key, names)}"))
    filters = _filters(root.get("filters"), errors)
    sources = _sources(root.get("sources"), filters, str(file), errors)
    mix = None if errors else Mix(file.stem, tuple(sources), **values)
    for source in sources if mix is not None else ():
        held = sum(getattr(mix, part) if (own := getattr(source, part)) is None else own for part in ("valid", "calib"))
        if held > 1:
            errors.append(RecipeError(f"{source.place}: valid and calib of {source.name} are more than all of it"))
    return (None if errors else mix), errors


def _mapping(node: Node | None, what: str, errors: list[RecipeError]) -> dict[str, Node]:
    if node is None or node.null:
        return {}
    if isinstance(node.value, dict):
        return node.value
    errors.append(RecipeError(f"{node.origin}: {what} must be a mapping (got {node.shown()})"))
    return {}


def _filters(node: Node | None, errors: list[RecipeError]) -> dict[str, dict[str, Any]]:
    """name -> {field of Rules: value} of what each filter sets, expressions compiled."""
    known = fields(Filter)
    made: dict[str, dict[str, Any]] = {}
    for name, one in _mapping(node, "filters", errors).items():
        rules: dict[str, Any] = {}
        made[name] = rules
        for key, entry in _mapping(one, f"filters.{name}", errors).items():
            where = f"filters.{name}.{key}"
            if key == "replace":
                pairs = _mapping(entry, where, errors).items()
                rules[key] = tuple((_compiled(p, n, where, errors), str(n.value)) for p, n in pairs)
            elif key not in known:
                names = [*known, "replace"]
                errors.append(RecipeError(f"{entry.origin}: unknown key {where[:80]!r}{nearest(key, names)}"))
            else:
                value = convert(known[key][1], entry, known[key][0].metadata, where, errors)
                if key in ("drop", "drop_lines"):
                    value = tuple(_compiled(pattern, entry, where, errors) for pattern in value or ())
                rules[key] = value
    return made


def _compiled(pattern: str, node: Node, where: str, errors: list[RecipeError]) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.MULTILINE)
    except (re.error, RecursionError, OverflowError) as exc:
        errors.append(RecipeError(f"{node.origin}: {where}: not a regular expression: {exc} ({pattern[:60]!r})"))
        return re.compile("")


def _sources(
    node: Node | None, filters: Mapping[str, dict[str, Any]], file: str, errors: list[RecipeError]
) -> list[MixSource]:
    if node is None or not isinstance(node.value, list) or not node.value:
        where = node.origin if node is not None else f"{file}:1"
        errors.append(RecipeError(f"{where}: sources must be a list of what the mix is made of"))
        return []
    made: list[MixSource] = []
    seen: dict[str, str] = {}
    for number, entry in enumerate(node.value):
        before = len(errors)
        source = _source(entry, f"sources[{number}]", filters, errors)
        if source is not None and len(errors) == before:
            if source.name in seen:
                errors.append(RecipeError(f"{entry.origin}: name {source.name!r} is taken (at {seen[source.name]})"))
            seen[source.name] = source.place
            made.append(source)
    return made


def _source(
    node: Node, where: str, filters: Mapping[str, dict[str, Any]], errors: list[RecipeError]
) -> MixSource | None:
    known = {key: spec for key, spec in fields(MixSource).items() if key not in ("rules", "place")}
    values: dict[str, Any] = {"where": {}, "columns": {}}
    inside = _mapping(node, where, errors)
    for key, entry in inside.items():
        if key not in known:
            errors.append(RecipeError(f"{entry.origin}: unknown key {f'{where}.{key}'[:80]!r}{nearest(key, known)}"))
        elif key in ("where", "columns"):
            values[key] = {k: str(v.value) for k, v in _mapping(entry, f"{where}.{key}", errors).items()}
        else:
            values[key] = convert(known[key][1], entry, known[key][0].metadata, f"{where}.{key}", errors)
    for key in ("name", "path", "lang", "licence", "origin"):
        if inside and not values.get(key):
            errors.append(RecipeError(f"{node.origin}: {where} has no {key}"))
    for key in ("name", "lang", "group"):
        if values.get(key) and not _NAME.fullmatch(values[key]):
            why = f"must be letters, digits, . _ or - (got {values[key][:40]!r})"
            errors.append(RecipeError(f"{inside[key].origin}: {where}.{key} {why}"))
    for name, want in values["columns"].items():
        if want not in ("text", "user", "assistant", "system"):
            why = f"{where}.columns.{name} must be text, user, assistant or system (got {want!r})"
            errors.append(RecipeError(f"{inside['columns'].origin}: {why}"))
    rules: dict[str, Any] = {}
    for name in values.get("filter") or ():
        if name not in filters:
            errors.append(RecipeError(f"{inside['filter'].origin}: no filter {name!r}{nearest(name, filters)}"))
        for key, value in filters.get(name, {}).items():
            rules[key] = (*rules.get(key, ()), *value) if isinstance(value, tuple) else value
    missing = any(not values.get(key) for key in ("name", "path", "lang", "licence", "origin"))
    if missing or any(value is None and key in ("filter", "split") for key, value in values.items()):
        return None
    return MixSource(**values, rules=Rules(**rules), place=str(node.origin))
