"""Trackers: one that fails, hangs or is missing never stops training."""

from __future__ import annotations

import threading
import time

import pytest

from moai_core.errors import UsageError
from moai_core.training import track, train


@pytest.fixture
def fake(monkeypatch):
    """fake(log, finish): a tracker named `fake` with these calls; logged values are in fake.seen."""

    def make(log=None, finish=None, opening=None):
        seen = []

        def start(run_dir, config):
            if opening is not None:
                opening()
            return log or (lambda values, step: seen.append((step, values))), finish or (lambda: None)

        monkeypatch.setitem(track.TRACKERS, "fake", ("json", start))
        return seen

    return make


def fail():
    raise ConnectionError("no route to host\nand more")


def test_what_is_logged_arrives(fake, tmp_path):
    seen, events = fake(), []
    tracker = track.Tracker("fake", tmp_path, {}, events.append)
    for step in range(50):
        tracker.log({"loss": step / 2}, step)
    tracker.close()
    assert seen == [(step, {"loss": step / 2}) for step in range(50)] and events == []


@pytest.mark.parametrize("where", ["opening", "log", "finish"])
def test_a_failing_tracker_is_reported_once(fake, tmp_path, where):
    events = []
    fake(**{where: (lambda values, step: fail()) if where == "log" else fail})
    tracker = track.Tracker("fake", tmp_path, {}, events.append)
    for step in range(5):
        tracker.log({"loss": 1.0}, step)
        time.sleep(0.01)
    tracker.close()
    assert len(events) == 1 and events[0]["event"] == "warning"
    assert events[0]["message"] == (
        "tracker fake failed (ConnectionError: no route to host); training goes on without it"
    )


def test_a_hanging_tracker_costs_no_time(fake, tmp_path):
    events, release = [], threading.Event()
    fake(log=lambda values, step: release.wait(30))
    tracker = track.Tracker("fake", tmp_path, {}, events.append, queue_size=10)
    began = time.monotonic()
    for step in range(1000):
        tracker.log({"loss": 1.0}, step)
    tracker.close(close_s=0.2)
    assert time.monotonic() - began < 5
    assert [e["message"] for e in events] == [
        "tracker fake hasn't answered for 10 records; training goes on without it"
    ]
    release.set()


def test_one_that_doesn_t_finish(fake, tmp_path):
    events, release = [], threading.Event()
    fake(finish=lambda: release.wait(30))
    track.Tracker("fake", tmp_path, {}, events.append).close(close_s=0.1)
    assert "didn't finish within 0.1 s" in events[0]["message"]
    release.set()


def test_training_goes_on_without_it(fake, tiny, tmp_path):
    import dataclasses

    events, release = [], threading.Event()
    fake(log=lambda values, step: fail())
    recipe = dataclasses.replace(tiny("train.log_every=1", "train.steps=4"), track=("fake",))
    assert train(recipe, output=tmp_path, on_event=events.append).step == 4
    assert sum("tracker fake failed" in e.get("message", "") for e in events) == 1
    release.set()


def test_a_missing_package_is_said_at_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(track.TRACKERS, "wandb", ("no_such_package", lambda *a: None))
    with pytest.raises(UsageError, match="track: wandb is not installed") as caught:
        train(tiny("track=[wandb]"), output=tmp_path / "run")
    assert "pip install 'moai[track]'" in caught.value.hint and not (tmp_path / "run").exists()


def test_tensorboard_writes_its_files(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny("track=[tensorboard]", "train.log_every=2", "train.eval_every=6"), output=tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 6]
    assert [e.step for e in events.Scalars("valid_loss")] == [6]
