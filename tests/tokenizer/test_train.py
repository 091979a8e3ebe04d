"""Training: the merges of an independent BPE, borders, weights, health, whole folders, plain errors."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from moai_core.errors import DataError, UsageError
from moai_core.tokenizer import health, layout
from moai_core.tokenizer.text import Source, Texts, cut, parse_source
from moai_core.tokenizer.train import train

TEXT = (
    "The cats sat on the mats, and 12345 rats ran past the bats.\n"
    "고양이가 매트 위에 앉아 있었다. 쥐가 달렸다.\n"
    "猫がマットの上に座っていました。東京タワーへ行きました。\n"
    "猫坐在垫子上，老鼠跑了过去。\n"
    "def run(x):\n        return x + 1\n\n"
) * 40


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return Source(str(path))


def open_state(folder) -> dict:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def replay(words: Counter, merges: list[str]) -> list[int]:
    """How often each merge is made, by the textbook (Sennrich et al., algorithm 1); each must be a commonest pair."""
    split = {word: tuple(word) for word in words}
    made = []
    for merge in merges:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                pairs[pair] += count
        left, right = merge.split(" ")
        assert pairs[left, right] == max(pairs.values())
        made.append(0)  # in a run of one letter pairs overlap: more are there than can be merged
        for word, parts in split.items():
            joined, at = [], 0
            while at < len(parts):
                both = parts[at : at + 2] == (left, right)
                joined.append(left + right if both else parts[at])
                at += 1 + both
                made[-1] += both * words[word]
            split[word] = tuple(joined)
    return made


def test_merges_are_those_of_the_textbook(corpus, tmp_path):
    report = train([corpus], tmp_path / "out", vocab_size=263 + 40, min_frequency=1)
    state = open_state(tmp_path / "out")
    words: Counter = Counter()
    for piece in cut(TEXT):
        words.update(word for word, _ in layout.pre_tokenizer(longest=layout.LONGEST).pre_tokenize_str(piece))
    backend = layout.load_backend((tmp_path / "out" / "tokenizer.json").read_bytes(), tmp_path)
    counts = health.count_ids(backend, cut(TEXT), report["vocab_size"])
    times = health.applied(health.merges_of(state), counts)
    assert times.tolist() == replay(words, state["model"]["merges"])
    assert report["tokens"] == counts.sum() == len(backend.encode(TEXT).ids)


def test_applied_counts_what_is_inside_later_tokens():
    # a b -> ab (3), ab c -> abc (4); the text is "abc ab ab": abc once, ab twice
    counts = np.array([0, 0, 0, 2, 1])
    assert health.applied([(0, 1, 3), (3, 2, 4)], counts).tolist() == [3, 1]


def test_special_tokens_bytes_and_borders(corpus, tmp_path):
    train([corpus], tmp_path / "out", vocab_size=700, min_frequency=2)
    vocab = open_state(tmp_path / "out")["model"]["vocab"]
    assert [vocab[token] for token in layout.SPECIAL] == list(range(7)) and max(vocab.values()) == len(vocab) - 1
    pieces = [
        word for word, _ in layout.pre_tokenizer().pre_tokenize_str("「東京タワーへ行きました。1234年 서울에서 x=f(a)")
    ]
    from tokenizers import decoders

    text = [decoders.ByteLevel().decode([piece]) for piece in pieces]
    assert text == ["「東京", "タワー", "へ", "行きました", "。", *"1234", "年", " 서울에서", " x", "=f", "(a", ")"]


def test_own_patterns_need_no_trial():
    from moai_core.data.regexes import KNOWN, nested

    assert {layout.WORDS, layout.SCRIPTS} <= set(KNOWN) and not nested(layout.SCRIPTS)


def test_too_little_text_gives_fewer_ids_and_says_so(corpus, tmp_path):
    report = train([corpus], tmp_path / "out", vocab_size=50_000, min_frequency=10)
    assert report["vocab_size"] < 50_000 == report["asked"] and report["health"]["healthy"]
    assert report["health"]["seen_under_10"] == 0 and report["health"]["last"]["fewest"] >= 10


def test_rare_merges_are_unhealthy(tmp_path):
    (tmp_path / "few.txt").write_text("one two three four five\n" * 3, encoding="utf-8")
    report = train([Source(str(tmp_path / "few.txt"))], tmp_path / "out", vocab_size=300, min_frequency=1)
    assert not report["health"]["healthy"] and report["health"]["seen_under_10"] == report["health"]["merges"] > 0
    assert report["health"]["ids"]["used_under_50"] == report["health"]["merges"]


def test_same_text_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        train([corpus], tmp_path / name, vocab_size=500)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one(corpus, tmp_path):
    for size in (400, 500):
        train([corpus], tmp_path / str(size), vocab_size=size)
    small, large = (open_state(tmp_path / size)["model"] for size in ("400", "500"))
    assert small["merges"] == large["merges"][: len(small["merges"])]
    assert small["vocab"].items() <= large["vocab"].items() and len(small["vocab"]) == 400


def test_what_is_written_loads_everywhere(corpus, tmp_path):
    from transformers import AutoTokenizer

    from moai_core.data.tokenize import load_tokenizer

    (tmp_path / "note.md").write_text("all mine", encoding="utf-8")
    train([corpus], tmp_path / "out", vocab_size=600, notice=tmp_path / "note.md")
    assert (tmp_path / "out" / "ATTRIBUTION.md").read_text(encoding="utf-8") == "all mine"
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert theirs.encode(TEXT) == ours.encode(TEXT) and theirs.decode(theirs.encode(TEXT)) == TEXT
    assert theirs.chat_template == ours.chat_template and "generation" in theirs.chat_template


# ---- text --------------------------------------------------------------------------------------------------


def test_weights(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n} of the first text\n" for n in range(4000)), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second"}) + "\n", encoding="utf-8")
    whole = (tmp_path / "a.txt").stat().st_size
    texts = Texts([Source(str(tmp_path / "a.txt"), 0.5), Source(str(tmp_path / "b.jsonl"), 3)])
    first = list(texts.read("counting"))
    assert first == list(texts.read("health")) and first.count("second") == 3
    assert texts.counts[1] == 18 and 0.35 * whole < texts.counts[0] < 0.65 * whole
    assert texts.bytes == sum(len(text.encode()) for text in first)
    assert sum(map(len, Texts([Source(str(tmp_path / "a.txt"), 2.5)]).read("counting"))) > 2 * whole


def test_cut_loses_nothing_and_keeps_lines():
    text = "".join("x" * (n % 90) + "\n" * (1 + n % 3) for n in range(1, 400)) + "end"
    pieces = list(cut(text))
    assert "".join(pieces) == text and len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces[:-1]) and not any(piece.startswith("\n") for piece in pieces)


def test_roles_of_chats_are_text_of_training_only(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat), encoding="utf-8")
    source = [Source(str(tmp_path / "c.jsonl"))]
    assert list(Texts(source).read("")) == ["user\n", "Hi", "assistant\n", "Hello"]
    assert list(Texts(source, whole=True).read("")) == ["Hi", "Hello"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.txt", Source("a.txt")), ("a=b.txt=0.5", Source("a=b.txt", 0.5)), ("x=3", Source("x", 3.0))],
)
def test_sources(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize("text", ["a=", "a=-1", "a=0", "a=nan", "a=inf", "=3", "a=1e9"])
def test_bad_weights(text):
    with pytest.raises(UsageError, match="the weight must be"):
        parse_source(text)


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 262}, "--vocab-size must lie between 263"),
        ({"vocab_size": 2**21}, "--vocab-size"),
        ({"min_frequency": 0}, "--min-frequency"),
        ({"notice": "nowhere.md"}, "nowhere.md"),
    ],
)
def test_impossible_settings(options, message, corpus, tmp_path):
    with pytest.raises(UsageError, match=message):
        train([corpus], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(corpus, tmp_path):
    out = tmp_path / "out"
    train([corpus], out, vocab_size=300)
    with pytest.raises(UsageError, match="already exists"):
        train([corpus], out, vocab_size=400)
    train([corpus], out, vocab_size=400, force=True)
    assert len(open_state(out)["model"]["vocab"]) == 400
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="no tokenizer's folder"):
        train([corpus], out, vocab_size=400, force=True)


def test_bad_data_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad.jsonl:2: 'text' must be a string"):
        train([Source(str(tmp_path / "bad.jsonl"))], tmp_path / "out", vocab_size=300)
    told = []
    bad = Source(str(tmp_path / "bad.jsonl"))
    train([bad], tmp_path / "out", vocab_size=300, on_error="skip", on_event=told.append)
    assert [event["message"][:20] for event in told if event["event"] == "warning"] == ["1 bad line left out,"]
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="no text"):
        train([Source(str(tmp_path / "empty.txt"))], tmp_path / "two", vocab_size=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.txt", "out"]
