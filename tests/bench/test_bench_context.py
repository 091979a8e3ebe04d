"""Costs of tokens against a model that is shown each context by itself; buckets, joining, the report."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, config
from moai_core.bench import context, score, twin_llama
from moai_core.bench.score import Text
from moai_core.data.tokenize import load_tokenizer, token_bytes
from moai_core.errors import DataError, UsageError
from moai_core.evaluate import evaluate_file
from moai_core.recipe import Source

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("moai_tiny")


@pytest.fixture(scope="module", params=["moai", "llama"])
def model(request, tokenizer):
    numbers = config.fields(**SIZE, vocab_size=len(tokenizer))
    torch.manual_seed(1)
    if request.param == "llama":
        return twin_llama.make(twin_llama.shape(numbers), 1)
    return MoaiMambaForCausalLM(MoaiMambaConfig(**numbers))


def some_texts(vocabulary: int, lengths=(2, 30, 7, 30, 19)) -> list[Text]:
    dice = np.random.default_rng(0)
    made = []
    for number, length in enumerate(lengths):
        counted = dice.random(length) < 0.8
        counted[1] = True
        made.append(Text("ko" if number % 2 else "en", dice.integers(7, vocabulary, length), counted))
    return made


@torch.no_grad()
def cost(model, ids, at: int, first: int = 0) -> float:
    """Nats of token `at` given ids[first:at], by the whole model."""
    logits = model.eval()(torch.from_numpy(ids[first:at])[None]).logits[0, -1]
    return float(-logits.double().log_softmax(-1)[ids[at]])


@pytest.mark.parametrize("budget", [1 << 13, 20])
def test_every_token_costs_what_it_costs_alone(model, tokenizer, budget, monkeypatch):
    monkeypatch.setitem(score._TOKENS, "cpu", budget)
    texts = some_texts(len(tokenizer))
    events = []
    for chunk in (100, 7, 1):
        found = score.carried(model, texts, chunk=chunk, on_event=events.append)
        for text, nats in zip(texts, found, strict=True):
            wanted = [cost(model, text.ids, at) if text.counted[at] else 0.0 for at in range(1, len(text.ids))]
            np.testing.assert_allclose(nats, wanted, rtol=2e-4, atol=1e-5)
    assert events[-1]["done"] == events[-1]["total"] == sum(len(text.ids) - 1 for text in texts)


@pytest.mark.parametrize("length", [2, 8, 64])
def test_a_window_shows_half_to_a_whole_context(model, tokenizer, length):
    texts = some_texts(len(tokenizer))
    found = score.windowed(model, texts, length)
    for text, nats in zip(texts, found, strict=True):
        for at in range(1, len(text.ids)):
            # Behind the first window, windows begin at multiples of half a context and score their second half.
            first = 0 if at <= length else ((at - 1) // (length // 2) - 1) * (length // 2)
            assert at - first <= length and (first == 0 or at - first > length // 2)
            wanted = cost(model, text.ids, at, first) if text.counted[at] else 0.0
            assert nats[at - 1] == pytest.approx(wanted, rel=2e-4, abs=1e-5)


def test_sums_are_those_of_evaluation(tokenizer, tmp_path):
    torch.manual_seed(2)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**SIZE, vocab_size=len(tokenizer))).eval()
    lines = {"ko": ["상태의 크기는 일정합니다.", "날씨가 좋다" * 9], "en": ["It has a fixed size. " * 12]}
    for language, texts in lines.items():
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (tmp_path / f"{language}.test.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    texts = score.read_texts([Source(path=str(tmp_path))], tokenizer)
    costs = score.carried(model, texts, chunk=16)
    found = score.by_language(texts, costs, tokenizer)
    assert list(found) == ["en", "ko", "all"]
    for name, path in (("en", tmp_path / "en.test.jsonl"), ("ko", tmp_path / "ko.test.jsonl"), ("all", tmp_path)):
        wanted = evaluate_file(model, tokenizer, str(path), max_length=64)
        for key in ("loss", "bits_per_byte", "tokens", "bytes"):
            assert found[name][key] == pytest.approx(wanted[key], rel=1e-5), (name, key)
    # Buckets hold every token once.
    rows = [one for one in context.by_position(texts, costs, tokenizer, 4096) if one["language"] == "all"]
    assert sum(one["tokens"] for one in rows) == found["all"]["tokens"]
    assert sum(one["loss"] * one["tokens"] for one in rows) == pytest.approx(
        found["all"]["loss"] * found["all"]["tokens"]
    )
    assert [(one["from"], one["to"]) for one in rows] == [(1, 63), (64, 127)]


def test_buckets_double():
    assert context.buckets(32768)[0] == (1, 64) and context.buckets(32768)[-1] == (16384, 32768)
    assert context.buckets(100) == [(1, 64), (64, 100)] and context.buckets(2) == [(1, 2)]


def test_texts_are_limited_joined_and_cut(tokenizer, tmp_path):
    (tmp_path / "ja.jsonl").write_text(
        "".join(json.dumps({"text": f"番号 {n}"}, ensure_ascii=False) + "\n" for n in range(20)), encoding="utf-8"
    )
    source = [Source(path=str(tmp_path / "ja.jsonl"))]
    plain = score.read_texts(source, tokenizer)
    assert len(plain) == 20 and all(text.ids[-1] == tokenizer.eos_token_id for text in plain)
    line = tokenizer("\n")["input_ids"]
    every = np.concatenate([[*text.ids[:-1], *line] for text in plain])
    joined = score.read_texts(source, tokenizer, join=32)
    ids, counted = (np.concatenate([text[part] for text in joined]) for part in (1, 2))
    assert np.array_equal(ids, every[: len(ids)])
    assert np.array_equal(counted, ids != line[0])
    assert {len(text.ids) for text in joined[:-1]} == {32}
    assert sum(len(text.ids) for text in score.read_texts(source, tokenizer, tokens=33)) == 33
    assert max(len(text.ids) for text in score.read_texts(source, tokenizer, length=3)) == 3
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="nothing to score"):
        score.read_texts([Source(path=str(tmp_path / "empty.txt"))], tokenizer)


def test_the_report_and_the_picture(tokenizer, tmp_path):
    torch.manual_seed(2)
    numbers = config.fields(**SIZE, vocab_size=len(tokenizer))
    for name, model in (
        ("ours", MoaiMambaForCausalLM(MoaiMambaConfig(**numbers))),
        ("theirs", twin_llama.make(twin_llama.shape(numbers), 0)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    call = {"models": [tmp_path / "ours", tmp_path / "theirs"], "length": 200, "tokens": 300, "device": "cpu"}
    found = json.loads(json.dumps(context.run(**call, contexts=[32], plot=tmp_path / "c.png")))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert list(found["models"]) == ["ours", "theirs"] and found["models"]["ours"]["state"]
    assert {one["to"] for one in found["results"]} == {63, 127, 199}
    assert all(math.isfinite(one["bits_per_byte"]) for one in found["results"])
    assert {row["context"] for row in found["contexts"]} == {32, "whole"}
    tables = context.tables(found)
    assert len(tables) == 3 and tables[0].rows[-1][0] == "tokens"
    table = token_bytes(tokenizer)
    rows = [one for one in found["results"] if one["model"] == "ours" and one["language"] == "zh"]
    assert sum(row["bytes"] for row in rows) <= 300 * table.max()
    for flags, words in (({"length": 1}, "--max-length"), ({"contexts": [3]}, "--context"), ({"chunk": 0}, "--chunk")):
        with pytest.raises(UsageError, match=words):
            context.run(**{**call, **flags})
    with pytest.raises(UsageError, match="same name"):
        context.run(**{**call, "models": [tmp_path / "ours", tmp_path / "ours"]})
