"""How times are taken: turns, warm-up, what is left out; checked with a clock that the test moves."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from moai_core.bench import timing
from moai_core.bench.timing import Case, Clock


@pytest.fixture
def now(monkeypatch):
    """Seconds on the wall, moved by the work itself."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    return clock


def lasting(now, seconds, log=None, name=""):
    def work():
        if log is not None:
            log.append(name)
        now[0] += seconds

    return work


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 18, 101])
def test_quartiles_are_numpys(count):
    values = list(np.random.default_rng(count).exponential(size=count))
    assert timing.quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_turns_alternate_in_changing_order_and_the_first_is_not_counted(now):
    log = []
    works = {name: lasting(now, 0.1, log, name) for name in "abc"}
    found = timing.take_turns(works, Clock(torch.device("cpu")), repeats=20)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 21 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3, "nobody always follows the same other"
    assert {len(calls) for calls in found.values()} == {20}
    assert all(seconds == pytest.approx(0.1) for calls in found.values() for seconds, _ in calls)
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize(("seconds", "count"), [(1e-6, 50), (0.1, 10), (0.3, 3), (2.0, 3), (0.0, 50)])
def test_slow_work_is_called_less_often(now, seconds, count):
    clock = Clock(torch.device("cpu"))
    assert len(timing.take_turns({"a": lasting(now, seconds)}, clock)["a"]) == count
    assert timing.calls(seconds, None) == count + (seconds <= 1)
    assert timing.calls(seconds, 7) == 7 + (seconds <= 1)


def test_a_summary_has_median_and_quartiles():
    calls = [(seconds, 0.5) for seconds in (5.0, 1.0, 2.0, 100.0, 3.0)]
    found = timing.summary(calls, Clock(torch.device("cpu")))
    assert found == timing.Timing(3.0, 2.0, 5.0, 5)
    assert found.to_dict() == {"median_ms": 3000.0, "low_ms": 2000.0, "high_ms": 5000.0, "repeats": 5}


def test_out_of_memory_leaves_one_out_and_measures_the_others(now):
    def full():
        raise torch.OutOfMemoryError("no")

    cases = [Case("full", lambda n: full), Case("fine", lambda n: lasting(now, 0.1))]
    found = timing.compare(cases, 8, Clock(torch.device("cpu")), limit=20)
    assert found.left_out == {"full": "out of memory"} and found.timings["fine"].median == pytest.approx(0.1)

    def cant(length):
        raise torch.OutOfMemoryError("no inputs either")

    found = timing.compare([Case("cant", cant)], 8, Clock(torch.device("cpu")), limit=20)
    assert found.left_out == {"cant": "out of memory"} and not found.timings


def test_what_would_take_too_long_is_left_out_before_it_runs(now):
    asked = []

    def quadratic(length):
        asked.append(length)
        return lasting(now, 1e-6 * length**2)

    clock = Clock(torch.device("cpu"))
    found = timing.compare([Case("slow", quadratic, order=2.0)], 8192, clock, limit=20)
    assert found.left_out["slow"] == "a call would take about 67.1 s (3 calls, limit 20 s)" and max(asked) < 8192
    assert timing.compare([Case("slow", quadratic, order=2.0)], 2048, clock, limit=20).timings["slow"].repeats == 3
    known = timing.compare([Case("slow", quadratic, order=2.0)], 2048, clock, limit=20, known={"slow": 60.0})
    assert known.left_out["slow"].startswith("a call would take about 60 s")


def test_an_overhead_is_not_mistaken_for_growth(now):
    """A call of which most is the same at every length: a quarter of the length tells more than a sixteenth."""
    case = Case("flat", lambda length: lasting(now, 0.05 + 1e-9 * length**2), order=2.0)
    assert "flat" in timing.compare([case], 4096, Clock(torch.device("cpu")), limit=10).timings


def test_what_does_not_fit_into_memory_is_left_out():
    case = Case("huge", lambda n: pytest.fail("its inputs were made"), memory=1e15)
    found = timing.compare([case], 100, Clock(torch.device("cpu")), limit=20)
    assert "GB of memory" in found.left_out["huge"]


def test_rotation_gives_every_call_another_set():
    seen = []
    sets = timing.Rotation("xyz")
    one, other = sets.calls(seen.append), sets.calls(seen.append)
    for _ in range(3):
        one(), other()
    assert "".join(seen) == "xyzxyz"
    clock = Clock(torch.device("cpu"))
    assert timing.sets_of(1 << 40, clock) == 1 and timing.sets_of(1, clock) == 8
    assert timing.sets_of(clock.cache, clock) == 2


@pytest.mark.parametrize(("seconds", "words"), [(0.0123, "12.3 ms"), (1.5, "1.5 s"), (75, "75 s"), (600, "10 min")])
def test_words(seconds, words):
    assert timing.words(seconds) == words
