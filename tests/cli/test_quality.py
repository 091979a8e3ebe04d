"""`moai bench twin | context | needle | samples | quality` on the command line."""

from __future__ import annotations

import json

import pytest


def test_context_needle_and_samples(moai, folder, tmp_path):
    code, out, _ = moai("bench", "context", "-m", folder, "--max-length", "100", "--tokens", "120", "--json")
    assert code == 0 and {one["language"] for one in json.loads(out)["results"]} >= {"ko", "ja", "zh", "en", "all"}
    code, out, _ = moai("bench", "needle", "-m", folder, "--lengths", "64", "--depths", "50", "--trials", "1",
                        "--languages", "ko,zh", "--plot", "n.png", "--markdown")  # fmt: skip
    assert code == 0 and "| chance |" in out and "| 10% (0.001%) |" in out and (tmp_path / "n.png").is_file()
    code, out, _ = moai("bench", "samples", "-m", folder, "-n", "2", "--json")
    assert code == 0 and len(json.loads(out)["samples"]) == 10


def test_quality_lays_models_beside_their_parent(moai, folder, tmp_path):
    assert moai("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "q4")[0] == 0
    words = ["--parent", folder, "-m", "q4", "--tokens", "120", "--lengths", "50,100"]
    code, out, _ = moai("bench", "quality", *words, "--json")
    parent, other = json.loads(out)["models"]
    assert code == 0 and other["bytes"] < parent["bytes"] and [d["tokens"] for d in other["drift"]] == [50, 100]
    code, out, _ = moai("bench", "quality", *words, "--markdown")
    assert code == 0 and "| q4 |" in out
    code, _, err = moai("bench", "quality", "--parent", folder, "-m", folder)
    assert code == 2 and "two of the models have the same name" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("needle", "--languages", "fr"), "--languages: unknown name 'fr'"),
        (("needle", "--lengths", "8"), "--lengths must be whole numbers >= 32"),
        (("context", "--max-length", "1"), "--max-length must be at least 2"),
        (("samples", "-t", "nan"), "--temperature must be a number >= 0"),
        (("samples", "-n", "0"), "--max-new-tokens must be at least 1"),
        (("context", "--plot", "x.pdf"), "--plot must name a PNG"),
    ],
)
def test_wrong_words_are_one_line(moai, folder, words, message):
    code, _, err = moai("bench", *words, "-m", folder)
    assert code == 2 and message in err


def test_twin(moai, tmp_path):
    (tmp_path / "ko.jsonl").write_text(
        "".join(
            json.dumps({"text": "오늘은 날씨가 좋다 " * (1 + n % 5)}, ensure_ascii=False) + "\n" for n in range(30)
        ),
        encoding="utf-8",
    )
    words = ["model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1", "model.state_size=2",
             "data.train=ko.jsonl", "data.valid=ko.jsonl", "data.max_length=32", "train.steps=2", "train.eval_every=2",
             "train.eval_batches=1", "train.sample_every=0", "train.threads=1", "data.cache=cache"]  # fmt: skip
    code, out, _ = moai("bench", "twin", *words, "--context", "8", "--output", "pair", "--json")
    found = json.loads(out)
    assert code == 0 and set(found["models"]) == {"moai", "llama"} and found["models"]["llama"]["steps"] == 2
    code, out, err = moai("bench", "twin", *words, "--lr", "x")
    assert code == 2 and "--lr must be numbers" in err
