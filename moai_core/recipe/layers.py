"""From a YAML file, `key=value` overrides or a stored dict to trees of raw values that remember where they stood.

A `Node` holds a scalar as text (typed later, by the field that takes it), a list of nodes or a dict of nodes. What
YAML allows and recipes don't (custom tags, merge keys, several documents, duplicate keys, aliases that explode) is
refused here, within limits that keep any file cheap to refuse. Source: YAML 1.2.2 (https://yaml.org/spec/1.2.2/),
PyYAML's composer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moai_core import paths
from moai_core.errors import RecipeError

MAX_BYTES, MAX_DEPTH, MAX_VALUES, MAX_FILES = 256 * 1024, 16, 10_000, 64
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map")
}


@dataclass(frozen=True)
class Origin:
    """Where a value was set: a file and line, an override, or a stored recipe. `str()` is how errors begin."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A raw value. `plain` marks an unquoted scalar, whose text may stand for null, a number or a truth value; `base`
    is what relative paths start from."""

    value: Any
    origin: Origin
    base: Path | None
    plain: bool = False

    @property
    def null(self) -> bool:
        """Whether this says null."""
        return self.value is None or (self.plain and self.value in ("", "~", "null", "Null", "NULL"))

    def shown(self) -> str:
        """The value for an error message, short."""
        if isinstance(self.value, (list, dict)):
            return "a list" if isinstance(self.value, list) else "a mapping"
        bare = self.plain and all(c in "0123456789.+-_eE" for c in self.value)
        text = "null" if self.null else self.value if bare else repr(self.value)
        return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class Layer:
    """A mapping of raw values to put over earlier layers, after taking away the `deleted` paths."""

    root: dict[str, Node]
    deleted: list[tuple[str, ...]]


def from_file(file: Path, _stack: tuple[Path, ...] = (), _count: list[int] | None = None) -> Iterator[Layer]:
    """The layers of a recipe file, those of its `extends` first. Raises RecipeError naming file and line."""
    count = _count if _count is not None else [0]
    count[0] += 1
    root = dict(parse(_text(file), Origin(_short(file), 1), file.parent.absolute()))
    bases = root.pop("extends", None)
    if bases is not None and not bases.null:
        for entry in bases.value if isinstance(bases.value, list) else [bases]:
            base = _base(entry, file)
            if base in (*_stack, file):
                chain = " -> ".join(_short(p) for p in (*_stack, file, base))
                raise RecipeError(f"{entry.origin}: extends goes in a circle: {chain}")
            if count[0] >= MAX_FILES:
                raise RecipeError(f"{entry.origin}: extends reaches more than {MAX_FILES} files")
            yield from from_file(base, (*_stack, file), count)
    yield Layer(root, [])


def from_overrides(texts: list[str], base: Path) -> Iterator[Layer | RecipeError]:
    """One layer of `key=value` and `~key`, in their order; a RecipeError for each that can't be read."""
    layer = Layer({}, [])
    for text in texts:
        origin = Origin(f"override {text!r}")
        key, equals, value = text.removeprefix("~").partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if text.startswith("~") == bool(equals) or not all(path) or len(path) > 2:
            yield RecipeError(f"{origin}: write key=value or ~key", hint="for example optim.lr=8e-5 or ~data.valid")
            continue
        try:
            if equals:
                _put(layer.root, path, _inline(value, origin, base), origin, base)
            else:
                layer.deleted.append(path)
                _drop(layer.root, path)
        except RecipeError as exc:
            yield exc
    yield layer


def from_object(value: Any, origin: Origin) -> Node:
    """A stored JSON-like value as a node."""
    if isinstance(value, Mapping):
        return Node({str(k): from_object(v, origin) for k, v in value.items()}, origin, None)
    if isinstance(value, (list, tuple)):
        return Node([from_object(v, origin) for v in value], origin, None)
    return Node(value, origin, None)


def parse(text: str, origin: Origin, base: Path) -> dict[str, Node]:
    """The mapping that a YAML text holds."""
    node = _parse(text, origin, base)
    if node is None or node.null:
        raise RecipeError(f"{origin}: the recipe is empty", hint="start from a copy: moai recipes cp cpu-tiny .")
    if not isinstance(node.value, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of keys to values (got {node.shown()})")
    return node.value


def _short(file: Path) -> str:
    """The path as an error shows it: as given, packaged recipes by their place in `recipes/`."""
    return f"recipes/{file.relative_to(paths.RECIPES)}" if file.is_relative_to(paths.RECIPES) else str(file)


def _text(file: Path) -> str:
    try:
        data = file.read_bytes() if file.stat().st_size <= MAX_BYTES else None
    except OSError as exc:
        raise RecipeError(f"{file}: can't read the recipe: {exc.strerror or exc}") from exc
    if data is None:
        raise RecipeError(f"{file}: too large for a recipe (over {MAX_BYTES // 1024} KB)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        why = f"not UTF-8 (byte 0x{data[exc.start]:02x})"
        raise RecipeError(f"{_short(file)}:{line}: {why}", hint="save the file as UTF-8") from exc


def _base(entry: Node, file: Path) -> Path:
    """The file that an `extends` entry names: relative to the recipe's folder, then among the packaged recipes."""
    if not isinstance(entry.value, str) or entry.null:
        raise RecipeError(f"{entry.origin}: extends must be a name or a list of names (got {entry.shown()})")
    name = entry.value if entry.value.endswith((".yaml", ".yml")) else entry.value + ".yaml"
    try:
        for folder in (file.parent, paths.RECIPES):
            if (folder / name).is_file():
                return (folder / name).resolve()
    except (OSError, ValueError):
        pass  # A name no file system takes is a name that isn't there.
    known = sorted(str(p.relative_to(paths.RECIPES).with_suffix("")) for p in paths.RECIPES.rglob("*.yaml"))
    raise RecipeError(
        f"{entry.origin}: extends {entry.shown()}: no such recipe{nearest(entry.value, known)}",
        hint=f"packaged: {', '.join(known)}",
    )


def nearest(word: str, known: Any) -> str:
    """`; did you mean X?` or nothing."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


class _Loader(yaml.SafeLoader):
    """SafeLoader's scanner, parser and composer with a limit on depth; nothing is ever constructed."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {MAX_DEPTH}", self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _parse(text: str, origin: Origin, base: Path) -> Node | None:
    def at(line: int) -> Origin:
        return origin if origin.line is None else Origin(origin.file, line)

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        why = exc.problem or exc.context or "not valid YAML"
        why = "a tab can't stand here; indent with spaces" if "'\\t'" in why else why
        raise RecipeError(f"{at(mark.line + 1 if mark else 1)}: {why}") from exc
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise RecipeError(f"{at(line)}: character U+{ord(text[exc.position]):04X} isn't allowed in YAML") from exc
    except (ValueError, OverflowError) as exc:
        raise RecipeError(f"{at(1)}: not valid YAML: {exc}") from exc
    return None if node is None else _Tree(at, base).node(node, node.start_mark.line + 1, 0)


class _Tree:
    """Turns PyYAML's node graph into a tree of `Node`s, within MAX_VALUES and MAX_DEPTH (aliases may repeat and nest
    without end)."""

    def __init__(self, at: Any, base: Path) -> None:
        self.at, self.base, self.left = at, base, MAX_VALUES

    def node(self, raw: yaml.Node, line: int, depth: int) -> Node:
        where = self.at(line)
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            raise RecipeError(
                f"{where}: too many or too deep values (limits {MAX_VALUES} and {MAX_DEPTH}; repeated aliases?)"
            )
        if raw.tag not in _TAGS:
            raise RecipeError(f"{where}: tag {raw.tag!r} isn't allowed in a recipe")
        if isinstance(raw, yaml.ScalarNode):
            if any("\ud800" <= c <= "\udfff" for c in raw.value):
                raise RecipeError(f"{where}: half a surrogate pair is no character")
            return Node(raw.value, where, self.base, plain=raw.style is None)
        if isinstance(raw, yaml.SequenceNode):
            return Node([self.node(one, one.start_mark.line + 1, depth + 1) for one in raw.value], where, self.base)
        found: dict[str, Node] = {}
        for key, value in raw.value:
            line = key.start_mark.line + 1
            name = self.node(key, line, depth + 1)
            if not isinstance(name.value, str):
                raise RecipeError(f"{name.origin}: a key must be a word (got {name.shown()})")
            if name.value == "<<":
                raise RecipeError(f"{name.origin}: merge keys (<<) aren't supported", hint="use extends")
            if name.value in found:
                raise RecipeError(f"{name.origin}: duplicate key {name.value!r} (first at {found[name.value].origin})")
            found[name.value] = self.node(value, line, depth + 1)
        return Node(found, where, self.base)


def _inline(value: str, origin: Origin, base: Path) -> Node:
    """The value of an override: YAML when it looks like a list, mapping or quoted text, else the text as it stands."""
    text = value.strip()
    if text.startswith(("[", "{", '"', "'")):
        node = _parse(text, origin, base)
        assert node is not None
        return node
    return Node(text, origin, base, plain=True)


def _put(root: dict[str, Node], path: tuple[str, ...], node: Node, origin: Origin, base: Path) -> None:
    *sections, key = path
    for name in sections:
        inside = root.get(name)
        if inside is None or not isinstance(inside.value, dict):
            inside = root[name] = Node({}, origin, base)
        root = inside.value
    root[key] = node


def _drop(root: dict[str, Node], path: tuple[str, ...]) -> None:
    *sections, key = path
    for name in sections:
        inside = root.get(name)
        root = inside.value if inside is not None and isinstance(inside.value, dict) else {}
    root.pop(key, None)
