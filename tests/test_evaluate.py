"""Loss, perplexity and bits per byte against a token-by-token float64 sum, and against each document scored alone
in one piece.
"""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from moai_core.errors import DataError, UsageError
from moai_core.evaluate import evaluate, evaluate_file, summary

TEXTS = [
    "The state has a fixed size. " * 9,
    "상태의 크기는 일정합니다.",
    "吾輩は猫である。名前はまだ無い。" * 5,
    "x",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
]


@pytest.fixture(scope="module")
def tokenizer():
    from moai_core.data.tokenize import load_tokenizer

    return load_tokenizer("moai_tiny")


@pytest.fixture(scope="module")
def model(tokenizer):
    from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM

    torch.manual_seed(0)
    size = max(tokenizer.get_vocab().values()) + 1
    config = MoaiMambaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        state_size=8,
        time_step_rank=4,
        initializer_range=0.3,
    )
    model = MoaiMambaForCausalLM(config).eval()
    model.set_scan_backend("reference")
    return model


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "글 모음.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def by_hand(model, tokenizer, texts):
    """(nats, tokens, bytes) one document at a time, log-softmax in float64."""
    nats, tokens, size = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        nats += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
        first = tokenizer.decode(ids[0, :1]).encode() if ids[0, 0] != tokenizer.bos_token_id else b""
        size += len(text.encode()) - len(first)
    return nats, tokens, size


@pytest.mark.parametrize(("max_length", "batch_size"), [(7, 1), (7, 3), (16, 2), (1, 2), (4096, 8)])
def test_a_file_is_scored_with_full_context_whatever_the_chunk(model, tokenizer, data, max_length, batch_size):
    nats, tokens, _ = by_hand(model, tokenizer, TEXTS)
    found = evaluate_file(model, tokenizer, str(data), max_length=max_length, batch_size=batch_size)
    assert found["tokens"] == tokens
    assert found["documents"] == len(TEXTS)
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_rows_without_a_document_are_not_computed(model, tokenizer, data):
    """Three documents of different lengths, in as many of the eight rows, and in fewer as they end."""
    rows = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, call: rows.append(len(call["input_ids"])), with_kwargs=True
    )
    try:
        found = evaluate_file(model, tokenizer, str(data), max_length=16, batch_size=8, limit=3)
    finally:
        hook.remove()
    assert rows[0] <= 3 and rows[-1] == 1 and rows == sorted(rows, reverse=True)
    alone = evaluate_file(model, tokenizer, str(data), max_length=16, batch_size=1, limit=3)
    assert found["nats"] == pytest.approx(alone["nats"], rel=1e-5) and found["tokens"] == alone["tokens"]


def test_bytes_are_the_text_after_each_first_token(model, tokenizer, tmp_path):
    text = "가나다라 abc 吾輩は猫 🦙 ok"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}))
    ids = tokenizer(text)["input_ids"]
    first = tokenizer.backend_tokenizer.id_to_token(ids[0])
    hidden = 0 if ids[0] == tokenizer.bos_token_id else len(first)  # byte-level: one character of a token is one byte
    found = evaluate_file(model, tokenizer, str(path))
    assert found["bytes"] == len(text.encode()) - hidden
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / found["bytes"])


def test_packed_batches_give_the_same_sum(model, tokenizer, data, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from moai_core.data.loader import make_loader

    monkeypatch.setenv("MOAI_CACHE", str(tmp_path / "cache"))
    section = SimpleNamespace(
        train=str(data), valid=None, valid_fraction=0.0, max_length=512, format="auto", on_error="stop",
        train_on="assistant", streaming="auto", shuffle=True, workers=0, cache=None,
    )  # fmt: skip
    loader = make_loader(section, tokenizer, batch_size=2)
    nats, tokens, _ = by_hand(model, tokenizer, TEXTS)
    model.train()
    found = evaluate(model, loader.once())
    assert model.training
    model.eval()
    assert found["tokens"] == tokens
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["bytes"] == evaluate_file(model, tokenizer, str(data))["bytes"]


def test_limit_and_chats(model, tokenizer, data, tmp_path):
    assert evaluate_file(model, tokenizer, str(data), limit=2)["documents"] == 2
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "네"}]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    answer = evaluate_file(model, tokenizer, str(chat))
    assert answer["bytes"] == len("네".encode())
    assert evaluate_file(model, tokenizer, str(chat), train_on="all")["tokens"] > answer["tokens"]


def test_bad_input(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        evaluate_file(model, tokenizer, str(tmp_path / "missing.txt"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds nothing to score"):
        evaluate_file(model, tokenizer, str(tmp_path / "empty.txt"))
    with pytest.raises(UsageError, match=r"batch_size must be at least 1 \(got 0\)"):
        evaluate_file(model, tokenizer, str(tmp_path / "empty.txt"), batch_size=0)
    small = type("Model", (), {"config": type("C", (), {"vocab_size": 100})()})()
    with pytest.raises(UsageError, match="vocab_size is 100"):
        evaluate_file(small, tokenizer, str(tmp_path / "empty.txt"))


def test_summary_of_nothing_is_nan_and_of_much_is_inf():
    assert math.isnan(summary(0.0, 0, 0)["loss"])
    assert summary(1e6, 1, 1)["perplexity"] == math.inf
