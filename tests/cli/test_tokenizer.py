"""`moai tokenizer` as a user meets it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

_WORDS = ["".join(random.Random(n).choices("abcdefghijklmnop", k=3 + n % 6)) for n in range(300)]
LINES = "".join(f"{_WORDS[n % 300]} {_WORDS[n * n % 299]}: 예순 {n}, 東京へ行きました。\n" for n in range(600))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(LINES, encoding="utf-8")
    return tmp_path / "text.txt"


def test_train_extend_eval(moai, text):
    code, out, err = moai("tokenizer", "train", "text.txt=2", "-o", "새것", "--vocab-size", 330, "--seed", 1)
    assert code == 0 and "ids" in out and "330" in out and err == ""
    (text.parent / "more.txt").write_text("amortization of debentures\n" * 40, encoding="utf-8")
    code, out, err = moai("tokenizer", "extend", "새것", "more.txt", "--add", 6, "--output", "more", "--json")
    report = json.loads(out)
    assert code == 0 and report["added"] == 6 and report["first_new_id"] == 330 and report["vocab_size"] == 336
    assert report["bytes_per_token"] > report["bytes_per_token_before"]
    code, out, err = moai("tokenizer", "eval", "새것", "more", "moai_tiny", "--data", "text.txt", "-d", "fin=more.txt")
    assert code == 0 and "bytes per token" in out and "moai_tiny" in out and "fin" in out
    code, out, err = moai("tokenizer", "eval", "새것", "--data", "text.txt", "--json")
    assert json.loads(out)["tokenizers"][0]["exact"] is True


def test_notes_and_warnings_go_to_stderr(moai, text):
    code, _, err = moai("tokenizer", "train", "text.txt", "-o", "a", "--vocab-size", 5000)
    assert code == 0 and "5,000 ids were asked for; no further pair was seen 10 times" in err
    code, _, err = moai("tokenizer", "train", "text.txt", "-o", "b", "--vocab-size", 5000, "--min-frequency", 1)
    assert code == 0 and "warning: of the last 1,000 merges" in err


def test_a_model_or_a_run_holds_a_tokenizer(moai, text, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "내 run" / "step-4")
    code, out, err = moai("tokenizer", "eval", "내 run", "moai_tiny", "moai-30m", "-d", "text.txt", "--json")
    run, tiny, _ = json.loads(out)["tokenizers"]
    assert code == 0 and err == "" and run["vocab_size"] == tiny["vocab_size"] and run["texts"] == tiny["texts"]
    code, _, err = moai("tokenizer", "extend", "내 run", "text.txt", "--add", 5, "-o", "more")
    assert code == 0 and (tmp_path / "more" / "chat_template.jinja").is_file()
    own = ("data.train=text.txt", "~data.valid", "data.valid_fraction=0.05", "tokenizer=./내 run")
    code, out, err = moai("train", "--recipe", "cpu-tiny", *own, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["parameters"]["head"] == run["vocab_size"] * 128, err


def test_a_tokenizer_that_gives_ids_other_meanings_is_warned_of(moai, text, folder):
    command = ("generate", "-m", folder, "-p", "東京", "-n", 2, "--tokenizer")
    assert moai("tokenizer", "train", "text.txt", "-o", "other", "--vocab-size", 300)[0] == 0
    code, _, err = moai(*command, "other")
    assert code == 0 and "warning: the tokenizer other gives ids other meanings than the one in" in " ".join(err.split())
    code, _, err = moai(*command, "moai_tiny")
    assert code == 0 and "warning" not in err


def test_extend_with_a_model(moai, text, folder):
    code, out, _ = moai("tokenizer", "extend", folder, "text.txt", "--add", 20, "--model", folder, "--out", "grown")
    assert code == 0 and "rows of the model" in out and "6,272 now" in out
    code, out, _ = moai("generate", "--model", "grown", "--prompt", "東京へ", "-n", 3, "--temperature", 0)
    assert code == 0 and out.strip()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "nowhere.txt", "-o", "x"], "error: nowhere.txt: no such file or folder"),
        (["train", "text.txt=0", "-o", "x"], "error: 'text.txt=0': the weight must be"),
        (["train", "text.txt", "-o", "x", "--vocab-size", "10"], "error: --vocab-size must lie between 263"),
        (["train", "text.txt", "-o", "text.txt"], "error: text.txt: already exists"),
        (["train", "text.txt", "-o", "x", "--on-error", "ignore"], "error: --on-error must be stop or skip"),
        (["extend", "nobody", "text.txt", "-o", "x"], "error: tokenizer 'nobody': no such folder or name"),
        (["eval", "moai_tiny", "--data", "text.txt", "--limit", "0"], "error: --limit must be at least 1 (got 0)"),
        (["eval", "moai_tiny", "--data", "text.bin"], "error: text.bin: no such file or folder"),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments, line, moai, text, tmp_path):
    code, out, err = moai("tokenizer", *arguments)
    assert (code, out) == (2, "") and line in err
    assert len(err.splitlines()) == 2 and err.splitlines()[1].startswith("hint: ")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_signal_while_merging_ends_it_and_leaves_nothing(tmp_path):
    """The library's trainer doesn't hear of signals: it is busy with enough text when the signal comes."""
    words = (
        f"{n * 7919 % 100_003:05d}"[::-1].translate(str.maketrans("0123456789", "abcdefghij")) for n in range(400_000)
    )
    (tmp_path / "much.txt").write_text("\n".join(words), encoding="utf-8")
    code = (
        "import sys, moai_core.tokenizer.train as train\n"
        "from moai_cli import interrupt\n"
        "from moai_cli.main import run\n"
        "inner = train.run_trainer\n"
        "def told(tokenizer, trainer, texts, tell):\n"
        "    inner(tokenizer, trainer, texts, lambda event: (tell(event), print(event['event'], flush=True)))\n"
        "train.run_trainer = told\n"
        "interrupt.catch()\n"
        "sys.exit(run(['tokenizer', 'train', 'much.txt', '-o', 'out', '--min-frequency', '1']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert "merging\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "error: interrupted" in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["much.txt"]
