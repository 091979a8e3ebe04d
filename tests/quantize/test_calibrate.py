"""Calibration: sequences from text without the evaluation's, and from ids."""

from __future__ import annotations

import json
import re

import pytest
import torch

from moai_core.data.tokenize import load_tokenizer
from moai_core.errors import DataError, UsageError
from moai_core.quantize.calibrate import from_text, from_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("moai_tiny")


def write(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def story(number, words=12):
    return f"Story {number}. " + " ".join(f"w{(number * 7919 + i * i) % 997}" for i in range(words))


def test_sequences_of_text_are_its_own(tmp_path, tokenizer):
    documents = [story(i) for i in range(60)]
    path = write(tmp_path / "text.jsonl", documents)
    made = from_text(path, tokenizer, sequences=8, length=256)
    assert made.ids.shape == (8, 256) and made.ids.dtype == torch.int64
    again = from_text(path, tokenizer, sequences=8, length=256)
    assert torch.equal(made.ids, again.ids) and made.key == again.key
    other = from_text(path, tokenizer, sequences=8, length=256, seed=1)
    assert other.key != made.key
    known = {(*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id) for text in documents}
    rows = zip(made.ids, made.seq_idx, strict=True)
    seen = [tuple(row[marks == n].tolist()) for row, marks in rows for n in range(int(marks.max()) + 1)]
    assert len(seen) == len(set(seen)) and set(seen) <= known, "whole documents, none twice"
    assert made.tokens == sum(map(len, seen)) > 0.8 * 8 * 256


def test_long_documents_fill_rows_without_padding(tmp_path, tokenizer):
    path = write(tmp_path / "text.jsonl", [story(i, 900) for i in range(2)])
    made = from_text(path, tokenizer, sequences=4, length=128)
    assert made.tokens == 4 * 128


def test_the_evaluation_text_is_never_taken(tmp_path, tokenizer):
    documents = [story(i) for i in range(60)]
    path = write(tmp_path / "text.jsonl", documents)
    held = write(tmp_path / "valid.jsonl", [documents[3], documents[40], story(1000)])
    made = from_text(path, tokenizer, sequences=6, length=256, avoid=[held])
    text = "\n".join(tokenizer.batch_decode(made.ids))
    assert "Story 3." not in text and "Story 40." not in text and "Story 4." in text
    assert 0 < made.left_out <= 2
    everything = from_text(path, tokenizer, sequences=12, length=256)
    assert "Story 3." in "\n".join(tokenizer.batch_decode(everything.ids))
    with pytest.raises(DataError, match="left out") as told:
        from_text(path, tokenizer, sequences=6, length=256, avoid=[path])
    assert "\n" not in told.value.message


def test_a_recipes_held_out_part_is_left_out(tmp_path, tokenizer):
    path = write(tmp_path / "text.jsonl", [story(i) for i in range(60)])
    with pytest.raises(DataError, match="shorter than needed"):
        from_text(path, tokenizer, sequences=8, length=256, valid_fraction=0.5)
    made = from_text(path, tokenizer, sequences=4, length=256, valid_fraction=0.5)
    assert made.key != from_text(path, tokenizer, sequences=4, length=256).key


def test_text_that_is_too_short_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "text.jsonl", [story(0), story(1)])
    with pytest.raises(
        DataError, match=r"needed: 512 sequences of 2,048 tokens are 1,048,576 tokens, and it gives \d+"
    ):
        from_text(path, tokenizer)
    more = write(tmp_path / "more.jsonl", [story(i) for i in range(40)])
    with pytest.raises(DataError) as caught:
        from_text(more, tokenizer)
    sequences, length = re.search(r"--calib-sequences (\d+) --calib-length (\d+)$", caught.value.hint).groups()
    assert from_text(more, tokenizer, sequences=int(sequences), length=int(length)).tokens >= 2 * 256
    with pytest.raises(DataError, match="shorter than needed"):
        from_text(path, tokenizer, sequences=1, length=2048)
    with pytest.raises(UsageError, match="length must be at least 1"):
        from_text(path, tokenizer, length=0)
    with pytest.raises(UsageError, match="can't be kept apart"):
        from_text(path, tokenizer, sequences=1, length=16, avoid=["hf://some/data"])


def test_mixtures_take_turns_and_name_the_source_that_ends(tmp_path, tokenizer):
    many = write(tmp_path / "many.jsonl", [story(i) for i in range(60)])
    few = write(tmp_path / "few.jsonl", ["한국어 문장이 하나 있다. " * 12])
    made = from_text([{"path": many, "weight": 3}, {"path": few, "weight": 1}], tokenizer, sequences=4, length=64)
    assert sum("한국어" in text for text in tokenizer.batch_decode(made.ids)) == 1
    with pytest.raises(DataError, match="source 2 of the calibration text is shorter"):
        from_text([{"path": many, "weight": 1}, {"path": few, "weight": 1}], tokenizer, sequences=16, length=64)


def test_ids_in_every_form_of_the_specification():
    ids = torch.randint(0, 97, (3, 8))
    assert torch.equal(from_tokens(ids).ids, ids) and from_tokens(ids).seq_idx is None
    assert torch.equal(from_tokens(list(ids)).ids, ids) and torch.equal(from_tokens(list(ids.split(1))).ids, ids)
    assert from_tokens([{"input_ids": ids}]).key == from_tokens(ids).key
    uneven = from_tokens([ids[0], ids[1, :5]])
    assert uneven.seq_idx.tolist() == [[0] * 8, [0] * 5 + [-1] * 3] and uneven.tokens == 13
    masked = from_tokens({"input_ids": ids[:2], "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])})
    assert torch.equal(masked.seq_idx, uneven.seq_idx)
    for bad in (
        torch.rand(2, 3),
        torch.ones(2, 3, 4, dtype=torch.int64),
        [],
        [torch.zeros(0, dtype=torch.int64)],
        ["글"],
        ["", 1],
    ):
        with pytest.raises(UsageError, match="calibration data"):
            from_tokens(bad)
    with pytest.raises(UsageError, match="end of a row"):
        from_tokens({"input_ids": ids[:1], "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])})
