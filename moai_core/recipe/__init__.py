"""Recipes: what to train, on what, how. A YAML file with `extends`, strict keys, and errors that name file and line.

Each file becomes a layer of raw values that remember where they stood (layers.py); `extends` puts a file's bases
below it and `key=value` overrides go on top: later wins, a list is replaced whole. Then every value is checked
against the schema (schema.py). Plain scalars are typed by the field that takes them, not by YAML 1.1's guesses:
`1e-4` is a number for `lr`, `no` stays a word, `12:30` is no integer.

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
    Train,
    describe,
    fields,
    items,
    plain,
)
from moai_core.recipe.values import convert, convert_section, path_of

__all__ = [
    "Data",
    "Hardware",
    "Model",
    "Optim",
    "Origin",
    "Recipe",
    "Source",
    "Train",
    "annotate",
    "check",
    "find",
    "load",
    "names",
    "schema",
]

# Pairs of which at most one counts. Setting one in a later layer takes the inherited other away: `train.steps=10` on
# a recipe with epochs is no conflict.
_EITHER = (("train", "steps", "epochs"), ("train", "accumulation", "effective_batch"))


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe; equal when all values are equal, wherever they came from."""

    name: str = dataclasses.field(default="recipe", metadata={"help": "name of its runs; default: the file's"})
    description: str = dataclasses.field(default="", metadata={"help": "one line for `moai recipes ls`"})
    model: Model = dataclasses.field(default_factory=Model)
    tokenizer: str | None = dataclasses.field(
        default="moai_tiny",
        metadata={"help": "name of a packaged tokenizer, or the folder of one, of a model or of a run"},
    )
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = dataclasses.field(
        default=(), metadata={"help": "trackers to report to"}
    )
    hardware: Hardware = dataclasses.field(default_factory=Hardware)
    output: str = dataclasses.field(
        default="", metadata={"help": "run folder; default: runs/NAME in the current folder"}
    )
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
        """`recipe.error("optim.lr", "must be > 0 (got -1)")`: an error that names the file and line, or the override,
        that set the key."""
        where = self.origin(key)
        return RecipeError(f"{where}: {key} {why}" if where else f"{key} {why}", hint=hint)

    def require(self, *keys: str) -> None:
        """Raises RecipeError for the first of `keys` that is null; for what a plan can do without and a training run
        can't."""
        for key in keys:
            value: Any = self
            for part in key.split("."):
                value = getattr(value, part)
            if value is None:
                raise RecipeError(f"{key} is not set", hint=f"moai train --recipe {self.name} {key}=PATH")

    def accumulation(self, devices: int = 1) -> int:
        """Micro-batches a step on so many devices. RecipeError when effective_batch is no multiple of a micro-batch
        over all devices."""
        rows, total = self.train.batch_size * devices, self.train.effective_batch
        if total is None:
            return self.train.accumulation
        if total % rows:
            product = f"batch_size * devices = {self.train.batch_size} * {devices} = {rows}"
            raise self.error("train.effective_batch", f"must be a multiple of {product} (got {total})")
        return total // rows


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a packaged name (`a100-2b`) or a file, with `key=value` and `~key` overrides on top.

    Data paths start from the file's folder, those of an override from the current folder, as `output` always does.
    current folder. Raises RecipeError that begins with `file:line:` or `override '...':`.
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
            raise RecipeError(
                f"{text}: is a folder, not a recipe",
                hint=f"try {inside}" if inside.is_file() else "name a YAML file in it",
            )
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
    """Lines of YAML that load to the same recipe, with a comment that says where each value comes from; nulls by
    default only on request."""
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
    bare = (
        [{k: v for k, v in one.items() if v is not None} for one in plain(value)]
        if _is_mixture(value)
        else plain(value)
    )
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
    sections = {key: fields(typing.cast(type, kind)) for key, kind in top.items() if dataclasses.is_dataclass(kind)}
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
            values[key] = convert_section(kind, key, inside, errors)
        elif (key,) in merged:
            values[key] = convert(kind, merged[key,], {}, key, errors)
    if errors:
        return None, errors
    values["name"] = values.get("name") or name
    values["output"] = values.get("output") or os.path.join("runs", values["name"])
    origins = {path: node.origin for path, node in merged.items()}
    recipe = Recipe(**{**values, "tokenizer": _tokenizer(values, merged.get(("tokenizer",)))}, origins=origins)
    empty = [node.origin for layer in stack for key, node in layer.root.items() if key in sections]
    errors = list(_contradictions(recipe, [*origins.values(), *empty]))
    return (None if errors else recipe), errors


def _flatten(
    layer: Layer, sections: Mapping[str, Any], known: set[str], errors: list[RecipeError]
) -> Iterator[tuple[tuple[str, ...], Node]]:
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
    return RecipeError(
        f"{origin}: unknown key {key[:80]!r}"
        + (f"; did you mean {same[0]}?" if same else nearest(key[:80], sorted(known)))
    )


def _tokenizer(values: Mapping[str, Any], node: Node | None) -> str | None:
    """A packaged name stays a name; anything else that has a separator or exists beside the recipe is a path from
    there."""
    text = values.get("tokenizer", "moai_tiny")
    if node is None or node.base is None or text is None:
        return text
    if "/" in text or os.sep in text or text.startswith((".", "~")):
        return path_of(text, node)
    beside = os.path.join(node.base, text)
    return beside if not os.path.isdir(paths.TOKENIZERS / text) and os.path.isdir(beside) else text


def _contradictions(recipe: Recipe, places: list[Origin]) -> Iterator[RecipeError]:
    """What no single value shows. places: of all that was set, and of sections, which may be empty."""
    steps, epochs = recipe.train.steps, recipe.train.epochs
    if steps is None and epochs is None:
        where = next((place for place in places if place.line is not None), next(iter(places), Origin("recipe")))
        yield RecipeError(f"{where}: train.steps or train.epochs must be set", hint="for example train.epochs=1")
    elif steps is not None and epochs is not None:
        yield recipe.error("train.epochs", "and train.steps are both set; keep one")
    if recipe.train.effective_batch is not None and recipe.train.accumulation != 1:
        yield recipe.error("train.accumulation", "and train.effective_batch are both set; keep one")
    if recipe.train.checkpointing_layers is not None and recipe.train.checkpointing == "none":
        hint = "train.checkpointing=selective or full, or train.checkpointing_layers=null"
        yield recipe.error("train.checkpointing_layers", "changes nothing with train.checkpointing=none", hint=hint)
    if recipe.optim.in_backward:
        yield from _not_in_backward(recipe)
    try:
        layers = recipe.model.numbers()["num_hidden_layers"]
        if (wanted := recipe.train.checkpointing_layers or 0) > layers:
            why = f"can't be more than the model's {layers} layers (got {wanted})"
            yield recipe.error("train.checkpointing_layers", why)
    except UsageError as exc:
        field = re.match(r"model field (\w+) (.*)", exc.message)
        yield (
            recipe.error(f"model.{field[1]}", field[2], hint=exc.hint)
            if field
            else RecipeError(exc.message, hint=exc.hint)
        )
    if os.sep in recipe.name or "\0" in recipe.name or recipe.name in (".", ".."):
        yield recipe.error("name", f"must be usable as a folder's name (got {recipe.name!r})")
    elif "\0" in recipe.output or "\0" in (recipe.tokenizer or ""):
        yield recipe.error("output" if "\0" in recipe.output else "tokenizer", "must not contain a NUL character")


def _not_in_backward(recipe: Recipe) -> Iterator[RecipeError]:
    """What keeps an update from being done before all gradients are known, as far as a recipe shows it."""
    if recipe.optim.clip is not None:
        why = "updates before the norm of all gradients is known, which optim.clip needs"
        yield recipe.error("optim.in_backward", why, hint="optim.clip=null")
    t, count = recipe.train, recipe.hardware.count
    micro = max(t.accumulation, (t.effective_batch or 0) // (t.batch_size * count))
    if micro > 1:
        why = f"updates from the gradients of one micro-batch (a step has {micro})"
        yield recipe.error(
            "optim.in_backward", why, hint=f"train.effective_batch={t.batch_size * count}, or a larger train.batch_size"
        )
    if count > 1:
        why = f"updates from the gradients of one device (hardware.count is {count})"
        yield recipe.error("optim.in_backward", why)
    if recipe.optim.name == "adamw_8bit":
        yield recipe.error("optim.in_backward", "doesn't go with optim.name=adamw_8bit", hint="optim.name=adamw_bf16")
