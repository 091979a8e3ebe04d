"""From raw nodes to typed values: one function a kind of field, the range checks, and paths made absolute."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from moai_core import paths
from moai_core.errors import RecipeError
from moai_core.recipe.layers import Node, nearest
from moai_core.recipe.schema import Source, Sources, alternatives, describe, fields


def convert_section(kind: Any, key: str, inside: Mapping[str, Node], errors: list[RecipeError]) -> Any:
    """A section's dataclass from its raw values; what is wrong goes to `errors` and leaves the default."""
    values = {}
    for sub, (spec, sub_kind) in fields(kind).items():
        if sub in inside:
            before = len(errors)
            value = convert(sub_kind, inside[sub], spec.metadata, f"{key}.{sub}", errors)
            if len(errors) == before:
                values[sub] = value
    return kind(**values)


def convert(kind: Any, node: Node, limits: Mapping[str, Any], key: str, errors: list[RecipeError]) -> Any:
    """The value of a node as `kind`, a type of the schema, within `limits`; None where it is wrong, which goes to
    `errors`."""
    try:
        return _typed(kind, node, limits, key)
    except RecipeError as exc:
        errors.append(exc)
    except ValueError:
        errors.append(RecipeError(f"{node.origin}: {key} must be {describe(kind, limits)} (got {node.shown()})"))
    return None


def _typed(kind: Any, node: Node, limits: Mapping[str, Any], key: str) -> Any:
    """The typed value of a node. ValueError when it isn't of the type or range; RecipeError for what stands deeper
    inside a list."""
    options = alternatives(kind)
    if type(None) in options and node.null:
        return None
    options = tuple(one for one in options if one is not type(None))
    if len(options) > 1:
        for one in options:
            try:
                return _typed(one, node, limits, key)
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
    if limits.get("named") and isinstance(node.value, dict) and node.value and not {*node.value} & {*fields(Source)}:
        return tuple(one for name, entry in node.value.items() for one in _named(name, entry, limits, key))
    entries = node.value if isinstance(node.value, list) else [node] if variable else []
    if (not variable and len(entries) != len(inner)) or (kind == Sources and not entries):
        raise ValueError
    found = []
    for n, entry in enumerate(entries):
        errors: list[RecipeError] = []
        found.append(convert(inner[0], entry, limits, f"{key}[{n}]" if entry is not node else key, errors))
        if errors:
            raise errors[0]
    return tuple(found)


def _named(name: str, node: Node, limits: Mapping[str, Any], key: str) -> tuple[Source, ...]:
    """The sources under one name of a mapping."""
    found = _typed(Sources, node, limits, f"{key}.{name}")
    if any(one.name is not None for one in found):
        raise RecipeError(f"{node.origin}: {key}.{name} holds names of its own", hint="names stand once, as keys")
    return tuple(dataclasses.replace(one, name=name) for one in found)


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
    values = {
        name: convert(known[name][1], entry, known[name][0].metadata, f"{key}.{name}", errors)
        for name, entry in node.value.items()
    }
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
    if node.plain and re.fullmatch(
        r"[-+]?([0-9][0-9_]{0,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][-+]?[0-9]{1,4})?", value
    ):
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError
    return _within(float(value), limits)


def _within(value: float, limits: Mapping[str, Any]) -> float:
    low, above, high, below = (limits.get(key) for key in ("min", "above", "max", "below"))
    if (low is not None and value < low) or (above is not None and value <= above):
        raise ValueError
    if (high is not None and value > high) or (below is not None and value >= below):
        raise ValueError
    return value


def _str(node: Node, limits: Mapping[str, Any]) -> str:
    if not isinstance(node.value, str) or node.null:
        raise ValueError
    return path_of(node.value, node) if limits.get("path") else node.value


def path_of(text: str, node: Node) -> str:
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
