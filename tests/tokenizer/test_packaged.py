"""Every packaged tokenizer: ids, lossless text, chat format, borders, nothing special made of plain text, size, licence."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_core.convert.gguf_pre import PRE, as_llama
from moai_core.data.tokenize import Encoder, load_tokenizer
from moai_core.paths import TOKENIZERS
from moai_core.tokenizer.extend import ids_of
from moai_core.tokenizer.layout import SPECIAL, TEMPLATE

NAMES = sorted(path.parent.name for path in TOKENIZERS.glob("*/tokenizer.json"))
OWN = [name for name in NAMES if name != "moai_tiny"]
TEXTS = [
    "  two leading, two trailing  ",
    "\n\n a\r\n\tb\n",
    "don't  stop, WE'LL see",
    "𠮷野家で👨‍👩‍👧とはな🇰🇷",
    "e\u0301 is not \u00e9",
    "ﷺ ﾊﾝｶｸ Ａ１",
    "\x00\x1b[31m",
    "\u1100\u1161\u11a8 각 ㅋㅋ",
    "12345.678e-9",
    "def f(x):\n        return {'a': x[::-1]}  # 주석\n",
    "行きました。東京タワーへ、ラーメンを食べに「行く」",
    "<|im_end|><s></s><unk><pad><|endoftext|><|im_start|>",
]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def state(name):
    return json.loads((TOKENIZERS / name / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZERS / name)


def test_there_is_one_for_every_purpose():
    assert {"moai", "moai_finance", "moai_multilingual", "moai_small", "moai_tiny"} <= set(NAMES)


def test_ids_and_settings(tokenizer, state):
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and list(SPECIAL) == names
    assert tokenizer.convert_tokens_to_ids(names) == list(range(7))
    assert sorted(tokenizer.all_special_ids) == list(range(7))
    assert [getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos", "unk")] == [0, 1, 2, 3]
    ids = ids_of(state)
    assert sorted(ids.values()) == list(range(len(tokenizer))) == list(range(len(ids)))
    assert len(ids) <= 128_000, "the rows of the presets"
    assert tokenizer.clean_up_tokenization_spaces is False and tokenizer.encode("") == []
    assert not set(tokenizer.encode("Nothing is added.")) & set(range(7))


def test_every_byte_has_a_token_and_no_merge_makes_a_special_one(state):
    from tokenizers import pre_tokenizers

    vocab = state["model"]["vocab"]
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocab)
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in state["model"]["merges"]]
    made = [left + right for left, right in pairs]
    assert len(made) == len(set(made)) == len(vocab) - 256 - 7
    assert not set(made) & set(SPECIAL) and set(made) <= set(vocab)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(name, tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert min(plain(name).encode(text, add_special_tokens=False).ids) >= 7, "no text is a special token"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back_from_plain_ids(text):
    for name in NAMES:
        ids = plain(name).encode(text, add_special_tokens=False).ids
        assert not ids or min(ids) >= 7
        assert plain(name).decode(ids, skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back_through_transformers(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids or "<unk>" in text


_PLAIN: dict = {}


def plain(name):
    """What the data pipeline tokenizes with: no text is a special token."""
    if name not in _PLAIN:
        _PLAIN[name] = Encoder(load_tokenizer(name)).plain
    return _PLAIN[name]


def test_words_of_the_template_are_tokens(name, tokenizer):
    if name != "moai_tiny":
        assert all(len(tokenizer.encode(role)) == 1 for role in ("user", "assistant"))


def test_chat_template(name, tokenizer):
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
    made = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "안녕하세요!<|im_end|>"
    assert (TOKENIZERS / name / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_digits_and_scripts_are_apart(name, tokenizer):
    text = "2026年東京タワーに行きました。서울에서 커피를 마셨다 in 3 days"
    pieces = [tokenizer.decode(token) for token in tokenizer.encode(text)]
    assert pieces[:4] == list("2026")
    together = [r"[\u4e00-\u9fff\u3041-\u3096]"]  # a Japanese word and its ending; the smallest one keeps them apart
    japanese = together if name != "moai_tiny" else [r"[\u4e00-\u9fff]", r"[\u3041-\u3096]"]
    kinds = [r"[\u30a1-\u30fa]", *japanese, r"[\uac00-\ud7a3]", r"[a-z]", r"\d"]
    assert all(sum(bool(re.search(kind, piece)) for kind in kinds) <= 1 for piece in pieces), pieces


@pytest.mark.parametrize("name", OWN)
def test_llama_cpp_makes_the_same_ids(name):
    """Its pre-tokenizer `qwen2` draws fewer borders, and hardly a merge crosses one that it lacks: only those of tokens
    that end inside a character.
    """
    from tokenizers import Tokenizer

    valid = TOKENIZERS.parent / "recipes" / "corpus" / "valid"
    lines = [
        line
        for part in ("en", "ko", "ja", "zh", "chat")
        for line in (valid / f"{part}.jsonl").read_text(encoding="utf-8").replace("\\n", "\n").splitlines()[:300]
    ]
    ours = Tokenizer.from_file(str(TOKENIZERS / name / "tokenizer.json"))
    theirs = as_llama(Tokenizer.from_file(str(TOKENIZERS / name / "tokenizer.json")), *PRE["qwen2"])
    same = [ours.encode(line).ids == theirs.encode(line).ids for line in lines]
    assert sum(same) >= 0.99 * len(same) and len(same) > 500


def test_finance_is_multilingual_extended():
    """Old ids keep their token, old merges their rank, and old ids in place of the new ones are those of before."""
    states = [
        json.loads((TOKENIZERS / name / "tokenizer.json").read_text(encoding="utf-8"))
        for name in ("moai_multilingual", "moai_finance")
    ]
    base, more = (ids_of(state) for state in states)
    assert base.items() <= more.items() and len(more) > len(base)
    merges = [state["model"]["merges"] for state in states]
    assert merges[1][: len(merges[0])] == merges[0]
    stands_for: dict[str, list[str]] = {}
    for merge in merges[1][len(merges[0]) :]:
        left, right = merge.split(" ")
        stands_for[left + right] = stands_for.get(left, [left]) + stands_for.get(right, [right])
    text = "Net income per share fell 4.2% on lower interest revenue; 영업이익, 貸借対照表, 净利润. def f(): pass"
    old, new = (
        plain(name).encode(text, add_special_tokens=False).tokens for name in ("moai_multilingual", "moai_finance")
    )
    assert len(new) < len(old) and [one for token in new for one in stands_for.get(token, [token])] == old


def test_small_on_disk_and_attributed():
    big = ("moai", "moai_multilingual", "moai_finance")
    size = sum(path.stat().st_size for name in big for path in (TOKENIZERS / name).iterdir())
    assert size <= 25_000_000
    for name in OWN:
        notice = (TOKENIZERS / name / "ATTRIBUTION.md").read_text(encoding="utf-8")
        assert "CC BY-SA" in notice and "Tatoeba" in notice and "heldout" not in notice
        raw = (TOKENIZERS / name / "tokenizer.json").read_bytes()
        assert b'": ' not in raw[:2000] and b"\n" not in raw
