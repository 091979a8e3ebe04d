"""The packaged corpus: clean, attributed, dense in its tokenizer, and with a validation part that training never sees."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
import zstandard

from moai_core.paths import RECIPES, TOKENIZERS

CORPUS = RECIPES / "corpus"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZERS / "moai_tiny")


def records(part: str) -> list[dict]:
    made = []
    for path in sorted((CORPUS / part).iterdir()):
        data = path.read_bytes()
        if path.suffix == ".zst":
            data = zstandard.ZstdDecompressor().stream_reader(data).read()
        made += [json.loads(line) for line in data.decode("utf-8").split("\n") if line]
    return made


def texts(record: dict) -> list[str]:
    return [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict]]:
    return {part: records(part) for part in ("train", "valid")}


def test_bytes_per_token(tokenizer, corpus):
    count = {language: [0, 0] for language in ("en", "ko", "ja", "zh")}
    for record in corpus["valid"]:
        for text in texts(record):
            count[record["lang"]][0] += len(text.encode())
            count[record["lang"]][1] += len(tokenizer.encode(text))
    density = {language: size / tokens for language, (size, tokens) in count.items()}
    assert density["en"] > 2.6 and density["ko"] > 3.2 and density["ja"] > 3.6 and density["zh"] > 2.9, density


def test_every_source_has_its_licence(corpus):
    notice = (CORPUS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w-]+)` \| (?!lang)", notice, re.MULTILINE))
    assert {record["source"] for part in corpus.values() for record in part} == named
    texts_due = (
        "Permission is hereby granted, free",
        "Redistributions of source code must",
        "WordNet 3.0 Copyright 2006",
    )
    assert [words for words in texts_due if words not in notice] == []


def test_corpus_is_clean(corpus):
    control = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffd]")
    address = re.compile(r"https?:|www\.|\S@\S+\.\w")
    for record in [*corpus["train"], *corpus["valid"]]:
        for text in texts(record):
            assert text and text == text.strip() and unicodedata.is_normalized("NFC", text)
            assert not control.search(text) and not address.search(text), text
        roles = [message["role"] for message in record.get("messages", [])]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def plain(text: str) -> str:
    return re.sub(r"[\W\d_]+", "", text.lower())


def test_validation_is_not_in_training(corpus):
    """No line or conversation of the validation part is in training, however spaced, cased or punctuated."""

    def units(record: dict) -> list[str]:
        lines = [" ".join(texts(record))] if "messages" in record else record["text"].split("\n")
        return [plain(line) for line in lines if len(plain(line)) > 8]

    seen = {unit for record in corpus["train"] for unit in units(record)}
    held = [unit for record in corpus["valid"] for unit in units(record)]
    assert len(held) > 1000
    assert [unit for unit in held if unit in seen] == []
    assert {record["lang"] for record in corpus["valid"]} == {"en", "ko", "ja", "zh"}
    assert "moai" not in {record["source"] for record in corpus["valid"]}, "templated text would flatter the score"
