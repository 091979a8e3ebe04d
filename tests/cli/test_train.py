"""`moai train` from the command line: what it prints, its exit codes, signals and torchrun."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = [
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "model.state_size=4",
    "data.max_length=32", "~data.valid", "data.valid_fraction=0.2", "train.batch_size=2", "train.steps=4",
    "train.save_every=2", "train.eval_every=2", "train.eval_batches=2", "train.sample_every=4", "train.sample_tokens=4",
    "train.sample_prompts=[the]", "train.log_every=2", "train.threads=1",
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    documents = [" ".join(f"word{(i * j) % 7} 오늘 今日 今天" for j in range(9)) for i in range(30)]
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


def command(text, *more):
    return ["train", "--recipe", "cpu-tiny", *TINY, f"data.train={text}", *more]


def test_a_run_that_never_began_leaves_no_folder(moai, text, tmp_path):
    code, _, err = moai(*command(text, "model.scan=mamba_ssm"))
    assert code == 2 and "error: scan backend 'mamba_ssm' can't be used here" in err
    assert not (tmp_path / "runs/cpu-tiny").exists()


def test_sizes_that_the_weights_overrule_are_told(moai, text, tmp_path):
    assert moai(*command(text, "train.steps=1", "-o", "a"))[0] == 0
    code, _, err = moai(*command(text, "train.steps=1", "-o", "b", "--model", "a", "model.hidden_size=64"))
    assert code == 0 and "a/step-1 keeps its own hidden_size: weights come with their sizes" in err
    code, _, err = moai(*command(text, "train.steps=1", "-o", "c", "--model", "a"))
    assert code == 0 and "keeps its own" not in err


def test_the_reader_of_the_notes_may_leave(text, tmp_path):
    """`moai train ... 2>&1 | head -1` trains to the end."""
    line = [sys.executable, "-m", "moai_cli", *command(text, "train.save_every=1")]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        process.stderr.readline()
        process.stderr.close()
        assert process.wait(120) == 0
    assert (tmp_path / "runs/cpu-tiny/step-4/manifest.json").is_file()


def test_a_run_ends_with_a_summary_a_sample_and_the_picture(moai, text, tmp_path):
    code, out, err = moai(*command(text))
    assert code == 0, err
    run = tmp_path / "runs/cpu-tiny"
    assert (run / "step-4/manifest.json").is_file() and (run / "loss.png").is_file()
    for word in (
        "steps",
        "target tokens",
        "train loss",
        "validation loss",
        "perplexity",
        "bits per byte",
        "time",
        "the",
    ):
        assert word in out
    assert "loss curve: runs/cpu-tiny/loss.png" in out
    assert "step 2/4  loss" in err and "step 4/4  loss" in err and "ETA" in err and "step 1/4" not in err
    assert "validation: loss" in err and "saved runs/cpu-tiny/step-4" in err and "parameters on cpu, fp32" in err
    # The same command again finds the run finished.
    code, out, err = moai(*command(text))
    assert code == 0 and "resuming after step 4 of 4" in err and "loss curve" in out


def test_json_is_all_of_stdout(moai, text):
    code, out, _ = moai(*command(text, "--json", "-o", "here"))
    result = json.loads(out)
    assert code == 0 and result["step"] == 4 and result["run_dir"] == "here" and result["checkpoint"] == "here/step-4"
    assert result["valid"]["bits_per_byte"] > 0 and result["plot"] == "here/loss.png"
    assert result["sample"]["prompt"] == "the"


def test_dry_run_prints_the_plan_and_trains_nothing(moai, tmp_path):
    code, out, _ = moai("train", "--recipe", "a100-2b", "--dry-run")
    assert code == 0 and "1,989," in out and "optimizer" in out and "scan states" in out and "steps" in out
    code, out, _ = moai("train", "--recipe", "a100-2b", "--dry-run", "--json")
    assert json.loads(out)["parameters"]["total"] == 1_989_416_704
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning(moai, text):
    assert moai(*command(text, "-o", "base"))[0] == 0
    code, out, err = moai(*command(text, "-o", "tuned", "--model", "base", "train.steps=2"))
    assert code == 0 and "resuming" not in err and "tuned/step-2" in out


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (["--recipe", "cpu-tinny"], 2, "no recipe 'cpu-tinny'"),
        (["--recipe", "cpu-tiny", "optim.lrr=1"], 2, "did you mean optim.lr?"),
        (["--recipe", "cpu-tiny", "optim.lr=-1"], 2, "optim.lr"),
        (["--recipe", "cpu-tiny", "data.train=none.txt"], 2, "none.txt"),
        (["--recipe", "cpu-tiny", "data.train=empty.txt"], 2, "empty.txt"),
        (["--recipe", "cpu-tiny", "data.train=binary.jsonl"], 2, "binary.jsonl:1"),
        (["--recipe", "cpu-tiny", "data.train=latin.txt"], 2, "latin.txt:1"),
        (["--recipe", "cpu-tiny", "data.train=broken.jsonl"], 2, "broken.jsonl:2"),
        (["--recipe", "cpu-tiny", "model.vocab_size=100"], 2, "vocab_size is 100"),
        (["--recipe", "cpu-tiny", "tokenizer=nope"], 2, "tokenizer 'nope'"),
        (["--recipe", "cpu-tiny", "--model", "nowhere"], 3, "nowhere: doesn't exist"),
        (["--recipe", "cpu-tiny", "--resume", "nowhere"], 3, "--resume nowhere: no such folder"),
        (["--recipe", "cpu-tiny", "-o", "taken"], 2, "output taken exists and is no run folder (it holds notes.txt)"),
        (["--recipe", "cpu-tiny", "-o", "empty.txt"], 2, "output empty.txt is a file"),
        (["--recipe", "cpu-tiny", "--", "--no-such-flag", "2"], 2, "launcher arguments: "),
        (["--recipe", "cpu-tiny", "--", "--nproc-per-node", "many"], 2, "launcher arguments"),
        (["--recipe", "cpu-tiny", "stray"], 2, "stray"),
        (["--recipe"], 2, "--recipe"),
        ([], 2, "--recipe"),
    ],
)
def test_bad_input_is_one_line(moai, tmp_path, arguments, code, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "good one"}\n{"text": \n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    found, out, err = moai("train", *arguments)
    assert (found, out) == (code, ""), err
    assert message in err
    lines = err.strip().splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1 and len(lines) <= 3, err
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.name != "runs"] == []


def test_a_gpu_recipe_explains_itself(moai):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = moai("train", "--recipe", "a100-2b", "data.train=x", "tokenizer=moai_tiny")
    assert code == 2 and "needs an NVIDIA A100 (80 GB); this machine has no CUDA GPU" in err


def test_another_recipe_in_the_same_folder(moai, text):
    assert moai(*command(text))[0] == 0
    code, _, err = moai(*command(text, "optim.lr=0.5"))
    assert code == 2 and "optim.lr" in err and "-> 0.5" in err and "hint: " in err
    code, _, err = moai(*command(text, "--resume", "never"))
    assert code == 2 and "already holds a run" in err


def test_a_locked_folder(moai, text, tmp_path):
    from moai_core import checkpoint

    with checkpoint.lock(tmp_path / "runs/cpu-tiny"):
        code, _, err = moai(*command(text))
    assert code == 6 and f"process {os.getpid()} is writing" in err


def test_terminal_escapes_in_data_stay_out_of_the_terminal(moai, tmp_path):
    """The `moai` fixture fails on any control character in the output."""
    path = tmp_path / "evil.txt"
    path.write_text("\x1b]0;owned\x07\x1b[2J red \x9b31m text " * 60)
    code, _, err = moai(*command(path, r'train.sample_prompts=["\x1b[2Jhi"]', "data.valid_fraction=0"))
    assert code == 0, err


def start(text, folder: Path, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [
        sys.executable,
        "-m",
        "moai_cli",
        *command(text, "-o", "run", "train.steps=100000", "train.log_every=1"),
    ]
    return subprocess.Popen(
        [*arguments, "train.eval_every=0", "train.sample_every=0", "train.save_every=0", *more],
        cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process, what):
    for line in process.stderr:
        if what in line:
            return line
    raise AssertionError(f"ended without {what!r}")


@pytest.mark.parametrize("signum,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_resumes(text, tmp_path, signum, code):
    process = start(text, tmp_path)
    wait_for(process, "step 3/")
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and out == ""
    assert "Traceback" not in err and f"error: stopped by {signal.Signals(signum).name} after step" in err
    assert "saved run/step-" in err and "hint: the same command resumes" in err
    process = start(text, tmp_path)
    assert "resuming after step" in wait_for(process, "resuming")
    process.send_signal(signum)
    process.communicate(timeout=120)
    assert process.returncode == code


@pytest.mark.slow
def test_two_processes_behind_two_dashes(text, tmp_path):
    def run(*more, **environment):
        arguments = command(text, "-o", "run", "--json", *more, "--", "--nproc-per-node", "2")
        return subprocess.run(
            [sys.executable, "-m", "moai_cli", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=400, env={**os.environ, **environment},
        )  # fmt: skip

    found = run()
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["step"] == 4 and "cpu x 2" in found.stderr and "4 rows a step" in found.stderr
    found = run("optim.lr=0.5")
    assert found.returncode == 2 and found.stderr.count("error: ") == 1 and "Traceback" not in found.stderr, (
        found.stderr
    )


@pytest.mark.slow
def test_a_killed_worker_and_a_signal_to_the_launcher(text, tmp_path):
    def children(pid):
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
        return [int(p) for p in found if "moai_cli" in Path(f"/proc/{p}/cmdline").read_text()]

    process = start(text, tmp_path, "--", "--nproc-per-node", "2")
    wait_for(process, "step 3/")
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7 and time.monotonic() - began < 10 and "Traceback" not in err, err
    assert "was killed by SIGKILL" in err
    process = start(text, tmp_path, "--", "--nproc-per-node", "2")
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err and "saved run/step-" in err, err


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_shows_its_whole_eta(monkeypatch, width):
    from rich.console import Console

    from moai_cli import console

    screen = Console(file=io.StringIO(), force_terminal=True, width=width)
    monkeypatch.setattr(console, "err", screen)
    bar = console.progress("a", "b", "c", "d")
    bar.add_task("train", total=1000, completed=1000, a="loss 0.0108", b="lr 3.00e-04", c="15.0k tok/s", d="0.5 GB")
    screen.print(bar.get_renderable())
    shown = screen.file.getvalue()
    assert "…" not in shown and "0.5 GB" in shown and re.search(r"ETA\S* .*[\d-]:[\d-]{2}:[\d-]{2}", shown)
