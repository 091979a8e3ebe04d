"""Runs of `moai train` that end badly, for test_resume.py: `python trials.py FOLDER TRIALS SEED` (not collected by pytest).

One process imports everything once and forks a child a run, so that a run lasts fractions of a second and a trial can kill it
anywhere: while it imports nothing, tokenizes, trains, saves, validates or ends. It runs apart from pytest, whose process may
have started threads that a fork doesn't survive.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from safetensors.torch import load_file  # noqa: E402

RECIPE = """\
model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, state_size: 4}
tokenizer: moai_tiny
data: {train: train.txt, valid: valid.txt, max_length: 32}
optim: {lr: 1e-2, warmup_steps: 3}
train: {steps: 14, batch_size: 2, save_every: 3, keep_last: 2, eval_every: 5, eval_batches: 2, sample_every: 6,
        sample_prompts: ["말"], sample_tokens: 4, threads: 1, precision: fp32}
hardware: {gpu: cpu}
"""
# What a clock or the machine says; everything else in the records must come out the same.
MEASURED = {"tokens_per_s", "memory_mb", "mfu", "seconds"}


def project(folder: Path) -> Path:
    """A recipe and its data in `folder`: a few epochs of short documents; returns the recipe's path."""
    dice = random.Random(1)
    words = "the state of a layer has one size 상태는 커지지 않는다 状態は増えない 状态不变 1 2 3".split()
    for name, documents in (("train", 40), ("valid", 8)):
        text = [" ".join(dice.choices(words, k=dice.randrange(3, 30))) for _ in range(documents)]
        (folder / f"{name}.txt").write_text("\n\n".join(text), encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return folder / "tiny.yaml"


def train(recipe: Path, run: Path, *overrides: str, patch: Callable[[], object] | None = None) -> int:
    """Start `moai train` in a forked child, quietly; its PID. It ends with the command's exit code."""
    pid = os.fork()
    if pid == 0:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 1
        try:
            from moai_cli.main import run as moai

            if patch is not None:
                patch()
            code = moai(["train", "--recipe", str(recipe), "--output", str(run), "--json", *overrides])
            sys.stdout.flush()
        finally:
            os._exit(code)
    return pid


def warm_up(recipe: Path, run: Path) -> None:
    """Train once in this very process, so that the children find everything imported and compiled."""
    from moai_cli.main import run as moai

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        assert moai(["train", "--recipe", str(recipe), "--output", str(run), "--json"]) == 0


def wait(pid: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def records(run: Path) -> list[dict]:
    """The lines of metrics.jsonl and samples.jsonl without what was measured."""
    rows = [json.loads(line) for name in ("metrics", "samples") for line in (run / f"{name}.jsonl").open()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def outcome(run: Path) -> dict:
    """Everything a finished run determines: records, checkpoints kept, their tensors and trainer state, bit for bit."""
    found: dict = {"records": records(run), "steps": sorted(path.name for path in run.glob("step-*"))}
    for step in run.glob("step-*"):
        for file in sorted(step.glob("*.safetensors")):
            found[f"{step.name}/{file.name}"] = {
                name: (str(tensor.dtype), tensor.view(-1).view(dtype=__import__("torch").uint8).numpy().tobytes().hex())
                for name, tensor in load_file(file).items()
            }
        trainer = json.loads((step / "trainer.json").read_text())
        trainer["progress"].pop("seconds")
        trainer["recipe"].pop("output", None)
        found[f"{step.name}/trainer.json"] = trainer
    return found


def differences(one: dict, other: dict) -> list[str]:
    """The parts in which two outcomes differ."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def kill_trials(folder: Path, trials: int, seed: int) -> dict:
    """Kill runs at random moments, often more than once, resume each until it is done; what differed from a quiet run."""
    recipe, dice = project(folder), random.Random(seed)
    os.environ["MOAI_CACHE"] = str(folder / "cache")
    warm_up(recipe, folder / "warm")
    began = time.monotonic()
    assert wait(train(recipe, folder / "quiet")) == 0
    length = time.monotonic() - began
    quiet = outcome(folder / "quiet")
    report = {"length": length, "kills": 0, "at": [], "failures": []}
    for trial in range(trials):
        run = folder / f"run-{trial}"
        os.environ["MOAI_CACHE"] = str(folder / ("cache" if dice.random() < 0.7 else f"cache-{trial}"))
        overrides = ["data.workers=1"] if dice.random() < 0.1 else []
        for _ in range(20):
            pid = train(recipe, run, *overrides)
            killed = dice.random() < 0.8
            if killed:
                time.sleep(dice.uniform(0, length))
                os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            if code == 0:
                break
            if code == -signal.SIGKILL:
                report["kills"] += 1
                report["at"].append(sum(1 for _ in (run / "metrics.jsonl").open()) if (run / "metrics.jsonl").exists() else -1)
                continue
            report["failures"].append([trial, f"exit {code}", run.with_suffix(".log").read_text()[-500:]])
            break
        else:
            report["failures"].append([trial, "killed too often", ""])
        if code == 0 and (wrong := differences(quiet, outcome(run))):
            report["failures"].append([trial, "differs", wrong])
        elif code == 0:
            left = [path.name for path in run.iterdir() if "-" in path.suffix]
            if left:
                report["failures"].append([trial, "left behind", left])
            shutil.rmtree(run)
        shutil.rmtree(folder / f"cache-{trial}", ignore_errors=True)
    return report


if __name__ == "__main__":
    print(json.dumps(kill_trials(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
