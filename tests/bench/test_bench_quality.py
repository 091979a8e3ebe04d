"""Quantized models beside their parent: sizes against files, divergence against float64 a document at a time, tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, checkpoint, config, tensors
from moai_core.bench import quality
from moai_core.bench.score import Text
from moai_core.data.tokenize import load_tokenizer
from moai_core.errors import UsageError
from moai_core.quantize.disk import quantize_folder
from moai_core.quantize.plan import Settings

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("quality")
    words = load_tokenizer("moai_tiny")
    torch.manual_seed(0)
    numbers = config.fields(**SIZE, vocab_size=len(words), tie_word_embeddings=True)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers)).to(torch.bfloat16)
    checkpoint.save_model(place / "parent", model, words)
    quantize_folder(place / "parent", place / "int4", Settings("int4", group_size=32))
    quantize_folder(place / "parent", place / "mx", Settings("fp4", group_size=32, embeddings="bf16"))
    return place


def some_texts(vocabulary: int) -> list[Text]:
    dice = np.random.default_rng(3)
    lengths = (9, 1, 70, 33, 5)
    return [
        Text("ko" if n % 2 else "en", dice.integers(7, vocabulary, length), dice.random(length) < 0.7)
        for n, length in enumerate(lengths)
    ]


def test_sizes_are_those_of_the_files(folders):
    for name in ("parent", "int4", "mx"):
        model = checkpoint.load_model(folders / name, dtype=torch.float32)
        stored = sum(one.nbytes for one in tensors.inspect(folders / name / "model.safetensors").values())
        assert quality.stored_bytes(model) == stored
    assert model.config.quantization["modules"]["in_proj"]["format"] == "mxfp4"  # fp4 in groups of 32


def test_fp4_has_two_sizes_of_blocks():
    assert [Settings("fp4", group_size=size).spec().format for size in (None, 16, 32)] == ["nvfp4", "nvfp4", "mxfp4"]
    with pytest.raises(UsageError, match="--group-size 64: fp4 has 16"):
        Settings("fp4", group_size=64).spec()


@torch.no_grad()
def test_divergence_is_that_of_documents_alone(folders, monkeypatch):
    parent, model = (checkpoint.load_model(folders / name, dtype=torch.float32) for name in ("parent", "int4"))
    texts = some_texts(parent.config.vocab_size)
    sums: dict[str, list[float]] = {"en": [0.0, 0.0], "ko": [0.0, 0.0]}
    for text in texts:
        p, q = (one(torch.from_numpy(text.ids)[None]).logits[0].double().log_softmax(-1) for one in (parent, model))
        each = (p.exp() * (p - q)).sum(-1)[:-1][torch.from_numpy(text.counted[1:])]
        sums[text.language][0] += float(each.sum())
        sums[text.language][1] += len(each)
    found = quality.divergence(parent, model, texts)
    for language, (nats, count) in sums.items():
        assert found[language] == pytest.approx(nats / count, rel=1e-3)
    nats, count = (sum(one[i] for one in sums.values()) for i in (0, 1))
    assert found["all"] == pytest.approx(nats / count, rel=1e-3) and found["all"] > 1e-5
    monkeypatch.setattr(quality, "ROW", 16)  # rows cut through documents; every token is still compared
    assert quality.divergence(parent, model, texts)["all"] == pytest.approx(found["all"], rel=0.5)
    assert quality.divergence(parent, parent, texts)["all"] == pytest.approx(0.0, abs=1e-9)


def test_report(folders):
    models = [folders / "int4", folders / "mx"]
    found = quality.run(parent=folders / "parent", models=models, tokens=150, lengths=(20, 60), device="cpu")
    found = json.loads(json.dumps(found))
    parent, int4, mx = found["models"]
    assert "kl" not in parent and set(int4["kl"]) == set(parent["quality"]) and "all" in int4["kl"]
    assert [entry["tokens"] for entry in mx["drift"]] == [20, 60] and 0 < mx["drift"][0]["mean"] <= mx["drift"][0][
        "max"
    ]
    assert parent["kernel"] is None and int4["kernel"]
    first, languages, drifts = quality.tables(found)
    added = [one["quality"]["all"]["loss"] - parent["quality"]["all"]["loss"] for one in (int4, mx)]
    assert first.rows[2][7] == (f"{1 - added[1] / added[0]:.0%}" if added[0] > 0 else "")
    assert first.rows[1][2] == f"{parent['bytes'] / int4['bytes']:.2f}" and len(languages.rows) == 4
    assert len(drifts.rows) == 2


def test_what_cannot_be_compared(folders, tmp_path):
    with pytest.raises(UsageError, match="same name"):
        quality.run(parent=folders / "parent", models=[folders / "parent"])
    with pytest.raises(UsageError, match="--tokens"):
        quality.run(parent=folders / "parent", models=[folders / "int4"], tokens=1)
    other = MoaiMambaForCausalLM(MoaiMambaConfig(**config.fields(**SIZE, vocab_size=5000)))
    checkpoint.save_model(tmp_path / "other", other)
    with pytest.raises(UsageError, match="vocabulary of 5,000"):
        quality.run(parent=folders / "parent", models=[tmp_path / "other"], tokens=20, lengths=(4,), device="cpu")
