"""A recipe small enough that a step takes milliseconds, on a text of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moai_core import recipe as recipes

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "오늘은",
    "날씨가",
    "좋다",
    "今日は天気が良い",
    "今天天气很好",
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Sixty documents of very different lengths, as jsonl; their tokens are cached once a session."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for i in range(60):
        words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(3 + (i * 13) % 50)]
        lines.append(json.dumps({"text": " ".join(words)}, ensure_ascii=False))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny(corpus):
    """tiny("train.steps=3", ...) -> a resolved recipe."""

    def make(*overrides: str):
        base = [
            "model.hidden_size=32",
            "model.intermediate_size=64",
            "model.num_hidden_layers=2",
            "model.state_size=4",
            f"data.train={corpus / 'text.jsonl'}",
            "~data.valid",
            "data.valid_fraction=0.2",
            "data.max_length=32",
            f"data.cache={corpus / 'cache'}",
            "optim.lr=1e-2",
            "optim.warmup_steps=2",
            "train.steps=6",
            "train.batch_size=2",
            "train.save_every=3",
            "train.eval_every=3",
            "train.eval_batches=2",
            "train.sample_every=0",
            "train.sample_prompts=[the]",
            "train.sample_tokens=4",
            "train.threads=1",
        ]
        return recipes.load("cpu-tiny", [*base, *overrides])

    return make


@pytest.fixture
def train_rows():
    """train_rows(run_dir) -> what must be equal, bit for bit, between an interrupted run and one that wasn't."""

    def read(run_dir: Path):
        rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
        kept = ("kind", "step", "loss", "valid_loss", "lr", "grad_norm", "tokens", "epoch", "skipped")
        return [{k: row[k] for k in kept if k in row} for row in rows]

    return read
