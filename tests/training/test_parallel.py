"""Two processes on a CPU over gloo: the same run as one, and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moai_core import checkpoint, storage
from moai_core.training import train

pytestmark = pytest.mark.slow

# A rank of a run. FAULT=nan: rank 1's loss is NaN in the steps of STEPS. FAULT=kill: rank 1 kills itself at step 4.
# FAULT=hang: rank 1 stops answering at step 4. FAULT=term: both get SIGTERM-like requests at different moments.
RANK = """
import json, math, os, signal, sys, time
import torch
torch.set_num_threads(1)
from moai_core.errors import MoaiError
from moai_core.model import MoaiMambaForCausalLM
from moai_core.recipe import Recipe
from moai_core.training import StopFlag, train

fault, steps, rank = os.environ.get("FAULT"), json.loads(os.environ.get("STEPS", "[]")), int(os.environ["RANK"])
forward, calls = MoaiMambaForCausalLM.forward, [0]

def faulty(self, *args, **kwargs):
    out = forward(self, *args, **kwargs)
    calls[0] += self.training
    if rank == 1 and self.training and calls[0] in steps:
        if fault == "nan":
            out.loss = out.loss * math.nan
        elif fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "hang":
            time.sleep(1000)
        elif fault == "term":
            os.kill(os.getpid(), signal.SIGTERM)
    return out

MoaiMambaForCausalLM.forward = faulty
recipe = Recipe.from_dict(json.loads(sys.argv[1]))
flag = StopFlag()
try:
    with flag.catching():
        train(recipe, output=sys.argv[2], stop=flag, on_event=lambda e: print(json.dumps(e), flush=True))
except MoaiError as exc:
    print("error:", exc.message, file=sys.stderr)
    sys.stderr.flush()
    os._exit(exc.exit_code)
"""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def two(tmp_path):
    """two(recipe, run, FAULT=..., ...) -> [(exit code, stdout, stderr, seconds)] of both ranks."""
    running = []

    def start(recipe, run: Path, **environment: str):
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        command = [sys.executable, "-c", RANK, json.dumps(recipe.to_dict()), str(run)]
        outputs = []
        for rank in range(2):
            own = {
                **os.environ,
                **shared,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                **environment,
            }
            files = [open(tmp_path / f"{run.name}-{rank}.{kind}", "w+") for kind in ("out", "err")]  # noqa: SIM115
            running.append(subprocess.Popen(command, env=own, stdout=files[0], stderr=files[1]))
            outputs.append(files)
        began, pair, ended = time.monotonic(), running[-2:], {}
        while len(ended) < 2 and time.monotonic() - began < 240:
            ended |= {i: time.monotonic() for i, p in enumerate(pair) if p.poll() is not None and i not in ended}
            if environment.get("FAULT") == "hang" and 0 in ended:
                break
            time.sleep(0.05)
        texts = []
        for out, err in outputs:
            for file in (out, err):
                file.seek(0)
            texts.append((out.read(), err.read()))
            out.close()
            err.close()
        return [(pair[i].poll(), *texts[i], ended.get(i)) for i in range(2)]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_take_the_steps_of_one(tiny, two, tmp_path):
    one = tiny("train.batch_size=2", "train.accumulation=4")
    train(one, output=tmp_path / "one")
    found = two(tiny("train.batch_size=2", "train.effective_batch=8"), tmp_path / "two")
    assert [f[0] for f in found] == [0, 0], found
    assert found[1][1] == "", "only rank 0 reports"
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in {"loss", "grad_norm", "valid_loss", "bits_per_byte"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=2e-5), (a, b)
        assert a["tokens"] == b["tokens"]
    first, second = (checkpoint.load_model(tmp_path / d).state_dict() for d in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


def test_a_nan_on_one_rank_is_skipped_by_both(tiny, two, tmp_path):
    recipe = tiny("train.save_every=1", "train.keep_last=9", "train.eval_every=0")
    found = two(recipe, tmp_path / "run", FAULT="nan", STEPS="[3]")
    assert [f[0] for f in found] == [0, 0], found
    assert [row["step"] for row in rows(tmp_path / "run") if row.get("skipped")] == [3]
    before, after = (checkpoint.load_model(tmp_path / f"run/step-{n}").state_dict() for n in (2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before)
    found = two(recipe, tmp_path / "stop", FAULT="nan", STEPS="[3, 4, 5]")
    assert [f[0] for f in found] == [5, 5], found
    assert f"last good checkpoint: {tmp_path}/stop/step-4" in found[0][2]


def test_a_killed_rank_ends_the_other_and_resuming_works(tiny, two, tmp_path):
    recipe = tiny("train.eval_every=0", "train.save_every=2")
    whole = two(recipe, tmp_path / "whole")
    assert [f[0] for f in whole] == [0, 0], whole
    found = two(recipe, tmp_path / "run", FAULT="kill", STEPS="[4]")
    assert [f[0] for f in found] == [7, -signal.SIGKILL], found
    assert found[0][3] - found[1][3] < 10 and "another process of this run died or hung" in found[0][2]
    assert [step for step, _ in storage.steps(tmp_path / "run")] == [2]
    again = two(recipe, tmp_path / "run")
    assert [f[0] for f in again] == [0, 0], again
    assert [r["loss"] for r in rows(tmp_path / "run")] == [r["loss"] for r in rows(tmp_path / "whole")]


def test_a_hung_rank_ends_the_other_after_the_timeout(tiny, two, tmp_path):
    found = two(tiny("train.eval_every=0"), tmp_path / "run", FAULT="hang", STEPS="[4]", MOAI_RANK_TIMEOUT="5")
    assert found[0][0] == 7, found
    assert "died or hung" in found[0][2]


def test_a_stop_on_one_rank_stops_both_after_saving(tiny, two, tmp_path):
    recipe = tiny("train.steps=8", "train.eval_every=0", "train.accumulation=2")
    found = two(recipe, tmp_path / "run", FAULT="term", STEPS="[9]")
    assert [f[0] for f in found] == [143, 143], found
    assert storage.steps(tmp_path / "run")[-1][0] == 5
    again = two(recipe, tmp_path / "run")
    assert [f[0] for f in again] == [0, 0], again
    assert [r["step"] for r in rows(tmp_path / "run")] == list(range(1, 9))


def test_an_error_of_rank_0_is_reported_once(tiny, two, tmp_path):
    found = two(tiny(f"data.train={tmp_path}/none.txt"), tmp_path / "run")
    assert [f[0] for f in found] == [2, 2], found
    assert "none.txt" in found[0][2] and "error:" not in found[1][2]


def test_one_run_over_other_numbers_of_ranks(tiny, two, tmp_path):
    """Stopped on one process, continued on two: the rows a step are the same, so are the steps."""
    recipe = tiny("train.effective_batch=4", "train.eval_every=0", "optim.schedule=constant")
    train(recipe, output=tmp_path / "whole")
    train(
        tiny("train.effective_batch=4", "train.eval_every=0", "optim.schedule=constant", "train.steps=3"),
        output=tmp_path / "run",
    )
    found = two(recipe, tmp_path / "run")
    assert [f[0] for f in found] == [0, 0], found
    losses = [[r["loss"] for r in rows(tmp_path / d)] for d in ("whole", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
