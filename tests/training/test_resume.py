"""A run that was killed, stopped or resumed ends bit for bit as one that never was (trials.py does the work)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder():
    """In memory where there is one: the trials write hundreds of checkpoints, and no power fails."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None, prefix="moai-") as path:
        yield Path(path)


def trials(mode: str, folder: Path, count: int, processes: int = 1) -> list[dict]:
    """The reports of `processes` runs of trials.py side by side, each with its share of `count` and its own seed."""
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kernels = {"NUMBA_CACHE_DIR": f"{os.environ['MOAI_CACHE']}/kernels"}  # compiled once
    environment = {**os.environ, **one_thread, **kernels, "PYTHONPATH": str(ROOT)}
    started = []
    for seed in range(processes):
        (folder / str(seed)).mkdir()
        command = [sys.executable, Path(__file__).with_name("trials.py"), mode, folder / str(seed)]
        command += [str(-(-count // processes)), str(seed)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    reports = []
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        reports.append(json.loads(out))
    return reports


@pytest.mark.parametrize("kills", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(folder, kills):
    reports = trials("kill", folder, kills, processes=2)
    assert not [failure for report in reports for failure in report["failures"]]
    moments = {step: number for report in reports for step, number in report["moments"].items()}
    assert sum(sum(report["moments"].values()) for report in reports) >= kills
    assert len(moments) > 5, f"the kills must fall all over the run, not only at steps {moments}"


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_signals_save_and_exit(folder, count):
    (report,) = trials("signal", folder, count)
    assert not report["failures"]
    assert report["codes"].get("143", 0) and report["codes"].get("130", 0)


def test_resume_matrix(folder):
    (report,) = trials("matrix", folder, 1)
    assert not report["failures"] and len(report["done"]) == 4


def test_a_kill_between_save_and_purge_leaves_nothing_for_ever(tmp_path):
    """The step that the purge didn't come to goes when the run is opened again."""
    import shutil

    from moai_core import recipe
    from moai_core.training.loop import train

    (tmp_path / "text.txt").write_text("상태는 커지지 않는다. " * 40, encoding="utf-8")
    shape = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", "data.max_length=16"]
    data = [f"data.train={tmp_path / 'text.txt'}", "~data.valid", "data.valid_fraction=0"]
    every = ["train.steps=3", "train.save_every=1", "train.keep_last=2", "train.sample_every=0", "train.threads=1"]
    made = recipe.load("cpu-tiny", [*shape, *data, *every])
    train(made, output=tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "step-2", tmp_path / "run" / "step-1")
    train(made, output=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-2", "step-3"]


def test_the_best_checkpoint_is_kept_on_request(tmp_path, monkeypatch):
    """Saved at the step that had it, though no checkpoint was due, and through a later start of the same run."""
    from moai_core import recipe
    from moai_core.training import loop

    (tmp_path / "text.txt").write_text("상태는 커지지 않는다. " * 40, encoding="utf-8")
    shape = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16", "data.max_length=16"]
    data = [f"data.train={tmp_path / 'text.txt'}", "~data.valid", "data.valid_fraction=0.2"]
    every = ["train.save_every=2", "train.keep_last=1", "train.eval_every=1", "train.sample_every=0", "train.threads=1"]
    losses = iter([5.0, 4.0, 3.0, 3.5, 4.5, 3.2, 3.1])
    monkeypatch.setattr(
        loop, "validate", lambda *_, **__: {"loss": next(losses), "perplexity": 1.0, "bits_per_byte": 1.0}
    )

    def steps(last, best):
        made = recipe.load("cpu-tiny", [*shape, *data, *every, f"train.steps={last}", f"train.keep_best={best}"])
        result = loop.train(made, output=tmp_path / "run")
        assert result.best["step"] == 3
        return sorted(path.name for path in (tmp_path / "run").glob("step-*"))

    assert steps(5, "true") == ["step-3", "step-5"]
    assert steps(6, "true") == ["step-3", "step-6"]
    assert steps(7, "false") == ["step-7"]
