"""Bytes per token, counted another way; names, files and folders; what is no tokenizer."""

from __future__ import annotations

import json

import pytest

from moai_core.data.tokenize import load_tokenizer
from moai_core.errors import CheckpointError, StorageError, UsageError
from moai_core.paths import TOKENIZERS
from moai_core.tokenizer.evaluate import evaluate, open_tokenizer


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "ko.txt").write_text("안녕하세요. 반갑습니다.\n<|im_end|>\n", encoding="utf-8")
    (tmp_path / "en.jsonl").write_text(
        "".join(json.dumps({"text": f"Record {n} of the file.\n"}) + "\n" for n in range(300)), encoding="utf-8"
    )
    return tmp_path


def test_counts(texts):
    report = evaluate(["moai_tiny"], [str(texts / "ko.txt"), f"en={texts / 'en.jsonl'}"])
    (row,) = report["tokenizers"]
    assert report["labels"] == ["ko", "en"] and row["vocab_size"] == 6144 and row["exact"]
    tokenizer = load_tokenizer("moai_tiny")
    for label, parts in (
        ("ko", [(texts / "ko.txt").read_text(encoding="utf-8")]),
        ("en", [f"Record {n} of the file.\n" for n in range(300)]),
    ):
        tokens = sum(len(tokenizer.encode(part, split_special_tokens=True)) for part in parts)
        size = sum(len(part.encode()) for part in parts)
        assert row["texts"][label] == {
            "bytes": size, "characters": sum(map(len, parts)), "tokens": tokens, "bytes_per_token": size / tokens,
        }  # fmt: skip
    ratios = [row["texts"][label]["bytes_per_token"] for label in ("ko", "en")]
    assert row["mean"] == pytest.approx(2 / (1 / ratios[0] + 1 / ratios[1]))


def test_one_label_of_several_files_and_a_limit(texts):
    data = [f"all={texts / 'ko.txt'}", f"all={texts / 'en.jsonl'}"]
    size = sum(text["bytes"] for text in evaluate(["moai_tiny"], data)["tokenizers"][0]["texts"].values())
    assert size == (texts / "ko.txt").stat().st_size + sum(len(f"Record {n} of the file.\n") for n in range(300))
    limited = evaluate(["moai_tiny"], data, limit=100)["tokenizers"][0]["texts"]["all"]["bytes"]
    assert 100 <= limited < 150


def test_a_tokenizer_that_loses_text_is_not_exact(texts):
    from tokenizers import Tokenizer

    state = json.loads((TOKENIZERS / "moai_tiny" / "tokenizer.json").read_text(encoding="utf-8"))
    state["normalizer"] = {"type": "Lowercase"}
    Tokenizer.from_str(json.dumps(state)).save(str(texts / "lower.json"))
    rows = evaluate(["moai_tiny", str(texts / "lower.json")], [str(texts / "en.jsonl")])["tokenizers"]
    assert [row["exact"] for row in rows] == [True, False]


def test_names(texts):
    by_name = open_tokenizer("moai_tiny")[1]
    assert by_name == open_tokenizer(str(TOKENIZERS / "moai_tiny"))[1]
    assert by_name == open_tokenizer(str(TOKENIZERS / "moai_tiny" / "tokenizer.json"))[1]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", UsageError, "no such folder or name"),
        (
            "some/name",
            StorageError,
            r"^tokenizer 'some/name': no such folder, and the hub can't be reached \(.*refused\)$",
        ),
        ("FOLDER", UsageError, "no tokenizer.json in it"),
        ("FOLDER/broken.json", CheckpointError, "not valid JSON"),
        ("FOLDER/empty.json", CheckpointError, "it has no model"),
        ("FOLDER/odd.json", CheckpointError, "not a usable tokenizer"),
    ],
)
def test_no_tokenizer(name, error, message, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail("waits for another try"))
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "empty.json").write_text("{}", encoding="utf-8")
    (tmp_path / "odd.json").write_text('{"model": {"type": "Odd"}}', encoding="utf-8")
    with pytest.raises(error, match=message):
        open_tokenizer(name.replace("FOLDER", str(tmp_path)))
