"""The pre-tokenizers that are built into llama.cpp, and which of them is nearest to a tokenizer's own.

A GGUF can't bring its own patterns, only name one of llama.cpp's (`tokenizer.ggml.pre`). Patterns differ on paper more
than in effect: where no merge crosses a border, it doesn't matter who draws it. So the choice is made by tokenizing
short strings (words of several scripts, digits, code and quotes, with all sorts of space) as llama.cpp would, with
the tokenizer's own merges: the first pre-tokenizer without a difference is taken, else the one with the fewest. But
patterns for which llama.cpp has a name get that name.
Source: llm_tokenizer_bpe in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _modern(letters: str, digits: str, marks: str = r"\p{L}\p{N}", after: str = r"[\r\n]*") -> str:
    """The pattern of GPT-4 and its relatives."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?[^\s{marks}]+{after}|{_SPACES}"


def _cased(digits: str, contraction: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
    """The pattern of GPT-4o and Tekken, which splits where capitals follow small letters."""
    words = [rf"[^\r\n\p{{L}}\p{{N}}]?{upper}{a}{lower}{b}{contraction}" for a, b in (("*", "+"), ("+", "*"))]
    return rf"{words[0]}|{words[1]}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


# llama.cpp's own form of the two: any letter that isn't a small (a capital) one of ASCII, and no marks.
_LLAMA_CASES = (r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])")
# tokenizer.ggml.pre -> the patterns by which llama.cpp splits, one after the other, and whether a whole word of the
# vocabulary is taken before any merge. The order is that of preference.
PRE: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "llama-bpe": ((_modern(r"\p{L}", r"\p{N}{1,3}"),), True),
    "dbrx": ((_modern(r"\p{L}", r"\p{N}{1,3}"),), False),
    "qwen2": ((_modern(r"\p{L}", r"\p{N}"),), False),
    "qwen35": ((_modern(r"[\p{L}\p{M}]", r"\p{N}", r"\p{L}\p{M}\p{N}"),), False),
    "starcoder": ((r"\p{N}", _GPT2), False),
    "falcon": ((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"), False),
    "gpt-4o": ((_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?", *_LLAMA_CASES),), False),
    "tekken": ((_cased(r"\p{N}", "", *_LLAMA_CASES),), True),
    "seed-coder": ((_modern(r"\p{L}", r"\p{N}{1}", r"\p{L}\p{N}\r\n", ""),), False),
    "bloom": ((r" ?[^(\s|.,!?…。，、।۔،)]+",), False),
    "superbpe": ((r"\p{N}+", r"(?=(\d{3})+(?!\d))"), False),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}  # fmt: skip
# What tokenizer.json files have where llama.cpp has something near it.
ORIGINS = {"gpt-4o": (_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?"),), "tekken": (_cased(r"\p{N}", ""),)}
# Other names in llama.cpp for the same thing, for reading.
ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "lfm2": "llama-bpe", "pixtral": "llama-bpe",
    "smaug-bpe": "dbrx", "chatglm-bpe": "dbrx", "glm4": "dbrx", "mpt": "gpt-2", "olmo": "gpt-2", "phi-2": "gpt-2",
    "jais": "gpt-2", "trillion": "gpt-2", "exaone4": "gpt-2", "stablelm2": "qwen2", "deepseek-r1-qwen": "qwen2",
    "hunyuan": "qwen2", "megrez": "qwen2", "refact": "starcoder", "command-r": "starcoder", "smollm": "starcoder",
    "codeshell": "starcoder", "exaone": "starcoder", "minerva-7b": "starcoder", "poro-chat": "bloom",
    "gpt3-finnish": "bloom", "llama4": "gpt-4o", "kanana2": "gpt-4o",
}  # fmt: skip

_WORDS = (
    "the", "Hello", "don't", "WE'LL", "'single'", "l'section", "naïve", "été", "e\u0301", "안녕하세요", "모델",
    "日本語", "データ", "ひらがな", "中文分词", "Привет", "हिन्दी", "ไทย", "العربية", "1", "42", "3.14", "2026",
    "1000000", "x1", "_name", "camelCase", "HTTPServer", "(", ")", "[]", "{}", "->", "!=", "...", "?!", "、", "。",
    "“", "»", "€", "%", "#", "//", "😀", "👍🏽", "ﬁ",
)  # fmt: skip
_GAPS = ("", " ", "  ", "\n", "\n\n", "    ", "\t", " \n ", "\r\n", ",", ", ", ".\n", "\n        ", "\u00a0", "\u3000")


def samples() -> list[str]:
    """Short strings that tell pre-tokenizers apart: each word beside others, with all sorts of space between them."""
    made = [gap + word + gap for word in _WORDS for gap in _GAPS]
    for number, (left, right) in enumerate(itertools.product(_WORDS, _WORDS)):
        made.append(left + _GAPS[number % len(_GAPS)] + right)
    return made


def nearest(state: dict[str, Any], backend: Any) -> tuple[str, list[str]]:
    """The name of the pre-tokenizer for `backend`, whose tokenizer.json is `state`, and the sample strings that
    llama.cpp will tokenize otherwise.
    """
    written = re.findall(r'"Regex": ("(?:[^"\\]|\\.)*")', json.dumps(state["pre_tokenizer"]))
    own = (tuple(json.loads(pattern) for pattern in written) or (_GPT2,), bool(state["model"].get("ignore_merges")))
    made: dict[bool, Any] = {}  # one a way of merging, because a tokenizer remembers words; a large one takes a second
    best: tuple[str, list[str]] | None = None
    known = [name for name in PRE if own in (PRE[name], (ORIGINS.get(name), PRE[name][1]))]
    for name in known[:1] or PRE:
        patterns, whole = PRE[name]
        made[whole] = as_llama(made.get(whole) or _copy(backend), patterns, whole)
        found = differing(backend, made[whole])
        if best is None or len(found) < len(best[1]):
            best = name, found
        if not found:
            break
    assert best is not None
    return best


def _copy(backend: Any) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(backend.to_str())


def as_llama(tokenizer: Any, patterns: tuple[str, ...], whole: bool) -> Any:
    """`tokenizer` itself, changed to split and merge as llama.cpp does under one of its names."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.Sequence([*splits, last])
    tokenizer.model.ignore_merges = whole
    return tokenizer


def split_by(patterns: tuple[str, ...]) -> dict[str, Any]:
    """The `pre_tokenizer` of a tokenizer.json that splits by these patterns, one after the other."""
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_]}}


def differing(ours: Any, theirs: Any) -> list[str]:
    """The samples that two tokenizers make other ids of."""
    texts = samples()
    both = [backend.encode_batch_fast(texts, add_special_tokens=False) for backend in (ours, theirs)]
    return [text for text, left, right in zip(texts, *both, strict=True) if left.ids != right.ids]
