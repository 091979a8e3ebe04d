"""The CPU benchmark compares what it says it compares, and prints it as a table or as JSON. Nothing here is timed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.utils import logging

from moai_core.bench import cpu, timing


@pytest.fixture(autouse=True)
def restore():
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def test_both_models_are_the_same_function():
    result = cpu.measure(32, layers=2, batch=2, length=9, vocab=50, repeats=2)
    assert result["agreement"]["logits"] < 1e-5 and result["agreement"]["loss"] < 1e-5
    for what in ("training", "prefill"):
        found = result[what]
        assert len(found["moai"]) == len(found["transformers"]) == 2 and min(found["moai"]) > 0
        assert found["ratio"] == found["transformers_median"] / found["moai_median"]


def test_turns_alternate_and_the_ratio_is_of_medians(monkeypatch):
    calls, clock = [], [0.0]

    def work(name, seconds):
        def run():
            calls.append(name)
            clock[0] += next(seconds)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = cpu.take_turns(work("a", iter([9, 1, 2, 3])), work("b", iter([9, 4, 8, 60])), 3)
    assert [sorted(calls[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert found["moai"] == [1, 2, 3] and found["transformers"] == [4, 8, 60], "the first turn is not counted"
    assert found["ratio"] == 4 and found["ratio_low"] == 4 and found["ratio_high"] == 12


def test_table_and_json(capsys):
    arguments = ["--hidden", "16", "--layers", "1", "--batch", "1", "--length", "5", "--vocab", "20", "--repeats", "1"]
    assert cpu.main([*arguments, "--threads", "1"]) == 0
    table = capsys.readouterr().out
    assert "16, training" in table and "16, prefill" in table and "agreement: loss" in table
    assert cpu.main([*arguments, "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["threads"] == 1 and report["results"][0]["hidden"] == 16
