"""Refuses patterns in a tokenizer file that could backtrack without end.

Why: tokenizers runs patterns with Oniguruma, which backtracks and has no time limit, so `(a+)+$` in a downloaded
tokenizer.json hangs the program on the first long word. Two checks: an unbounded repetition inside another one (or an
alternation repeated without bound whose branches begin alike) is refused from its text; any other pattern that isn't
one of the well-known ones is tried in a process of its own, with a time limit, on long runs of what the pattern
itself mentions. Left out: proof; this refuses the families that occur in practice. Source: OWASP, Regular expression
denial of service."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moai_core.errors import CheckpointError

_LONGEST = 8192
_SECONDS = 3.0
# Letters, contractions and digits as GPT-2, cl100k (GPT-4, Llama 3, Qwen 2) and o200k split them: linear, and most
# tokenizers have one of them.
KNOWN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    *(
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"""
        + digits
        + r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    # The scripts of moai's own tokenizers (moai_core/tokenizer/layout.py): one run of one class after the other.
    r"[^\p{L}]?(?:\p{Hangul}+|[\p{Han}々〆]+[\p{Hiragana}ー]*|[\p{Katakana}ー]+|[\p{Hiragana}ー]+)",
)
_TRY = """
import json, sys
from tokenizers import Regex, pre_tokenizers
given = json.load(sys.stdin)
split = pre_tokenizers.Split(Regex(given["pattern"]), "isolated")
for text in given["texts"]:
    split.pre_tokenize_str(text)
"""


def check_patterns(backend: Any, path: Path) -> None:
    """Raises CheckpointError naming `path` and the pattern if one in the parsed tokenizer.json may run without end."""
    for pattern in dict.fromkeys(_patterns(backend)):
        if pattern in KNOWN:
            continue
        shown = pattern if len(pattern) <= 60 else pattern[:60] + "…"
        if len(pattern) > _LONGEST:
            raise CheckpointError(f"{path}: a pattern of {len(pattern)} characters (at most {_LONGEST}): {shown!r}")
        if nested(pattern):
            raise CheckpointError(
                f"{path}: the pattern {shown!r} repeats a repetition and could run without end",
                hint="rewrite it without nested + or *",
            )
        if not _fast(pattern):
            raise CheckpointError(
                f"{path}: the pattern {shown!r} did not finish on a short text within {_SECONDS:.0f} s"
            )


def _patterns(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > 64:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "Regex" and isinstance(inner, str):
                yield inner
            elif key not in ("vocab", "merges"):
                yield from _patterns(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner, depth + 1)


def nested(pattern: str) -> bool:
    """Whether a group that can repeat without bound holds an unbounded repetition, or branches that may begin with
    the same character.
    """
    groups: list[dict[str, Any]] = [{"loop": False, "heads": [""], "atomic": False}]
    at = 0
    while at < len(pattern):
        item = _item(pattern, at)
        at += len(item)
        top = groups[-1]
        if item.startswith("(") and item != "(?#":
            groups.append({"loop": False, "heads": [""], "atomic": item == "(?>"})
            continue
        closed = None
        if item == ")" and len(groups) > 1:
            closed = groups.pop()
            top = groups[-1]
        elif item == "|":
            top["heads"].append("")
            continue
        repeat = re.compile(r"[*+](?!\+)[?]?|\{\d*,\}[?]?").match(pattern, at)
        if repeat and closed and not closed["atomic"]:
            heads = [head for head in closed["heads"] if head]
            if (
                closed["loop"]
                or len(set(heads)) < len(heads)
                or any(head in (".", r"\w", r"\S") for head in heads if len(heads) > 1)
            ):
                return True
        if not top["heads"][-1]:
            top["heads"][-1] = item
        top["loop"] = top["loop"] or bool(repeat) or bool(closed and closed["loop"] and not closed["atomic"])
        at = repeat.end() if repeat else at
        if not repeat and (bounded := re.compile(r"\?\??|[*+]\+|\{\d+(,\d+)?\}").match(pattern, at)):
            at = bounded.end()
    return False


def _item(pattern: str, at: int) -> str:
    """The next atom: an escape, a class, the opening of a group, or one character."""
    found = re.compile(r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.|\(\?[a-z-]*:|\(\?[a-z-]+\)|\(\?<?[=!>]|\(\?>|\(", re.S).match(
        pattern, at
    )
    if found:
        return found.group()
    if pattern[at] != "[":
        return pattern[at]
    depth, end = 0, at
    while end < len(pattern):
        if pattern[end] == "\\":
            end += 1
        elif pattern[end] == "[":
            depth += 1
        elif pattern[end] == "]" and end > at + 1:
            depth -= 1
            if depth == 0:
                break
        end += 1
    return pattern[at : end + 1]


def _fast(pattern: str) -> bool:
    key = hashlib.sha256(pattern.encode()).hexdigest()
    if key in _tried:
        return _tried[key]
    letters = list(
        dict.fromkeys(
            c for c in re.sub(r"\\[pP]\{[^}]*\}|\\.", "", pattern) if c.isprintable() and c not in "()[]{}|*+?^$\\"
        )
    )[:24]
    runs = [c * 2000 + end for c in ("a", "A", "1", " ", "\n", "!", "가", *letters) for end in ("", "!", "\x01")]
    runs += [(a + b) * 500 + "\x01" for a, b in ("a ", "a1", "1 ", " \n", "a!", "'s", "aA")]
    given = json.dumps({"pattern": pattern, "texts": runs})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRY], input=given.encode(), capture_output=True, timeout=_SECONDS
        )
        _tried[key] = done.returncode == 0
    except subprocess.TimeoutExpired:
        _tried[key] = False
    return _tried[key]


_tried: dict[str, bool] = {}
