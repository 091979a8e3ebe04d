"""The packaged tokenizer and corpus: ids, lossless text, chat format, density, licences, an unseen validation part."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_core.paths import RECIPES, TOKENIZERS

FOLDER = TOKENIZERS / "moai_tiny"
CORPUS = RECIPES / "corpus"
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<|endoftext|>": 4, "<|im_start|>": 5, "<|im_end|>": 6}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


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


def test_ids_and_settings(tokenizer):
    from transformers import PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(SPECIAL.values())
    assert sorted(tokenizer.all_special_ids) == list(SPECIAL.values())
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk")] == [0, 1, 2, 3]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.encode("") == []
    assert not set(tokenizer.encode("Nothing is added.")) & set(SPECIAL.values())
    assert not list(TOKENIZERS.rglob("__init__.py")), "a package here would shadow the tokenizers library"


@pytest.mark.parametrize(
    "text",
    [
        "  two leading, two trailing  ",
        "\n\n a\r\n\tb\n",
        "don't  stop",
        "𠮷野家で👨‍👩‍👧とはな🇰🇷",
        "e\u0301 is not \u00e9",
        "ﷺ ﾊﾝｶｸ Ａ１",
        "\x00\x1b[31m",
        "\u1100\u1161\u11a8 각 ㅋㅋ",
        "12345.678e-9",
        "def f(x):\n    return x\n",
    ],
)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert SPECIAL["<unk>"] not in ids or "<unk>" in text


def test_digits_and_scripts_are_apart(tokenizer):
    text = "2026年東京タワーに行きました。서울에서 커피를 마셨다"
    pieces = [tokenizer.decode(token) for token in tokenizer.encode(text)]
    assert pieces[:4] == list("2026")
    scripts = [r"[\u4e00-\u9fff]", r"[\u3041-\u3096]", r"[\u30a1-\u30ff]", r"[\uac00-\ud7a3]", r"\d"]
    assert all(sum(bool(re.search(script, piece)) for script in scripts) <= 1 for piece in pieces)


def test_chat_template(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "안녕?"},
        {"role": "assistant", "content": "안녕하세요!"},
        {"role": "user", "content": " 今日は\n{{ 1 }} "},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n안녕?<|im_end|>\n"
        "<|im_start|>assistant\n안녕하세요!<|im_end|>\n"
        "<|im_start|>user\n 今日は\n{{ 1 }} <|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    made = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Hello there<|im_end|>"


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
