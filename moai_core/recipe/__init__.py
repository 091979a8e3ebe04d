"""Recipes: what to train, on what, how. A YAML file with `extends`, strict keys, and errors that name file and line.

Each file becomes a layer of raw values that remember where they stood (layers.py); `extends` puts a file's bases below it and `key=value` overrides go
on top: later wins, a list is replaced whole. Then every value is checked against the schema (schema.py). Plain scalars are typed by the field that takes
them, not by YAML 1.1's guesses: `1e-4` is a number for `lr`, `no` stays a word, `12:30` is no integer.

Left out on purpose: interpolation, templates, merge keys, custom tags and dotted imports.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from moai_core import paths
from moai_core.errors import RecipeError, UsageError
from moai_core.recipe import layers
from moai_core.recipe.layers import Layer, Node, Origin, nearest
from moai_core.recipe.schema import (
    Data,
    Hardware,
    Model,
    Optim,
    Source,
    Sources,
    Train,
    alternatives,
    describe,
    fields,
    items,
    plain,
)

__all__ = ["Data", "Hardware", "Model", "Optim", "Origin", "Recipe", "Source", "Train", "annotate", "check", "find", "load", "names", "schema"]

# Pairs of which at most one counts. Setting one in a later layer takes the inherited other away: `train.steps=10` on a recipe with epochs is no conflict.
_EITHER = (("train", "steps", "epochs"), ("train", "accumulation", "effective_batch"))


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe; equal when all values are equal, wherever they came from."""

    name: str = dataclasses.field(default="recipe", metadata={"help": "name of its runs; default: the file's"})
    description: str = dataclasses.field(default="", metadata={"help": "one line for `moai recipes ls`"})
    model: Model = dataclasses.field(default_factory=Model)
    tokenizer: str | None = dataclasses.field(default="moai_tiny", metadata={"help": "name of a packaged tokenizer, or its folder"})
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = dataclasses.field(default=(), metadata={"help": "trackers to report to"})
    hardware: Hardware = dataclasses.field(default_factory=Hardware)
    output: str = dataclasses.field(default="", metadata={"help": "run folder; default: runs/NAME in the current folder"})
    origins: Mapping[tuple[str, ...], Origin] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, source: str = "stored recipe") -> Recipe:
        """The recipe that `to_dict` gave. Strict: RecipeError for anything unknown or out of range."""
        root = layers.from_object(values, Origin(source))
        if not isinstance(root.value, dict):
            raise RecipeError(f"{source}: a recipe is a mapping of keys to values (got {root.shown()})")
        return _only(*_resolve([Layer(root.value, [])], "recipe"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, defaults included; `from_dict` inverts it."""
        return {name: plain(value) for name, value in items(self) if name != "origins"}

    def to_yaml(self) -> str:
        """YAML that loads to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def origin(self, key: str) -> Origin | None:
        """Where the value of a dotted key was set; None for a default."""
        path = tuple(key.split("."))
        return next((self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins), None)

    def error(self, key: str, why: str, *, hint: str | None = None) -> RecipeError:
        """`recipe.error("optim.lr", "must be > 0 (got -1)")`: an error that names the file and line, or the override, that set the key."""
        where = self.origin(key)
        return RecipeError(f"{where}: {key} {why}" if where else f"{key} {why}", hint=hint)

    def require(self, *keys: str) -> None:
        """Raises RecipeError for the first of `keys` that is null; for what a plan can do without and a training run can't."""
        for key in keys:
            value: Any = self
            for part in key.split("."):
                value = getattr(value, part)
            if value is None:
                raise RecipeError(f"{key} is not set", hint=f"moai train --recipe {self.name} {key}=PATH")

    def accumulation(self, devices: int = 1) -> int:
        """Micro-batches a step on so many devices. RecipeError when effective_batch is no multiple of a micro-batch over all devices."""
        rows, total = self.train.batch_size * devices, self.train.effective_batch
        if total is None:
            return self.train.accumulation
        if total % rows:
            why = f"must be a multiple of batch_size * devices = {self.train.batch_size} * {devices} = {rows} (got {total})"
            raise self.error("train.effective_batch", why)
        return total // rows


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a packaged name (`a100-2b`) or a file, with `key=value` and `~key` overrides on top.

    Relative data paths start from the file's folder, in an override from the current folder; `output` always from the current folder.
    Raises RecipeError that begins with `file:line:` or `override '...':`.
    """
    return _only(*check(name_or_path, overrides))


def check(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[RecipeError]]:
    """Like `load`, but gives all errors instead of raising the first; the recipe is None when there are any."""
    try:
        file = find(name_or_path)
        stack = list(layers.from_file(file))
    except RecipeError as exc:
        return None, [exc]
    errors: list[RecipeError] = []
    for one in layers.from_overrides(list(overrides), Path.cwd()):
        if isinstance(one, RecipeError):
            errors.append(one)
        else:
            stack.append(one)
    recipe, more = _resolve(stack, file.absolute().parent.name if file.stem == "recipe" else file.stem)
    return (None if errors else recipe), errors + more


def names() -> list[str]:
    """Names of the packaged recipes, without the bases they extend."""
    return sorted(file.stem for file in paths.RECIPES.glob("*.yaml"))


def find(name_or_path: str | Path) -> Path:
    """The file of a recipe given by packaged name or by path. RecipeError with the nearest names when there is none."""
    text = str(name_or_path)
    try:
        here = Path(text).expanduser()
        packaged = paths.RECIPES / f"{text}.yaml"
        if here.suffix not in (".yaml", ".yml") and packaged.is_file():
            return packaged
        if here.is_dir():
            inside = here / "recipe.yaml"
            raise RecipeError(f"{text}: is a folder, not a recipe", hint=f"try {inside}" if inside.is_file() else "name a YAML file in it")
        for file in (here, here.with_name(here.name + ".yaml")):
            if file.exists():
                return file
    except (OSError, ValueError, RuntimeError) as exc:
        raise RecipeError(f"no recipe {text[:80]!r} ({getattr(exc, 'strerror', None) or exc})") from exc
    near = difflib.get_close_matches(text, names(), 3, 0.5)
    known = f"recipes: {', '.join(names())}; or the path of a YAML file"
    raise RecipeError(f"no recipe {text[:80]!r}", hint=f"did you mean {' or '.join(near)}?" if near else known)


def schema() -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type in words, default, help) of every field, sections first without a type."""
    for key, (spec, kind) in fields(Recipe).items():
        if dataclasses.is_dataclass(kind):
            yield key, "", None, (kind.__doc__ or "").strip()
            for sub, (inner, inner_kind) in fields(typing.cast(type, kind)).items():
                yield f"{key}.{sub}", describe(inner_kind, inner.metadata), plain(inner.default), inner.metadata["help"]
        elif key != "origins":
            yield key, describe(kind, spec.metadata), plain(spec.default), spec.metadata["help"]


def annotate(recipe: Recipe, *, everything: bool = False) -> Iterator[str]:
    """Lines of YAML that load to the same recipe, with a comment that says where each value comes from; nulls by default only on request."""
    for key, value in items(recipe):
        if key == "origins":
            continue
        if not dataclasses.is_dataclass(value):
            yield _line("", key, value, recipe.origin(key))
            continue
        inside = [
            _line("  ", sub, inner, recipe.origin(f"{key}.{sub}"))
            for sub, inner in items(value)
            if everything or inner is not None or recipe.origin(f"{key}.{sub}")
        ]
        if inside:
            yield from (f"{key}:", *inside)


def _line(indent: str, key: str, value: Any, origin: Origin | None) -> str:
    bare = [{k: v for k, v in one.items() if v is not None} for one in plain(value)] if _is_mixture(value) else plain(value)
    text = yaml.safe_dump({key: bare}, default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1]
    return f"{indent}{text}".ljust(48) + f"  # {origin or 'default'}"


def _is_mixture(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Source)


def _only(recipe: Recipe | None, errors: list[RecipeError]) -> Recipe:
    if errors:
        first = errors[0]
        rest = f"{len(errors) - 1} more: `moai recipes check` lists all" if len(errors) > 1 else None
        raise RecipeError(first.message, hint=first.hint or rest)
    assert recipe is not None
    return recipe


def _resolve(stack: Sequence[Layer], name: str) -> tuple[Recipe | None, list[RecipeError]]:
    """Merges layers, later over earlier, and checks every value."""
    top = {key: kind for key, (_, kind) in fields(Recipe).items() if key != "origins"}
    sections = {key: fields(kind) for key, kind in top.items() if dataclasses.is_dataclass(kind)}
    known = {*top} - {*sections} | {f"{key}.{sub}" for key, inner in sections.items() for sub in inner}
    errors: list[RecipeError] = []
    merged: dict[tuple[str, ...], Node] = {}
    for layer in stack:
        for path in layer.deleted:
            if ".".join(path) not in known | {*sections}:
                errors.append(_unknown(path, known, Origin(f"override {'~' + '.'.join(path)!r}")))
            for gone in [full for full in merged if full[: len(path)] == path]:
                del merged[gone]
        flat = dict(_flatten(layer, sections, known, errors))
        for section, a, b in _EITHER:
            for one, other in ((a, b), (b, a)):
                if (section, other) not in flat and (section, one) in flat and not flat[section, one].null:
                    merged.pop((section, other), None)
        merged.update(flat)
    values: dict[str, Any] = {}
    for key, kind in top.items():
        if key in sections:
            inside = {sub: node for (head, *rest), node in merged.items() if head == key for sub in rest}
            values[key] = _section(kind, key, inside, errors)
        elif (key,) in merged:
            values[key] = _value(kind, merged[key,], {}, key, errors)
    if errors:
        return None, errors
    values["name"] = values.get("name") or name
    values["output"] = values.get("output") or os.path.join("runs", values["name"])
    origins = {path: node.origin for path, node in merged.items()}
    recipe = Recipe(**{**values, "tokenizer": _tokenizer(values, merged.get(("tokenizer",)))}, origins=origins)
    errors = list(_contradictions(recipe))
    return (None if errors else recipe), errors


def _flatten(layer: Layer, sections: Mapping[str, Any], known: set[str], errors: list[RecipeError]) -> Iterator[tuple[tuple[str, ...], Node]]:
    for key, node in layer.root.items():
        if key in sections:
            if isinstance(node.value, dict):
                for sub, inner in node.value.items():
                    if sub in sections[key]:
                        yield (key, sub), inner
                    else:
                        errors.append(_unknown((key, sub), known, inner.origin))
            elif not node.null:
                errors.append(RecipeError(f"{node.origin}: {key} must be a section of keys (got {node.shown()})"))
        elif key in known:
            yield (key,), node
        else:
            errors.append(_unknown((key,), known | {*sections}, node.origin))


def _unknown(path: tuple[str, ...], known: set[str], origin: Origin) -> RecipeError:
    key = ".".join(path)
    same = [one for one in sorted(known) if one.rpartition(".")[2] == path[-1]]
    return RecipeError(f"{origin}: unknown key {key[:80]!r}" + (f"; did you mean {same[0]}?" if same else nearest(key[:80], sorted(known))))


def _section(kind: Any, key: str, inside: Mapping[str, Node], errors: list[RecipeError]) -> Any:
    """A section's dataclass from its raw values; what is wrong goes to `errors` and leaves the default."""
    values = {}
    for sub, (spec, sub_kind) in fields(kind).items():
        if sub in inside:
            before = len(errors)
            value = _value(sub_kind, inside[sub], spec.metadata, f"{key}.{sub}", errors)
            if len(errors) == before:
                values[sub] = value
    return kind(**values)


def _value(kind: Any, node: Node, limits: Mapping[str, Any], key: str, errors: list[RecipeError]) -> Any:
    try:
        return _convert(kind, node, limits, key)
    except RecipeError as exc:
        errors.append(exc)
    except ValueError:
        errors.append(RecipeError(f"{node.origin}: {key} must be {describe(kind, limits)} (got {node.shown()})"))
    return None


def _convert(kind: Any, node: Node, limits: Mapping[str, Any], key: str) -> Any:
    """The typed value of a node. ValueError when it isn't of the type or range; RecipeError for what stands deeper inside a list."""
    options = alternatives(kind)
    if type(None) in options and node.null:
        return None
    options = tuple(one for one in options if one is not type(None))
    if len(options) > 1:
        for one in options:
            try:
                return _convert(one, node, limits, key)
            except ValueError:
                continue
        raise ValueError
    (one,) = options
    inner = typing.get_args(one)
    if typing.get_origin(one) is tuple:
        return _tuple(one, inner, node, limits, key)
    if one is Source:
        return _source(node, key)
    if typing.get_origin(one) is Literal:
        if isinstance(node.value, str) and node.value in inner:
            return node.value
        raise ValueError
    return _SCALARS[one](node, limits)


def _tuple(kind: Any, inner: tuple[Any, ...], node: Node, limits: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    if node.null:
        raise ValueError
    variable = inner[-1] is Ellipsis
    entries = node.value if isinstance(node.value, list) else [node] if variable else []
    if (not variable and len(entries) != len(inner)) or (kind == Sources and not entries):
        raise ValueError
    found = []
    for n, entry in enumerate(entries):
        errors: list[RecipeError] = []
        found.append(_value(inner[0], entry, limits, f"{key}[{n}]" if entry is not node else key, errors))
        if errors:
            raise errors[0]
    return tuple(found)


def _source(node: Node, key: str) -> Source:
    if not isinstance(node.value, dict):
        node = Node({"path": node}, node.origin, node.base)
    known = fields(Source)
    for name, entry in node.value.items():
        if name not in known:
            raise RecipeError(f"{entry.origin}: unknown key {f'{key}.{name}'[:80]!r}{nearest(name, known)}")
    if "path" not in node.value:
        raise RecipeError(f"{node.origin}: {key} has no path")
    errors: list[RecipeError] = []
    values = {name: _value(known[name][1], entry, known[name][0].metadata, f"{key}.{name}", errors) for name, entry in node.value.items()}
    if errors:
        raise errors[0]
    return Source(**values)


def _bool(node: Node, limits: Mapping[str, Any]) -> bool:
    if isinstance(node.value, bool):
        return node.value
    if node.plain and node.value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return node.value.lower() == "true"
    raise ValueError


def _int(node: Node, limits: Mapping[str, Any]) -> int:
    value = node.value
    if node.plain and re.fullmatch(r"[-+]?[0-9](_?[0-9]){0,30}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return typing.cast(int, _within(value, limits))


def _float(node: Node, limits: Mapping[str, Any]) -> float:
    value = node.value
    if node.plain and re.fullmatch(r"[-+]?([0-9][0-9_]{0,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][-+]?[0-9]{1,4})?", value):
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError
    return _within(float(value), limits)


def _within(value: float, limits: Mapping[str, Any]) -> float:
    if "min" in limits and value < limits["min"] or "max" in limits and value > limits["max"]:
        raise ValueError
    if "above" in limits and value <= limits["above"] or "below" in limits and value >= limits["below"]:
        raise ValueError
    return value


def _str(node: Node, limits: Mapping[str, Any]) -> str:
    if not isinstance(node.value, str) or node.null:
        raise ValueError
    return _path(node.value, node) if limits.get("path") else node.value


def _path(text: str, node: Node) -> str:
    """A path made absolute from where it was written, from a file also among the packaged recipes; hub names stay."""
    if not text or "\0" in text or len(text) > 4096:
        raise ValueError
    home = os.path.expanduser(text)
    if text.startswith("hf://") or node.base is None:
        return home
    beside = os.path.normpath(os.path.join(node.base, home))
    if node.origin.line is not None and not os.path.exists(_fixed(beside)):
        packaged = os.path.normpath(os.path.join(paths.RECIPES, home))
        return packaged if os.path.exists(_fixed(packaged)) else beside
    return beside


def _fixed(path: str) -> str:
    """The part of a path before its first glob character, up to a folder."""
    return path if not re.search(r"[*?[]", path) else os.path.dirname(re.split(r"[*?[]", path, maxsplit=1)[0])


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def _tokenizer(values: Mapping[str, Any], node: Node | None) -> str | None:
    """A packaged name stays a name; anything else that has a separator or exists beside the recipe is a path from there."""
    text = values.get("tokenizer", "moai_tiny")
    if node is None or node.base is None or text is None:
        return text
    if "/" in text or os.sep in text or text.startswith((".", "~")):
        return _path(text, node)
    beside = os.path.join(node.base, text)
    return beside if not os.path.isdir(paths.TOKENIZERS / text) and os.path.isdir(beside) else text


def _contradictions(recipe: Recipe) -> Iterator[RecipeError]:
    """What no single value shows."""
    steps, epochs = recipe.train.steps, recipe.train.epochs
    if steps is None and epochs is None:
        where = recipe.origin("train.batch_size") or next(iter(recipe.origins.values()), Origin("recipe"))
        yield RecipeError(f"{where}: train.steps or train.epochs must be set", hint="for example train.epochs=1")
    elif steps is not None and epochs is not None:
        yield recipe.error("train.epochs", "and train.steps are both set; keep one")
    if recipe.train.effective_batch is not None and recipe.train.accumulation != 1:
        yield recipe.error("train.accumulation", "and train.effective_batch are both set; keep one")
    try:
        recipe.model.numbers()
    except UsageError as exc:
        field = re.match(r"model field (\w+) (.*)", exc.message)
        yield recipe.error(f"model.{field[1]}", field[2], hint=exc.hint) if field else RecipeError(exc.message, hint=exc.hint)
    if os.sep in recipe.name or "\0" in recipe.name or recipe.name in (".", ".."):
        yield recipe.error("name", f"must be usable as a folder's name (got {recipe.name!r})")
    if "\0" in recipe.output or "\0" in (recipe.tokenizer or ""):
        yield recipe.error("output" if "\0" in recipe.output else "tokenizer", "must not contain a NUL character")
