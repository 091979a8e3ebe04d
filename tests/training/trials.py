"""Runs of `moai train` that end badly, for test_resume.py: `python trials.py kill|signal|matrix FOLDER COUNT SEED`.

One process trains once, so that all is imported and compiled, then forks a child a run: a run lasts half a second, and
can be killed anywhere in it: while it tokenizes, trains, validates, saves or draws. This happens apart from pytest,
whose process may have started threads that a fork doesn't survive. Prints a JSON report; its "failures" must be empty.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

RECIPE = """\
model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, state_size: 4}
tokenizer: moai_tiny
data: {train: train.txt, valid: valid.txt, max_length: 32}
optim: {lr: 1e-2, warmup_steps: 3}
train: {steps: 11, batch_size: 2, save_every: 3, keep_last: 2, eval_every: 4, eval_batches: 2, sample_every: 5,
        sample_prompts: ["말"], sample_tokens: 3, threads: 1, precision: fp32}
hardware: {gpu: cpu}
"""
# What a clock or the machine says; everything else that is recorded must come out the same.
MEASURED = {"tokens_per_s", "memory_mb", "mfu", "seconds"}


def project(folder: Path) -> Path:
    """A recipe in `folder` and its data, of which its steps see more than one epoch; returns the recipe's path."""
    dice = random.Random(1)
    words = [
        "the",
        "state",
        "of",
        "a",
        "layer",
        "has",
        "one",
        "size",
        "상태는",
        "커지지",
        "않는다",
        "状態は増えない",
        "状态不变",
        "1",
        "2",
        "3",
    ]
    for name, documents in (("train", 9), ("valid", 6)):
        text = [" ".join(dice.choices(words, k=dice.randrange(3, 30))) for _ in range(documents)]
        (folder / f"{name}.txt").write_text("\n\n".join(text), encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return folder / "tiny.yaml"


def moai_train(recipe: Path, run: Path, *overrides: str) -> int:
    """`moai train`, quietly, in this process; its exit code."""
    from moai_cli.main import run as moai

    with open(run.with_suffix(".log"), "a") as log, redirect_stdout(log), redirect_stderr(log):
        return moai(["train", "--recipe", str(recipe), "--output", str(run), "--json", *overrides])


def start(recipe: Path, run: Path, *overrides: str, first: Callable[[], object] | None = None) -> int:
    """`moai train` in a forked child, after `first()`; its PID."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if first is not None:
                first()
            code = moai_train(recipe, run, *overrides)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows(run: Path, name: str = "metrics") -> list[dict]:
    """The lines of `name`.jsonl without what was measured; a last line that a kill cut short is left out."""
    path = run / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def outcome(run: Path, *, final: bool = False) -> dict:
    """All that a finished run determines, bit for bit: records, tensors and trainer state of its (last) checkpoints."""
    import torch
    from safetensors.torch import load_file

    steps = sorted(run.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))[-1 if final else 0 :]
    found: dict = {"metrics": rows(run), "samples": rows(run, "samples"), "steps": [path.name for path in steps]}
    for step in steps:
        for file in sorted(step.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                found[f"{step.name}/{file.name}/{name}"] = (str(tensor.dtype), list(tensor.shape), content)
        trainer = json.loads((step / "trainer.json").read_text(encoding="utf-8"))
        del trainer["progress"]["seconds"], trainer["recipe"]["data"]["workers"]
        for part in ("progress", "rng"):
            found |= {f"{step.name}/trainer.json/{part}/{key}": value for key, value in trainer.pop(part).items()}
        found[f"{step.name}/trainer.json"] = trainer
    return found


def differences(one: dict, other: dict) -> list[str]:
    """The parts in which two outcomes differ, with the values where they are short."""
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return [f"{name}: {str(one.get(name))[:200]} != {str(other.get(name))[:200]}" for name in names]


def quiet_run(folder: Path) -> tuple[Path, dict, dict, float]:
    """The recipe, the outcome of a quiet run of it, the same with only its last checkpoint, and how long it lasts."""
    recipe = project(folder)
    os.environ["MOAI_CACHE"] = str(folder / "cache")
    assert moai_train(recipe, folder / "warm") == 0, (folder / "warm.log").read_text()
    began = time.monotonic()
    assert wait(start(recipe, folder / "quiet")) == 0
    length = time.monotonic() - began
    whole = outcome(folder / "quiet")
    epochs = {row["epoch"] for row in whole["metrics"] if row["kind"] == "train"}
    assert (
        len(epochs) > 1
        and len(whole["metrics"]) == 11 + 3
        and whole["samples"]
        and whole["steps"] == ["step-9", "step-11"]
    )
    assert not differences(whole, outcome(folder / "warm"))
    return recipe, whole, outcome(folder / "quiet", final=True), length


def log_tail(run: Path) -> str:
    return run.with_suffix(".log").read_text()[-800:]


def kill(folder: Path, count: int, seed: int) -> dict:
    """SIGKILL runs at `count` random moments, many while they resume; each must end as the quiet run did."""
    recipe, quiet, _, length = quiet_run(folder)
    dice, failures, moments, trial = random.Random(seed), [], Counter(), 0
    while moments.total() < count:
        trial += 1
        run, cache = folder / f"run-{trial}", folder / "cache"
        if dice.random() < 0.3:  # tokenize anew as well
            cache = folder / f"cache-{trial}"
        os.environ["MOAI_CACHE"] = str(cache)
        overrides = ["data.workers=1"] if dice.random() < 0.1 else []
        code = None
        while code is None:
            fresh, began, left_alone = not run.exists(), time.monotonic(), dice.random() < 0.3
            pid = start(recipe, run, *overrides)
            if not left_alone:
                time.sleep(dice.uniform(0, length))
                os.kill(pid, signal.SIGKILL)
            if (ended := wait(pid)) == -signal.SIGKILL:
                moments[max((row["step"] for row in rows(run)), default=0)] += 1
            else:
                code = ended
            if fresh and left_alone:  # what else the machine does changes with time
                length = time.monotonic() - began
        if code != 0:
            failures.append([trial, f"exit {code}", log_tail(run)])
        elif wrong := differences(quiet, outcome(run)):
            failures.append([trial, "differs", wrong])
        elif left := [path.name for path in run.iterdir() if "-" in path.suffix]:
            failures.append([trial, "left behind", left])
        shutil.rmtree(run, ignore_errors=True)
        if cache.name != "cache":
            shutil.rmtree(cache)
    return {"trials": trial, "length": length, "moments": moments, "failures": failures}


def signals(folder: Path, count: int, seed: int) -> dict:
    """SIGTERM or SIGINT at `count` random moments: the last step is saved, exit 143 or 130, and resuming is exact."""
    recipe, _, quiet, length = quiet_run(folder)
    dice, failures, codes, trial = random.Random(seed), [], Counter(), 0
    while codes[128 + signal.SIGTERM] + codes[128 + signal.SIGINT] < count:
        trial += 1
        run, signum = folder / f"run-{trial}", dice.choice([signal.SIGTERM, signal.SIGINT])
        pid = start(recipe, run)
        time.sleep(dice.uniform(0, 0.8 * length))  # the end draws a picture and has nothing left to save
        os.kill(pid, signum)
        code = wait(pid)
        code = 128 - code if code < 0 else code  # before the command caught signals
        codes[code] += 1
        last = max((row["step"] for row in rows(run)), default=0)
        saved = max((int(path.name.removeprefix("step-")) for path in run.glob("step-*")), default=0)
        if code not in (0, 128 + signum) or last != saved:
            failures.append([trial, f"signal {signum}: exit {code}, step {last}, saved {saved}", log_tail(run)])
        elif (code := wait(start(recipe, run))) != 0:
            failures.append([trial, f"resuming: exit {code}", log_tail(run)])
        elif wrong := differences(quiet, outcome(run, final=True)):
            failures.append([trial, "differs", wrong])
        shutil.rmtree(run, ignore_errors=True)
    failures += second_signal(recipe, folder / "second")
    return {"trials": trial, "codes": codes, "failures": failures}


def second_signal(recipe: Path, run: Path) -> list:
    """The first signal saves, which here lasts a minute; the second ends the process at once."""
    from moai_core import checkpoint

    def slow_save(*args, **kwargs):
        (run / "saving").touch()
        time.sleep(60)

    failures = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        pid = start(recipe, run, "train.steps=2000", first=lambda: setattr(checkpoint, "save", slow_save))
        while not rows(run):
            time.sleep(0.01)
        os.kill(pid, signum)
        while not (run / "saving").exists():
            time.sleep(0.01)
        began = time.monotonic()
        os.kill(pid, signum)
        code, seconds = wait(pid), time.monotonic() - began
        if code != 128 + signum or seconds > 3:
            failures.append([f"second {signum}", f"exit {code} after {seconds:.1f} s", log_tail(run)])
        shutil.rmtree(run)
    return failures


def matrix(folder: Path, count: int, seed: int) -> dict:
    """Accumulation 1 and 4, no workers and 2; stops around an epoch's end, in the last validation and sample."""
    from moai_core import recipe as recipes
    from moai_core.errors import Interrupted
    from moai_core.training.loop import train
    from moai_core.training.stop import StopFlag

    path, failures, done = project(folder), [], []
    os.environ["MOAI_CACHE"] = str(folder / "cache")
    first: dict[int, dict] = {}
    for accumulation, workers in ((1, 0), (1, 2), (4, 0), (4, 2)):
        overrides = [f"train.accumulation={accumulation}", f"data.workers={workers}", "train.save_every=100"]
        made = recipes.load(path, overrides)
        name = f"accumulation {accumulation}, workers {workers}"
        quiet, run = folder / f"quiet-{accumulation}-{workers}", folder / f"run-{accumulation}-{workers}"
        train(made, output=quiet)
        epoch = {row["step"]: row["epoch"] for row in rows(quiet) if row["kind"] == "train"}
        around = [2, 9] if accumulation == 1 else [1, 4]
        stops = [*(("step", at) for at in around), ("step", 11), ("valid", 11)]
        assert epoch[around[0]] < epoch[around[1]], (name, epoch)
        for kind, at in stops:
            stop = StopFlag()

            def ask(event: dict, kind=kind, at=at, stop=stop) -> None:
                if event["event"] == kind and event["step"] == at:
                    stop.request()

            try:
                train(made, output=run, on_event=ask, stop=stop)
                failures.append([name, f"not stopped by {kind} {at}"])
            except Interrupted as exc:
                if exc.exit_code != 143 or not (run / f"step-{at}").is_dir():
                    failures.append([name, f"{kind} {at}: exit {exc.exit_code}, step-{at} not saved"])
        for _ in range(2):  # the second finds nothing left to do
            result = train(made, output=run)
            ended = outcome(run, final=True)
            if wrong := differences(outcome(quiet, final=True), ended):
                failures.append([name, "differs", wrong])
        if result.resumed_from != 11:
            failures.append([name, f"resumed from {result.resumed_from}"])
        if wrong := differences(first.setdefault(accumulation, ended), ended):
            failures.append([name, "differs from no workers", wrong])
        done.append(name)
    return {"done": done, "failures": failures}


if __name__ == "__main__":
    mode, where, number, start_seed = sys.argv[1:]
    report = {"kill": kill, "signal": signals, "matrix": matrix}[mode](Path(where), int(number), int(start_seed))
    print(json.dumps(report))
