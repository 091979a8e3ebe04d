"""The benchmarks on a GPU: they run, measure the device and not the host, and say what they measured."""

from __future__ import annotations

import pytest
import torch

from moai_core import scan as kernels
from moai_core.bench import lengths, scan, timing, train
from moai_core.bench.timing import Case, Clock
from moai_core.bench.work import Shape
from moai_core.device import place

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def clock():
    return Clock(place("cuda"))


def test_the_host_does_not_show_in_the_time(clock):
    """The host dawdles for two milliseconds between the events; the GPU adds one number."""
    x = torch.zeros(1, device=clock.device)

    def work():
        end = timing.time.perf_counter() + 0.002
        while timing.time.perf_counter() < end:
            pass
        return x + 1

    found = timing.summary(timing.take_turns({"add": work}, clock, repeats=5)["add"], clock)
    assert found.host > 0.002 and found.median < 0.001, found


def test_out_of_memory_is_left_out(clock):
    size = torch.cuda.get_device_properties(clock.device).total_memory
    cases = [
        Case("fine", lambda n: lambda: torch.ones(n, device=clock.device)),
        Case("huge", lambda n: lambda: torch.empty(2 * size, dtype=torch.uint8, device=clock.device)),
    ]
    found = timing.compare(cases, 8, clock, limit=20)
    assert found.left_out == {"huge": "out of memory"} and "fine" in found.timings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scan(dtype):
    found = scan.measure(
        [Shape(2, 300, 64)], device=place("cuda"), dtype=dtype, resets=kernels.BACKENDS.get("cuda") is not None,
        repeats=3,
    )  # fmt: skip
    assert [note for note in found["notes"] if "WRONG" in note] == []
    assert found["environment"]["gpu"] == torch.cuda.get_device_name()
    for row in found["results"]:
        assert row["timings"]["moai"]["host_ms"] > 0 and not (set(row["left_out"]) - {"mamba_ssm"})


def test_lengths():
    found = lengths.run(length=512, hidden=128, repeats=2, device="cuda")
    assert all(set(row["timings"]) == set(lengths.NAMES) for row in found["results"]) and found["dtype"] == "bf16"


@pytest.mark.parametrize("optimizer", ["torch", "adamw_bf16"])
def test_training(optimizer):
    found = train.run(
        device="cuda", preset="2b", layers=1, batches=["1"], lengths=["64"], steps=2, prefill=["128"], chunk=50,
        optimizer=optimizer, against=["transformers"],
        overrides=["model.hidden_size=128", "model.intermediate_size=256", "model.vocab_size=1000"],
    )  # fmt: skip
    ours, theirs = found["results"]
    assert ours["peak_bytes"] > 0 and ours["reserved_bytes"] >= ours["peak_bytes"] and 0 < ours["mfu"] < 1
    assert ours["loss"] == pytest.approx(6.9, abs=0.5) and theirs["loss"] == pytest.approx(6.9, abs=0.5)
    assert found["precision"] == "bf16" and found["prefill"][0]["prefill"]["median_ms"] > 0
