"""The CPU benchmark compares what it says it compares, and prints it as a table or as JSON. Nothing here is timed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.utils import logging

from moai_core.bench import cpu


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
        timing = result[what]
        assert len(timing["moai"]) == len(timing["transformers"]) == 2 and min(timing["moai"]) > 0
        assert timing["ratio"] == timing["transformers_median"] / timing["moai_median"]


def test_turns_alternate_and_the_ratio_is_of_medians(monkeypatch):
    calls, clock = [], [0.0]

    def work(name, seconds):
        def run():
            calls.append(name)
            clock[0] += next(seconds)

        return run

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    timing = cpu.take_turns(work("a", iter([9, 1, 2, 3])), work("b", iter([9, 4, 8, 60])), 3)
    assert calls == ["a", "b"] * 4
    assert timing["moai"] == [1, 2, 3] and timing["transformers"] == [4, 8, 60], "the first turn is not counted"
    assert timing["ratio"] == 4 and timing["ratio_low"] == 4 and timing["ratio_high"] == 20


def test_table_and_json(capsys):
    arguments = ["--hidden", "16", "--layers", "1", "--batch", "1", "--length", "5", "--vocab", "20", "--repeats", "1"]
    assert cpu.main([*arguments, "--threads", "1"]) == 0
    table = capsys.readouterr().out
    assert "16, training" in table and "16, prefill" in table and "agreement: loss" in table
    assert cpu.main([*arguments, "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["threads"] == 1 and report["results"][0]["hidden"] == 16
