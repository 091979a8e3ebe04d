"""`moai convert` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest


def test_a_table_for_people_and_json_for_programs(moai, folder, tmp_path):
    code, out, err = moai("convert", folder, "작은 모델", "--to", "jamba")
    assert code == 0 and "jamba" in out and "the same in 64 of 64 greedy steps" in out and err == ""
    assert (tmp_path / "작은 모델" / "config.json").exists()
    code, out, err = moai("generate", "--model", "작은 모델", "--prompt", "안녕")
    assert code == 3 and "hint: `moai convert FOLDER NEW --to moai` makes one of it" in err
    code, out, err = moai("convert", "작은 모델", "back", "--to", "moai", "--json")
    report = json.loads(out)
    assert code == 0 and report["source"]["name"] == "작은 모델" and report["parity"]["greedy"] == 64
    assert report["parity"]["max_delta"] < 1e-4 and report["target"] == {"path": "back", "format": "moai"}
    code, out, err = moai("generate", "--model", "back", "--prompt", "안녕", "-n", 3, "--temperature", 0)
    assert code == 0 and out.strip()


def test_no_check_and_outtype(moai, folder):
    code, out, _ = moai("convert", folder, "out", "--to", "jamba", "--outtype", "bf16", "--no-check")
    assert code == 0 and "skipped: --no-check" in out and "bf16" in out


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["nowhere", "out", "--to", "moai"], 3, "error: nowhere: doesn't exist"),
        (["FOLDER", "out"], 2, "error: Missing option '--to'"),
        (["FOLDER", "out", "--to", "llama"], 2, "error: --to can't be 'llama'"),
        (["FOLDER", "out", "--to", "transformers-mamba"], 3, "error: transformers-mamba has no feed-forward"),
        (["FOLDER", "FOLDER", "--to", "jamba"], 2, "already exists"),
        (["someone/some-model", "out", "--to", "moai"], 4, "error: someone/some-model: no such path, and the hub"),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments, code, line, moai, folder, tmp_path):
    result, out, err = moai("convert", *(str(folder) if a == "FOLDER" else a for a in arguments))
    assert (result, out) == (code, "") and line in err
    assert len(err.splitlines()) == 2 and err.splitlines()[1].startswith("hint: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing(signum, folder, tmp_path):
    """From the first written byte to the end of the comparison the temporary folder is there: the signal comes then."""
    command = [sys.executable, "-m", "moai_cli", "convert", str(folder), "out", "--to", "jamba"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "error: interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_outside_of_the_work_has_a_word(moai, folder, monkeypatch):
    """While libraries are imported nothing catches Ctrl-C but the command line's last resort."""
    import moai_core.convert

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(moai_core.convert, "convert", interrupted)
    assert moai("convert", folder, "out", "--to", "jamba") == (130, "", "error: interrupted\n")


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path):
    """The library's own retries would take half a minute and a page of warnings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "moai_cli", "convert", "someone/some-model", "out", "--to", "moai"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    first, second = done.stderr.splitlines()
    assert done.returncode == 4 and done.stdout == "" and second.startswith("hint: ")
    assert first.startswith("error: someone/some-model: no such path, and the hub can't be reached (")
