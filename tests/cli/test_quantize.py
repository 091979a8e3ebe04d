"""`moai quantize` and `moai qat` as a user meets them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from moai_core import storage
from moai_core.locks import lock_file

FAST = ["--group-size", "32", "--eval-limit", "3"]
CALIB = ["--calib-sequences", "4", "--calib-length", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text for calibration, and another to measure on."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in (("calib.txt", 60), ("held out.txt", 8)):
        lines = [f"{name} 줄 {i}: 오늘은 {i * i} 명이 왔다. The {i}th line, 今日は{i}人." for i in range(count)]
        (folder / name).write_text("\n\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wide(folder, tmp_path_factory):
    """A model with the tokenizer, 64 columns wide and six layers deep."""
    from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, checkpoint
    from moai_core.data.tokenize import load_tokenizer

    torch.manual_seed(0)
    config = MoaiMambaConfig.from_pretrained(folder)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 6, 64, 128
    place = tmp_path_factory.mktemp("wide") / "model"
    return checkpoint.save_model(place, MoaiMambaForCausalLM(config), load_tokenizer("moai_tiny"))


def test_the_tokenizer_is_read_once_to_measure(moai, folder, text, monkeypatch):
    from moai_core.data import tokenize

    opened = []
    load = tokenize.load_tokenizer
    monkeypatch.setattr(tokenize, "load_tokenizer", lambda path: opened.append(path) or load(path))
    code, out, _ = moai("quantize", "-m", folder, "-o", "once", *FAST, "--eval", str(text / "held out.txt"))
    assert code == 0 and "perplexity" in out and opened == [folder]


@pytest.mark.parametrize("method", ["int4", "gptq", "awq"])
def test_a_table_a_report_and_a_model_that_talks(moai, folder, text, tmp_path, method):
    data = ["--calib", str(text / "calib.txt"), *CALIB] if method != "int4" else []
    held = ["--eval", str(text / "held out.txt")]
    code, out, err = moai("quantize", "-m", folder, "--method", method, "-o", "작은 것", *FAST, *data, *held)
    assert code == 0 and "perplexity" in out and "bits a quantized number" in err
    made = tmp_path / "작은 것"
    report = json.loads((made / "quantization.json").read_text(encoding="utf-8"))
    assert report["method"] == method and report["bytes_after"] < report["bytes_before"] / 3
    assert {"mamba.in_proj", "feed_forward.down_proj"} <= report["layers"][0].keys()
    assert 0 < report["quality"]["after"]["kl"] < 1 and [entry["tokens"] for entry in report["drift"]] == []
    assert (made / "quantization.png").read_bytes().startswith(b"\x89PNG") and (made / "manifest.json").exists()
    assert "## Quantization" in (made / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "작은 것.partial").exists()
    code, out, _ = moai("generate", "-m", made, "--prompt", "안녕", "-n", 3, "--temperature", 0)
    assert code == 0 and out.strip()
    code, out, _ = moai("eval", "-m", made, "--data", text / "held out.txt", "--json")
    assert code == 0
    assert json.loads(out)["loss"] == pytest.approx(report["quality"]["after"]["loss"], rel=0.02)


@pytest.mark.parametrize("flags, told", [([], True), (["--calib-sequences", "64"], False)])
def test_long_calibration_on_a_processor_is_told(moai, folder, monkeypatch, flags, told):
    from moai_cli.commands import quantize as command
    from moai_core.errors import UsageError
    from moai_core.quantize import disk

    def stop(*_, calibration, **__):
        assert calibration() == "sequences"
        raise UsageError("enough")

    monkeypatch.setattr(disk, "quantize_folder", stop)
    monkeypatch.setattr(command, "_calibration", lambda *_, **__: "sequences")
    code, _, err = moai("quantize", "-m", folder, "--method", "gptq", "--device", "cpu", *flags)
    assert code == 2 and "error: enough" in err
    assert ("take a processor many minutes; --calib-sequences 64 takes an eighth of them" in err) == told


def test_how_far_the_calibration_is_shows_inside_of_a_layer(wide, tmp_path):
    """From the first events a bar has an ETA, though a layer may take minutes; and it never goes back."""
    from moai_core.errors import Interrupted
    from moai_core.quantize.calibrate import from_tokens
    from moai_core.quantize.disk import quantize_folder
    from moai_core.quantize.plan import Settings

    settings, seen = Settings("gptq", group_size=32), []

    def run(stop=None):
        def on_event(event):
            seen.append(event)
            if stop is not None and (event["event"], event.get("done")) == ("layer", stop):
                raise Interrupted(signal.SIGINT)

        ids = torch.randint(5, 900, (40, 512), generator=torch.Generator().manual_seed(0))
        quantize_folder(wide, tmp_path / "q", settings, calibration=lambda: from_tokens(ids), on_event=on_event)

    with pytest.raises(Interrupted):
        run(stop=2)
    run()
    again = next(n for n, event in enumerate(seen) if event["event"] == "note")
    for part, layers in ((seen[:again], 2), (seen[again:], 6)):
        told = [event for event in part if event["event"] in ("calibrating", "layer")]
        done = [event["done"] for event in told]
        assert told[0]["event"] == "calibrating" and 0 < done[0] < 0.5 and done == sorted(done)
        assert {event["total"] for event in told} == {6}
        assert sum(event["event"] == "layer" for event in told) == done[-1] == layers


@pytest.mark.parametrize("method", ["fp8", "fp4", "bnb4", "bnb8"])
def test_formats_of_others_as_json(moai, wide, method):
    code, out, err = moai("quantize", "-m", wide, "--method", method, "--eval", "none", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["quality"] is None and report["path"].startswith("runs/") and report["path"].endswith(f"-{method}")
    code, out, _ = moai("generate", "-m", report["path"], "--prompt", "hello", "-n", 3)
    assert code == 0 and out.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--method", "int3"], 2, "error: --method can't be 'int3'"),
        (["--method", "awq", "--bits", "8"], 2, "error: --bits 8: awq has 4"),
        (["--group-size", "128"], 2, "group size 128 doesn't divide 32 columns"),
        (["--group-size", "48"], 2, "error: --group-size must be 0 or one of 32, 64, 128, 256 (got 48)"),
        (["--embeddings", "int2"], 2, "error: --embeddings can't be 'int2'"),
        (["--method", "fp8", "--rotate"], 2, "error: --rotate is for"),
        (["--method", "fp8", "--group-size", "64"], 2, "error: --group-size: fp8 has no groups"),
        (["--method", "bnb4", "--asymmetric"], 2, "are for 4-bit integers, not for nf4"),
        (["--method", "int4", "--calib", "SHORT"], 2, "error: --calib: --method int4 looks at no text"),
        (["--bits", "3"], 2, "error: --bits 3: int4 has 4 and 8"),
        (["--eval", "nowhere.txt"], 2, "nowhere.txt"),
        (["--method", "gptq", "--group-size", "32", "--calib", "SHORT", "--eval", "none"], 2, "calibration"),
        (["--group-size", "32", "-o", "FOLDER"], 2, "already exists and is no saved model"),
        (["--device", "cuda", "--group-size", "32"], 2, "this machine has no CUDA GPU"),
        (["--eval-limit", "0", "--group-size", "32"], 2, "--eval-limit must be at least 1 (got 0)"),
        (["--method", "gptq", "--calib-sequences", "0"], 2, "--calib-sequences must be at least 1 (got 0)"),
        (["--method", "gptq", "--calib-length", "0"], 2, "--calib-length must be at least 1 (got 0)"),
        (["--group-size", "32", "-o", "INSIDE"], 2, "lies inside the source"),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments, code, line, moai, folder, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("three words here")
    names = {"FOLDER": str(folder), "SHORT": str(short), "INSIDE": str(folder / "new")}
    result, out, err = moai("quantize", "-m", folder, *(names.get(a, a) for a in arguments))
    assert (result, out) == (code, "") and line in err, err
    assert len(err.splitlines()) == 2 and err.splitlines()[1].startswith("hint: ")
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


def test_quantized_already(moai, folder):
    assert moai("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "one")[0] == 0
    code, _, err = moai("quantize", "-m", "one", "--group-size", "32", "-o", "two")
    assert code == 3 and "is quantized already (int4)" in err and "hint: " in err
    code, _, err = moai("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "one")
    assert code == 2 and "already exists" in err and "--force" in err
    assert moai("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "one", "--force")[0] == 0


@pytest.mark.parametrize(
    "command", [["quantize", "--group-size", "32", "--eval", "none", "-o"], ["convert", "--to", "moai"]]
)
def test_a_flipped_bit_is_neither_quantized_nor_converted(command, moai, folder, tmp_path):
    """The weights stay finite and of the right shape: only the manifest knows."""
    assert moai("convert", folder, "whole", "--to", "moai", "--no-check")[0] == 0
    file = tmp_path / "whole" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    words = ["-m", "whole"] if command[0] == "quantize" else ["whole"]
    code, out, err = moai(*command, *(["new", *words] if command[0] == "quantize" else [*words, "new"]))
    assert (code, out) == (3, "") and "model.safetensors: damaged (SHA-256 differs" in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize(("flags", "why"), [([], "no tokenizer.json"), (["--tokenizer", "moai"], "vocab_size is")])
def test_a_tokenizer_that_is_wrong_is_told_before_the_work(flags, why, moai, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    code, out, err = moai("quantize", "-m", "bare", "--group-size", "32", *flags)
    assert (code, out) == (2, "") and why in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_an_unknown_key_of_quantization_is_told(moai, folder, tmp_path):
    assert moai("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "one")[0] == 0
    file = tmp_path / "one" / "config.json"
    (tmp_path / "one" / "manifest.json").unlink()
    values = json.loads(file.read_text())
    values["quantization"]["rotat"] = values["quantization"].pop("rotate", ["out_proj"])
    file.write_text(json.dumps(values))
    code, _, err = moai("generate", "x", "-m", "one")
    assert code == 3 and "quantization: unknown key 'rotat'" in err and "hint: known: method, modules, rotate" in err, (
        err
    )


@pytest.mark.parametrize("value", ["x", [1], True, {"method": 5}])
def test_a_strange_quantization_is_no_traceback(value, moai, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "strange")
    file = tmp_path / "strange" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": value}))
    code, out, err = moai("quantize", "-m", tmp_path / "strange", "--group-size", "32", "--eval", "none", "-o", "two")
    assert (code, out) == (3, "") and "is quantized already" in err and "hint: " in err


def test_the_source_is_never_replaced(moai, folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"format": 1, "files": {}}')
    assert moai("convert", folder, "run/step", "--to", "moai", "--no-check")[0] == 0
    for target in ("run", "run/step"):
        code, _, err = moai(
            "quantize", "-m", tmp_path / "run" / "step", "--group-size", "32", "-o", tmp_path / target, "--force"
        )
        assert code == 2 and "would replace the source" in err and "hint: " in err


def test_two_at_once_do_not_mix_their_layers(moai, folder, tmp_path):
    flags = ("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "out")
    with lock_file(tmp_path / "out"):
        code, out, err = moai(*flags)
        assert (code, out) == (6, "") and f"out: process {os.getpid()} has it open" in err
    assert moai(*flags)[0] == 0 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_says_what_is_kept(moai, folder, tmp_path, monkeypatch):
    def full(writer, name, chunks):
        raise OSError(errno.ENOSPC, "No space left on device", name)

    with monkeypatch.context() as patch:
        patch.setattr(storage.FolderWriter, "write", full)
        code, _, err = moai("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "out")
    assert code == 4 and "disk full" in err and "out.partial keeps the finished layers" in err, err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    code, _, err = moai("quantize", "-m", folder, "--group-size", "32", "--eval", "none", "-o", "out")
    assert code == 0 and "going on after 1 finished layers" in err
    assert not (tmp_path / "out.partial").exists()


def test_nan_outside_the_layers(moai, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "nan")
    (tmp_path / "nan" / "manifest.json").unlink(missing_ok=True)
    file = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.final_layernorm.weight"][3] = float("inf")
    save_file(tensors, file)
    code, _, err = moai("quantize", "-m", tmp_path / "nan", "--group-size", "32", "--eval", "none", "-o", "two")
    assert code == 3 and "model.final_layernorm.weight holds NaN or infinite numbers" in err and "\nhint: take" in err
    assert not (tmp_path / "two").exists()


def test_interrupted_and_gone_on_with(wide, tmp_path, text):
    """Ctrl-C after the first finished layer: nothing appears, and the same command uses what was finished."""
    from moai_core import checkpoint

    command = [sys.executable, "-m", "moai_cli", "quantize", "-m", str(wide), "--method", "gptq", "--group-size", "32"]
    command += [
        "--calib",
        str(text / "calib.txt"),
        "--calib-sequences",
        "8",
        "--calib-length",
        "64",
        "--eval",
        "none",
        "-o",
        "out",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "layer-00000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "hint: the same command goes on: out.partial keeps " in err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "finished layers" in done.stderr, done.stderr
    straight = subprocess.run([*command[:-1], "other"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert straight.returncode == 0
    one, other = (checkpoint.load_model(tmp_path / name).state_dict() for name in ("out", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_interrupted_before_a_layer_is_finished_nothing_is_left(moai, folder, tmp_path, monkeypatch):
    from moai_core.errors import Interrupted
    from moai_core.quantize.disk import Job

    def layers(job, work, data):
        assert (work / "key.json").exists()
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(Job, "layers", layers)
    code, out, err = moai("quantize", "-m", folder, "-o", "out", *FAST, "--eval", "none")
    assert (code, out, err) == (130, "", "error: interrupted\n") and not list(tmp_path.iterdir())


# ---- qat

SMALL = [
    "train.steps=3",
    "train.eval_every=0",
    "train.sample_every=0",
    "train.save_every=3",
    "data.max_length=64",
    "train.batch_size=2",
    "train.threads=1",
]


def test_qat_trains_and_its_run_talks(moai, folder, text):
    data = [f"data.train={text / 'calib.txt'}", "~data.valid"]
    code, out, err = moai("qat", "-r", "cpu-tiny", "-m", folder, "--group-size", "32", "-o", "run 1", *SMALL, *data)
    assert code == 0 and "learning rate 0.00016, that of mode full" in err, err
    code, out, _ = moai("generate", "-m", "run 1", "--prompt", "안녕", "-n", 3)
    assert code == 0 and out.strip()
    code, out, err = moai("qat", "-r", "cpu-tiny", "-m", folder, "--group-size", "32", "--mode", "qlora", "--merge", "bf16",
                          "--rank", "4", "-o", "run 2", "--json", *SMALL, *data)  # fmt: skip
    assert code == 0 and json.loads(out)["merged"].endswith("merged"), err
    code, out, _ = moai("generate", "-m", "run 2/merged", "--prompt", "안녕", "-n", 3)
    assert code == 0 and out.strip()
    code, out, err = moai("qat", "-r", "cpu-tiny", "--group-size", "32", "-o", "run 3", *SMALL, *data)
    assert code == 0 and "no --model: a new run begins with random weights" in err, err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--mode", "half"], "error: --mode can't be 'half'"),
        (["--mode", "scales"], "--model is missing"),
        (["--merge", "bf16"], "error: --merge is for --mode qlora"),
        (["--mode", "scales", "--bits", "8"], "--mode scales trains the scales of 4-bit codes"),
        (["--distill-weight", "2"], "error: --distill-weight must lie between 0 and 1"),
        (["--mode", "qlora", "--rank", "0", "-m", "FOLDER"], "rank"),
    ],
)
def test_qat_errors(arguments, line, moai, folder, tmp_path):
    arguments = [str(folder) if a == "FOLDER" else a for a in arguments]
    code, out, err = moai("qat", "-r", "cpu-tiny", *arguments, "--group-size", "32", *SMALL)
    assert (code, out) == (2, "") and line in err, err
    assert "hint: " in err and not (tmp_path / "runs").exists()


def test_a_teacher_that_is_not_there_is_told_before_the_run_begins(moai, folder, tmp_path):
    code, out, err = moai("qat", "-r", "cpu-tiny", "-m", folder, "--distill", "nobody", "--group-size", "32", *SMALL)
    assert (code, out) == (3, "") and "error: nobody: doesn't exist" in err
    assert not (tmp_path / "runs").exists()
