"""A card says what the folder, the run's records and the reports say, and its files belong to the folder's manifest."""

from __future__ import annotations

import json

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, checkpoint, storage
from moai_core import recipe as recipes
from moai_core.bench import card, needle, samples
from moai_core.data.tokenize import load_tokenizer
from moai_core.errors import CheckpointError, UsageError
from moai_core.training import metrics

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}


@pytest.fixture
def folder(tmp_path):
    tokenizer = load_tokenizer("moai_tiny")
    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**SIZE, vocab_size=len(tokenizer)))
    return checkpoint.save_model(tmp_path / "모델", model, tokenizer)


@pytest.fixture
def run(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    (place / "recipe.yaml").write_text(recipes.load("cpu-tiny").to_yaml(), encoding="utf-8")
    lines = [
        {
            "kind": "train",
            "step": n,
            "loss": 5 - n,
            "lr": n / 1000,
            "tokens": 100 * n,
            "tokens_per_s": 70.0 + n,
            "mfu": 0.3,
        }
        for n in range(1, 4)
    ]
    one = {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": 1.25, "tokens": 1234, "bytes": 5678}
    sets = {"ko": one, "zh": {**one, "bits_per_byte": 1.5}}
    lines.append({"kind": "valid", "step": 3, "valid_loss": 2.5, **{k: one[k] for k in list(one)[1:]}, "sets": sets})
    (place / metrics.METRICS).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return place


@pytest.fixture
def mix(tmp_path):
    source = {
        "name": "poems",
        "lang": "zh",
        "kind": "old verse",
        "attribution": "A | B",
        "licence": "CC0-1.0",
        "weight": 2,
    }
    kept = {"train": {"units": 3, "records": 3, "bytes": 4321}, "valid": {"units": 1, "records": 1, "bytes": 9}}
    held = {"name": "only-held-out", "lang": "fr", "licence": "MIT", "kept": {"valid": kept["valid"]}}
    value = {"version": 1, "name": "m", "description": "a mix", "sources": [{**source, "kept": kept}, held]}
    (tmp_path / "mix.json").write_text(json.dumps(value), encoding="utf-8")
    return tmp_path / "mix.json"


def test_a_card_says_what_was_recorded(folder, run, mix):
    made = samples.run(model=folder, tokens=2, device="cpu")
    found = needle.run(models=[folder], lengths=[64], depths=[50], languages=["ko"], trials=1, device="cpu")
    score = {
        "model": "m",
        "data": "x/book.txt",
        "loss": 3.0,
        "perplexity": 20.0,
        "bits_per_byte": 1.75,
        "tokens": 7,
        "bytes": 9,
    }
    model = checkpoint.load_model(folder)
    count = sum(p.numel() for p in model.parameters())
    reports = [json.loads(json.dumps(one)) for one in (score, found, made)]
    path = card.write(
        folder, title="moai-test", runs=[run], data=[mix], reports=reports, licence="mit", limits=["It limps."]
    )
    text = path.read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: moai\n") and "license: mit" in text and "language: [zh]" in text
    for words in (
        f"{count:,} parameters", "| run | 3 | 300 | 100 | 0.003 | cosine |", "72 (cpu) | 30.0% | 3.0000 |", "![losses of run](loss.png)",
        "| poems | zh | old verse | A / B | CC0-1.0 | 4,321 | 2 |", "4,321 bytes of text", "| zh (validation) | 1.5000 |",
        "| all (validation) | 1.2500 | 12.180 | 2.5000 | 1,234 | 5,678 |", "| book.txt | 1.7500 |", "| chance |", "- It limps.",
        made["samples"][2]["prompt"] + "⟶" + made["samples"][2]["text"],
    ):  # fmt: skip
        assert words in text, words
    assert "only-held-out" not in text
    storage.verify(folder)
    assert {"README.md", "loss.png"} <= set(storage.read_manifest(folder))
    assert torch.equal(checkpoint.load_model(folder).lm_head.weight, model.lm_head.weight)
    # Written again it replaces itself, but for what other commands had to say.
    path.write_text(text + "\n## Quantization\n\nRounded.\n\n## Other\n\nGone.\n", encoding="utf-8")
    assert "## Quantization\n\nRounded." in card.make(folder, title="t")["README.md"].decode()
    assert "Gone." not in card.make(folder, title="t")["README.md"].decode()
    path.write_text(text, encoding="utf-8")
    card.write(folder, title="another")
    assert "moai-test" not in path.read_text(encoding="utf-8")
    storage.verify(folder)


def test_sources_travel_in_a_file_where_the_mix_has_one(folder, mix, run):
    """Then the card sums them up, and says what share of the text asks for its own licence."""
    value = json.loads(mix.read_text())
    value["sources"] += [
        {**value["sources"][0], "name": n, "kind": n, "lang": "ko", "licence": "CC-BY-SA-4.0"} for n in "ab"
    ]
    value["sources"] += [
        {**value["sources"][0], "name": "c", "kind": "old verse", "licence": "public domain (package GPL-3)"}
    ]
    mix.write_text(json.dumps(value))
    (mix.parent / "ATTRIBUTION.md").write_text("# 누가 썼나\n\n| a | CC-BY-SA-4.0 |\n", encoding="utf-8")
    rows = [json.loads(line) for line in (run / metrics.METRICS).read_text().splitlines()]
    (run / metrics.METRICS).write_text("\n".join(map(json.dumps, [{**rows[-1], "step": 1}, *rows])))
    card.write(folder, title="moai-30m", runs=[run], data=[mix, mix.parent], licence="apache-2.0")
    text = (folder / "README.md").read_text(encoding="utf-8")
    for words in (
        "| ko | a, b | 2 | 8,642 | 8,642 |", "[ATTRIBUTION.md](ATTRIBUTION.md)", "published under apache-2.0", "50% of their bytes",
        "    moai chat\n", "![validation sets of run](valid.png)",
    ):  # fmt: skip
        assert words in text, words
    assert "| poems |" not in text
    assert (folder / "ATTRIBUTION.md").read_text(encoding="utf-8").count("# 누가 썼나") == 2
    assert (folder / "valid.png").read_bytes().startswith(b"\x89PNG")
    storage.verify(folder)


def test_nothing_is_made_up(folder):
    text = card.make(folder, title="bare")["README.md"].decode()
    assert (
        "## Training" not in text and "## Data" not in text and "license" not in text and "## What it can't do" in text
    )


def test_what_cannot_be_read_is_told(folder, run, mix, tmp_path, capsys):
    (run / metrics.METRICS).write_text("")
    with pytest.raises(CheckpointError, match="records no step"):
        card.make(folder, title="t", runs=[run])
    with pytest.raises(UsageError, match="has no place in a card"):
        card.make(folder, title="t", reports=[{"benchmark": "scan"}])
    with pytest.raises(CheckpointError, match=r"not the mix\.json"):
        card.make(folder, title="t", data=[folder / "config.json"])
    (tmp_path / "x.json").write_text("[]")
    assert card.main(["--model", str(folder), "--report", str(tmp_path / "x.json")]) == 2
    assert "not a report" in capsys.readouterr().err and not (folder / "README.md").exists()
    assert card.main(["--model", str(folder)]) == 0 and (folder / "README.md").exists()
