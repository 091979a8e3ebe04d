"""Text as the mix sees it: cleaned once, then judged line by line and as a whole.

Cleaning: NFC, so that a syllable or an accented letter has one spelling, hence one row of tokens (Hangul from macOS
and some catalogues comes decomposed); control, zero-width and private-use characters out, no-break spaces plain, line
ends LF without spaces before them, at most one blank line. Nothing else is rewritten: no NFKC, which would turn ² into
2 and full-width punctuation of Japanese into ASCII.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moai_core.data.mix import kernels as k

# C0 without tab and newline, DEL, C1; soft hyphen, zero-width and bidirectional marks, byte order marks; private use.
_BAD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ue000-\uf8ff]"
)
_BREAK, _BLANK = re.compile("[\u2028\u2029]"), re.compile(r"\n{3,}")
_TRAILING = re.compile(r"[ \t\u3000]+$", re.MULTILINE)
_FINAL = set(".!?…。！？｡")
_CLOSING = set("\"'”’」』»")
_SCRIPTS = {"en": (k.LATINS,), "ko": (k.HANGULS,), "ja": (k.HANS, k.KANAS), "zh": (k.HANS,)}
_SEEN = 1 << 22
_LEAST = 20


def clean(text: str) -> str:
    """`text` cleaned as the module's docstring says."""
    if not text.isascii():
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        text = _BREAK.sub("\n", text).replace("\xa0", " ")
    if _BAD.search(text):
        text = _BAD.sub("", text)
    return _BLANK.sub("\n\n", _TRAILING.sub("", text)).strip("\n")


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """(classes uint8, fold uint32) for every code point."""
    classes = np.full(0x110000, k.OTHER, np.uint8)
    fold = np.zeros(0x110000, np.uint32)
    for point in [*range(0x32400), *range(0xE0100, 0xE01F0)]:
        sign = chr(point)
        kind = unicodedata.category(sign)
        if kind[0] == "Z" or sign in "\t\n\r":
            classes[point] = k.SPACE
        elif kind[0] in "LM":
            classes[point] = _script(point)
        elif kind[0] == "N":
            classes[point] = k.HAN if point == 0x3007 else k.DIGIT
        if kind[0] in "LMN":
            same = unicodedata.normalize("NFKC", sign).lower()
            fold[point] = ord(same[0]) if same else point
        if sign in _FINAL or sign in _CLOSING:
            classes[point] |= k.SENTENCE
    return classes, fold


def _script(point: int) -> int:
    if 0x4E00 <= point <= 0x9FFF or 0x3400 <= point <= 0x4DBF or 0xF900 <= point <= 0xFAFF or point >= 0x20000:
        return k.HAN
    if 0x3040 <= point <= 0x30FF or 0x31F0 <= point <= 0x31FF or 0xFF66 <= point <= 0xFF9F:
        return k.KANA
    if 0xAC00 <= point <= 0xD7A3 or 0x1100 <= point <= 0x11FF or 0x3130 <= point <= 0x318F:
        return k.HANGUL
    if point == 0x3005:
        return k.HAN
    return k.LATIN if point < 0x250 or 0x1E00 <= point <= 0x1EFF or 0xFF21 <= point <= 0xFF5A else k.LETTER


def points_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(code points of all texts, each ended by a newline; where each ends, its newline counted)."""
    joined = "\n".join(texts) + "\n" if texts else ""
    points = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    return points, np.cumsum([len(text) + 1 for text in texts])


def signatures(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(signatures (units, BINS) uint16, hashes uint64, shingles int64) of texts."""
    points, ends = points_of(texts)
    out = np.zeros((len(texts), k.BINS), np.uint16)
    hashes, shingles = np.zeros(len(texts), np.uint64), np.zeros(len(texts), np.int64)
    k.signatures(points, ends, *tables(), 8, 4, out, hashes, shingles)
    return out, hashes, shingles


# ---- filters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """What a unit must look like; see recipe.py for each field's meaning."""

    min_chars: int = 1
    max_chars: int | None = None
    min_letters: float = 0.0
    max_digits: float = 1.0
    min_script: float = 0.0
    min_sentences: float = 0.0
    max_repeats: float = 1.0
    line_min_chars: int = 0
    line_min_letters: float = 0.0
    line_sentences: bool = False
    repeated_lines: int | None = None
    drop: tuple[re.Pattern[str], ...] = ()
    drop_lines: tuple[re.Pattern[str], ...] = ()
    replace: tuple[tuple[re.Pattern[str], str], ...] = ()


class Verdict(NamedTuple):
    """What became of a unit: `text` to keep, or the reason it was dropped; `lines` bytes of lines cut from it."""

    text: str
    reason: str | None
    cut: int


class Judge:
    """The filters of one source. It remembers which lines it has seen, so units must come in order."""

    def __init__(self, rules: Rules, lang: str) -> None:
        self.rules, self.scripts = rules, _SCRIPTS.get(lang)
        self._seen = np.zeros(_SEEN, np.uint16) if rules.repeated_lines else None

    def prepare(self, text: str) -> str:
        """`text` cleaned and rewritten by the recipe's expressions."""
        text = clean(text)
        if self.rules.replace:
            for pattern, new in self.rules.replace:
                text = pattern.sub(new, text)
            text = clean(text)
        return text

    def judge(self, texts: list[str], *, cut: bool) -> list[Verdict]:
        """A verdict a text; with `cut`, lines that break the rules for lines are taken out."""
        points, _ = points_of(texts)
        counts = np.zeros((int(np.count_nonzero(points == k.LINE)), 9), np.int32)
        hashes = np.zeros(len(counts), np.uint64)
        k.measure(points, *tables(), counts, hashes)
        bad = self._bad_lines(counts, hashes) if cut else np.zeros(len(counts), bool)
        found, first = [], 0
        for text in texts:
            last = first + text.count("\n") + 1
            found.append(self._one(text, counts[first:last], hashes[first:last], bad[first:last], cut))
            first = last
        return found

    def _bad_lines(self, counts: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        rules, chars = self.rules, counts[:, k.CHARS]
        bad = (chars > 0) & (chars < rules.line_min_chars)
        if rules.line_min_letters:
            bad |= counts[:, k.LETTERS] < rules.line_min_letters * chars
        if rules.line_sentences:
            bad |= (chars > 0) & (counts[:, k.ENDS] == 0)
        if self._seen is not None:
            k.repeated(hashes, counts, self._seen, _LEAST, rules.repeated_lines, bad)
        return bad

    def _one(self, text: str, counts: np.ndarray, hashes: np.ndarray, bad: np.ndarray, cut: bool) -> Verdict:
        removed = 0
        if cut and (self.rules.drop_lines or bad.any()):
            lines = text.split("\n")
            patterns = self.rules.drop_lines
            good = [not b and not any(p.search(line) for p in patterns) for b, line in zip(bad, lines, strict=True)]
            if not all(good):
                removed = sum(len(line.encode()) + 1 for line, fine in zip(lines, good, strict=True) if not fine)
                text = _BLANK.sub("\n\n", "\n".join(line for line, fine in zip(lines, good, strict=True) if fine))
                text, counts, hashes = text.strip("\n"), counts[good], hashes[good]
        return Verdict(text, self._why_not(text, counts, hashes), removed)

    def _why_not(self, text: str, counts: np.ndarray, hashes: np.ndarray) -> str | None:
        rules = self.rules
        if len(text) < rules.min_chars or not text.strip():
            return "short"
        if rules.max_chars and len(text) > rules.max_chars:
            return "long"
        if "\ufffd" in text:
            return "encoding"
        total = counts[0] if len(counts) == 1 else counts.sum(axis=0)
        chars, letters = max(1, int(total[k.CHARS])), int(total[k.LETTERS])
        if letters < rules.min_letters * chars:
            return "letters"
        if total[k.DIGITS] > rules.max_digits * chars:
            return "digits"
        if self.scripts and rules.min_script and sum(int(total[s]) for s in self.scripts) < rules.min_script * letters:
            return "script"
        if rules.min_sentences and int((counts[:, k.CHARS] * counts[:, k.ENDS]).sum()) < rules.min_sentences * chars:
            return "sentences"
        if rules.max_repeats < 1 and len(hashes) > 3 and _repeats(counts, hashes) > rules.max_repeats * chars:
            return "repeats"
        return "pattern" if any(pattern.search(text) for pattern in rules.drop) else None


def _repeats(counts: np.ndarray, hashes: np.ndarray) -> int:
    _, first = np.unique(hashes, return_index=True)
    return int(counts[:, k.CHARS].sum() - counts[first, k.CHARS].sum())


def sections(text: str, limit: int | None) -> list[str]:
    """`text` in parts of at most `limit` characters, cut after a line, else after a sentence, else anywhere."""
    if not limit or len(text) <= limit:
        return [text]
    parts, at = [], 0
    while len(text) - at > limit:
        half, end = at + limit // 2, at + limit
        cut = max(text.rfind("\n\n", half, end), -1)
        cut = cut if cut > 0 else text.rfind("\n", half, end)
        if cut <= 0:
            cut = max(text.rfind(sign, half, end) for sign in (". ", "? ", "! ", "。", "！", "？")) + 1
        cut = cut if cut > half else end
        parts.append(text[at:cut].strip("\n "))
        at = cut
    return [part for part in [*parts, text[at:].strip("\n ")] if part]


def plain(value: Any) -> Any:
    """A value of Rules as JSON."""
    if isinstance(value, re.Pattern):
        return value.pattern
    return [plain(one) for one in value] if isinstance(value, tuple) else value
