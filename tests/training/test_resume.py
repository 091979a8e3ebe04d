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
