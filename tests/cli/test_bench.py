"""`moai bench`: tables, JSON, Markdown, the picture; one line with an exit code for what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from moai_core.errors import StorageError

SCAN = ("scan", "--seq-len", "24", "--dim", "16", "--repeats", "1", "--against")
TRAIN = (
    "train", "--recipe", "cpu-tiny", "model.hidden_size=16", "model.intermediate_size=24", "model.vocab_size=50",
    "tokenizer=null", "--layers", "1", "--batch", "1", "--seq-len", "8", "--steps", "1",
)  # fmt: skip
BARE = ("--seq-len", "64", "--hidden", "16", "--repeats", "1")


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    from moai_core.bench import steps

    monkeypatch.setitem(steps._PRODUCT, "cpu", 32)


def test_without_a_subcommand(moai, tmp_path):
    code, out, _ = moai("bench", *BARE)
    assert code == 0 and "mamba block" in out and "attention block" in out and "curves: bench.png" in out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    code, out, _ = moai("bench", *BARE, "--json", "--plot", "곡선.png")
    found = json.loads(out)
    assert code == 0 and found["plot"] == "곡선.png" and (tmp_path / "곡선.png").is_file()
    assert found["benchmark"] == "lengths" and {r["length"] for r in found["results"]} == {64}
    assert set(found["results"][0]["timings"]) == {"scan", "attention", "mamba block", "attention block"}
    code, out, _ = moai("bench", *BARE, "--no-plot", "--markdown")
    assert code == 0 and out.count("| tokens | scan | attention | mamba block | attention block |") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.png", "곡선.png"]


def test_scan(moai, tmp_path):
    code, out, _ = moai("bench", *SCAN, "attention,conv", "--resets", "--plot", "scan.png")
    assert code == 0 and "scan fwd+bwd" in out and "packed" in out and "curves: scan.png" in out
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    code, out, _ = moai("bench", *SCAN, "reference", "--json")
    found = json.loads(out)
    assert code == 0 and found["plot"] is None and found["dtype"] == "fp32"
    assert set(found) == {"benchmark", "environment", "dtype", "results", "recorded", "notes", "plot"}
    row = found["results"][0]
    assert (row["operation"], row["direction"], row["batch"], row["length"], row["dim"]) == (
        "scan",
        "forward",
        1,
        24,
        16,
    )
    assert set(row["timings"]["moai"]) == {"median_ms", "low_ms", "high_ms", "repeats"} and row["error"] < 1e-5
    code, out, _ = moai("bench", *SCAN, "none", "--markdown")
    assert code == 0 and "| scan fwd | 1 x 24 x 16 |" in out
    code, out, _ = moai("bench", *SCAN, "auto")
    assert code == 0 and "mamba_ssm left out: it runs on CUDA only" in out


def test_train(moai):
    code, out, _ = moai("bench", *TRAIN, "--prefill", "8", "--checkpointing", "none,full")
    assert code == 0 and "MFU" in out and "prefill: hidden states" in out and out.count("moai ") >= 3
    code, out, _ = moai("bench", *TRAIN, "--json", "optim.lr=1e-3", "--packed")
    found = json.loads(out)
    assert code == 0 and found["benchmark"] == "train" and found["packed"] is True
    assert set(found["results"][0]["phases_ms"]) == {"forward", "backward", "optimizer"}
    assert found["results"][0]["peak_bytes"] > 0 and found["results"][0]["mfu"] > 0
    code, out, _ = moai("bench", *TRAIN, "--markdown")
    assert code == 0 and "| model | checkpointing | B x L | tokens/s |" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("scan", "--dim", "12"), "--dim must be a multiple of 8 (got 12)"),
        (("scan", "--against", "tea"), "--against: unknown name 'tea'"),
        (("scan", "--against", "mamba_ssm"), "--against mamba_ssm: it runs on CUDA only, not on cpu"),
        (("scan", "--seq-len", "none"), "--seq-len must be whole numbers >= 1"),
        (("scan", "--preset", "h100", "--batch", "2"), "--preset and --batch don't go together"),
        (("scan", "--preset", "a10"), "--preset: unknown name 'a10'"),
        (
            ("scan", "--preset", "h100", "--device", "cpu"),
            "--preset h100 has shapes for a GPU, up to 1 x 131072 x 4096",
        ),
        (("scan", "--scan", "tea"), "unknown scan backend 'tea'"),
        (("scan", "--backend", "tea"), "unknown scan backend 'tea'"),
        (("--scan", "cpu", "scan"), "--scan stands before 'scan'"),
        (("scan", "--device", "abacus"), "--device must be auto, cpu, cuda or cuda:N (got 'abacus')"),
        (("scan", "--dtype", "int8"), "--dtype must be auto, bf16, fp16, fp32 (got 'int8')"),
        (("scan", "--json", "--markdown"), "--json and --markdown don't go together"),
        (("scan", "--repeats", "0"), "--repeats at least 1"),
        (("scan", "--limit", "nan"), "--limit must be above 0"),
        (("--limit", "nan"), "--limit must be above 0"),
        (("--seq-len", "64", "scan"), "--seq-len stands before 'scan'"),
        (("--hidden", "12"), "--hidden must be a multiple of 8"),
        (("--plot", "x.pdf"), "--plot must name a PNG file (got 'x.pdf')"),
        (
            ("decode", "--engine", "graph", "--layers", "1"),
            "--engine graph runs on CUDA GPUs only, not on cpu\nhint: --engine plain",
        ),
        (("train", "--checkpointing", "half"), "train.checkpointing must be one of"),
        (("train", "--preset", "3b"), "--preset: unknown size '3b'"),
        (("train", "--steps", "0"), "--steps 0 leaves nothing to measure"),
        (("train", "optim.lrr=1"), "unknown key 'optim.lrr'; did you mean optim.lr?"),
        (("nothing",), "No such command 'nothing'"),
    ],
)
def test_refusals_are_one_line(moai, tmp_path, arguments, words):
    code, out, err = moai("bench", *arguments)
    assert code == 2 and out == "" and words in err and len(err.strip().split("\n")) <= 2
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(moai, tmp_path):
    code, out, err = moai("bench", "--plot", "none/bench.png")
    assert code == 4 and out == "" and "no such folder" in err


@pytest.mark.parametrize("flag", [(), ("--json",), ("--markdown",)])
def test_a_full_disk_costs_the_picture_and_no_figure(moai, tmp_path, monkeypatch, flag):
    from moai_core import storage

    def full(path, *arguments, **options):
        raise StorageError(f"{path}: no space left on the device")

    monkeypatch.setattr(storage, "write_file", full)
    code, out, err = moai("bench", *SCAN, "none", "--plot", "scan.png", *flag)
    assert code == 4 and "scan.png: no space left" in err and "figures above are whole" in err
    assert "1 x 24 x 16" in out or json.loads(out)["results"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [(), ("scan",), ("train",)])
def test_help_has_examples(moai, command):
    code, out, _ = moai("bench", *command, "--help")
    assert code == 0 and f"moai bench {' '.join(command)}".strip() in out and "Examples" in out


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    code = (
        "import sys, threading, _thread\n"
        "from moai_core.bench import lengths\n"
        "from moai_cli.main import run\n"
        "def on(*a, **k):\n"
        "    print('measuring', flush=True)\n"
        "    import time; time.sleep(60)\n"
        "lengths.measure = on\n"
        "sys.exit(run(['bench', '--seq-len', '64']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "measuring\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert not list(tmp_path.iterdir())
