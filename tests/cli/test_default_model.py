"""What commands do that are given no model, and what the name of the one that comes with moai stands for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from moai_core import paths

NOTE = "using moai-30m, the model that comes with moai (0.4M parameters, int4); --model takes another"
COMMANDS = [
    ["generate", "-p", "x"],
    ["chat"],
    ["eval", "--data", "TEXT"],
    ["quantize"],
    ["bench", "context"],
    ["bench", "needle"],
    ["bench", "samples"],
]


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """The random model as the one in the package is stored: int4 with int8 embeddings."""
    from moai_core.quantize.disk import quantize_folder
    from moai_core.quantize.plan import Settings

    target = tmp_path_factory.mktemp("packaged") / "moai-30m"
    quantize_folder(folder, target, Settings(group_size=32))
    return target


@pytest.fixture
def packaged(quantized, monkeypatch):
    monkeypatch.setattr(paths, "PRETRAINED", quantized.parent)
    return quantized


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "글 하나.txt"
    file.write_text("오늘은 날씨가 좋아요. The sun is out.\n", encoding="utf-8")
    return file


def test_generate_eval_and_benchmarks_take_the_packaged_model_and_say_so(moai, packaged, text):
    code, out, err = moai("generate", "안녕 하세요", "-n", 2, "-t", 0, "--json")
    assert code == 0 and err.splitlines()[0] == NOTE and json.loads(out)["model"] == str(packaged)
    assert json.loads(out)["results"][0]["prompt"] == "안녕 하세요"
    code, out, err = moai("eval", "--data", text, "--json")
    assert code == 0 and NOTE in err and json.loads(out)["model"] == str(packaged)
    code, out, err = moai("bench", "samples", "-n", 2, "--json")
    assert code == 0 and NOTE in err and json.loads(out)["model"] == "moai-30m"
    code, out, err = moai("bench", "context", "--data", text, "--max-length", 64, "--json")
    assert code == 0 and NOTE in err and "moai-30m" in out


def test_the_newest_run_here_is_named_beside_it(moai, packaged, tmp_path):
    (tmp_path / "runs" / "mine" / "step-3").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "step-3" / "manifest.json").touch()
    assert "; --model runs/mine takes the newest run here" in moai("generate", "x", "-n", 1)[2]


def test_chat_takes_it_too(moai, packaged):
    code, out, err = moai("chat", "-n", 2, stdin="안녕\n/stats\n".encode())
    assert code == 0 and err.count(NOTE) == 1 and "turns" in out


def test_quantize_decodes_it_and_says_so(moai, packaged, tmp_path):
    code, out, err = moai("quantize", "--group-size", 32, "--bits", 8, "--eval", "none", "--json")
    assert code == 0 and NOTE in err
    report = json.loads(out)
    assert report["path"] == "runs/moai-30m-int4" and "was quantized already (int4)" in report["notes"][-1]
    assert report["bytes_before"] < report["bytes_after"]
    assert moai("generate", "-m", report["path"], "-p", "x", "-n", 2)[0] == 0


def test_its_name_is_a_model_everywhere(moai, packaged, tmp_path):
    code, out, err = moai("generate", "-m", "moai-30m", "-p", "x", "-n", 1, "--json")
    assert code == 0 and json.loads(out)["model"] == str(packaged) and NOTE not in err
    assert moai("bench", "samples", "-m", "moai-30m", "-n", 1, "--json")[0] == 0
    code, _, err = moai("quantize", "-m", "moai-30m", "--group-size", 32, "--eval", "none")
    assert code == 3 and "is quantized already (int4)" in err and "--allow-requantize" in err
    code, _, err = moai("convert", "moai-30m", "plain", "--to", "moai", "--outtype", "bf16", "--no-check")
    assert code == 0, err
    assert not json.loads((tmp_path / "plain" / "config.json").read_text())["quantization"]


def test_training_it_as_it_is_is_refused_and_decoding_it_shown(moai, packaged, tmp_path):
    small = ["train.steps=1", "train.eval_every=0", "train.sample_every=0", "train.batch_size=1", "data.max_length=32"]
    code, _, err = moai("train", "-r", "cpu-tiny", "-m", "moai-30m", *small, "-o", "tuned")
    assert code == 2 and "is quantized" in err and "hint: `moai qat` trains it" in err, err
    assert "quantiz" not in err.splitlines()[0], err  # of its sizes only
    assert not (tmp_path / "tuned").exists()
    assert moai("convert", "moai-30m", "plain", "--to", "moai", "--outtype", "bf16", "--no-check")[0] == 0
    assert moai("train", "-r", "cpu-tiny", "-m", "plain", *small, "-o", "tuned")[0] == 0


def test_a_folder_of_that_name_comes_first(moai, packaged, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moai-30m")
    code, out, _ = moai("generate", "-m", "moai-30m", "-p", "x", "-n", 1, "--json")
    assert code == 0 and json.loads(out)["model"] == "moai-30m"


def test_that_is_said_before_torch_is_imported(tmp_path):
    """Nobody waits seconds to read it."""
    code = (
        "import sys; from pathlib import Path; from moai_core import paths; paths.PRETRAINED = Path('nothing')\n"
        "from moai_cli.main import run\n"
        f"for words in {COMMANDS!r}: assert run(words) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("error: no model given") == len(COMMANDS), done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_one_the_error_says_how_to_get_one(command, moai, text, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PRETRAINED", tmp_path / "nothing")
    code, out, err = moai(*(text if word == "TEXT" else word for word in command))
    assert (code, out) == (2, "")
    assert err == (
        "error: no model given\nhint: train one with `moai train --recipe cpu-tiny`, then --model runs/cpu-tiny\n"
    )
