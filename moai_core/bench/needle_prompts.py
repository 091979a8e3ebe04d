"""Haystacks: prompts of exactly so many tokens with a fact somewhere, in four languages, from the packaged corpus."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai_core import paths
from moai_core.data.read import Problems, find_files, read_documents
from moai_core.data.tokenize import Encoder
from moai_core.errors import DataError, UsageError

FILLER = paths.RECIPES / "corpus" / "train"
# Characters of filler kept: some times the longest prompts.
_POOL = 400_000


@dataclass(frozen=True)
class Language:
    """How a fact is said, how it is asked for (what stands before the value), and whose numbers they are."""

    fact: str
    question: str
    keys: tuple[str, ...]


LANGUAGES = {
    "en": Language(
        "The secret number of {key} is {value}.",
        "The secret number of {key} is ",
        ("Paris", "London", "Rome", "Madrid", "Cairo", "Boston", "Berlin", "Sydney", "Toronto", "Chicago"),
    ),
    "ko": Language(
        "{key}의 비밀 번호는 {value}입니다.",
        "{key}의 비밀 번호는 ",
        ("서울", "부산", "대구", "인천", "광주", "대전", "울산", "제주", "수원", "강릉"),
    ),
    "ja": Language(
        "{key}の秘密の番号は{value}です。",
        "{key}の秘密の番号は",
        ("東京", "大阪", "京都", "名古屋", "札幌", "福岡", "神戸", "仙台", "広島", "長崎"),
    ),
    "zh": Language(
        "{key}的秘密号码是{value}。",
        "{key}的秘密号码是",
        ("北京", "上海", "广州", "深圳", "成都", "武汉", "杭州", "南京", "重庆", "西安"),
    ),
}


@dataclass(frozen=True)
class Needle:
    """A prompt (ids), the value asked for, and the candidates, that value first, as ids behind the prompt."""

    ids: list[int]
    value: str
    candidates: list[list[int]]


class Haystacks:
    """Filler of one language as tokenized lines, and prompts made of it."""

    def __init__(self, name: str, tokenizer: Any, source: str | Path | None = None) -> None:
        """source: a file of filler (default: the packaged corpus). Raises DataError."""
        self.language, self.tokenizer = LANGUAGES[name], tokenizer
        path = source or next(FILLER.glob(f"{name}.jsonl*"), None)
        if path is None:
            raise DataError(f"no filler text for {name} in {FILLER}", hint="name a file with --data")
        self.prefix = Encoder(tokenizer).prefix
        self.lines: list[str] = []
        size = 0
        for document in read_documents(find_files(str(path))[0], problems=Problems("stop")):
            lines = [line for segment in document.segments for line in segment.text.split("\n") if line.strip()]
            self.lines += lines
            size += sum(map(len, lines))
            if size > _POOL:
                break
        if not self.lines:
            raise DataError(f"{path}: holds no filler text")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def make(
        self, length: int, depth: float, dice: random.Random, *, pairs: int, candidates: int, digits: int
    ) -> Needle:
        """A prompt of exactly `length` tokens with the fact at `depth` (0 to 1). UsageError where that is too short."""
        keys = dice.sample(self.language.keys, pairs)
        unique: dict[str, None] = {}
        while len(unique) < candidates:
            unique[_number(digits, dice)] = None
        values = list(unique)
        facts = [
            self.encode(self.language.fact.format(key=key, value=value) + "\n")
            for key, value in zip(keys, values, strict=False)
        ]
        question, answers = self._asked(keys[0], values)
        room = length - len(self.prefix) - len(question) - sum(map(len, facts))
        if room < 0:
            raise UsageError(f"--lengths: {length} tokens don't hold {pairs} facts and a question")
        filler = self._filler(room, dice)
        depths = [depth, *(dice.random() for _ in facts[1:])]
        # From the back, so that what is put in doesn't move what comes before it.
        for place, fact in sorted(zip(depths, facts, strict=True), key=lambda one: -one[0]):
            filler.insert(_border(filler, place * room), fact)
        ids = [*self.prefix, *(token for line in filler for token in line), *question]
        assert len(ids) == length
        return Needle(ids, values[0], answers)

    def _asked(self, key: str, values: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """The question's ids, and each value's ids behind it: tokenized together, parted where all agree."""
        question = self.language.question.format(key=key)
        whole = [self.encode(question + value) for value in values]
        same = min(len(ids) for ids in whole) - 1
        common = next((n for n in range(same) if len({ids[n] for ids in whole}) > 1), same)
        # Numbers that begin alike don't belong to the question.
        common = min(common, len(self.encode(question.rstrip())))
        return whole[0][:common], [ids[common:] for ids in whole]

    def _filler(self, room: int, dice: random.Random) -> list[list[int]]:
        """Lines of exactly `room` tokens together, from a random place on; the first is cut at its head."""
        found: list[list[int]] = []
        size, at = 0, dice.randrange(len(self.lines))
        while size < room:
            line = self.encode(self.lines[at] + "\n")
            found.append(line)
            size, at = size + len(line), (at + 1) % len(self.lines)
        while found and size - len(found[0]) >= room:
            size -= len(found.pop(0))
        if found:
            found[0] = found[0][size - room :]
        return found


def _number(digits: int, dice: random.Random) -> str:
    return str(dice.randrange(10 ** (digits - 1), 10**digits))


def _border(lines: list[list[int]], tokens: float) -> int:
    """The border between lines that is nearest to so many tokens."""
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    return min(range(len(ends)), key=lambda n: abs(ends[n] - tokens))
