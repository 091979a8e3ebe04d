"""What the command line says beside its results."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys

import pytest

from moai_core import paths
from moai_core.errors import StorageError, storage_error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "-n", "1e3"], "--max-new-tokens must be a whole number (got '1e3')\nhint: moai generate --help"),
        (["bench", "--limit", "x"], "--limit must be a number (got 'x')\nhint: moai bench --help"),
        (["data", "show", "x", "--samples", "-1"], "--samples must be >= 0 (got '-1')\nhint: moai data show --help"),
        (["data", "build", "x", "--level", "99"], "--level must be <= 19 (got '99')\nhint: moai data build --help"),
        (["eval", "-m"], "Option '-m' requires an argument.\nhint: moai eval --help"),
        (["recipes", "lss"], "No such command 'lss'. Did you mean 'ls'?\nhint: moai recipes --help"),
    ],
)
def test_wrong_flags_name_flag_value_and_command(moai, words, message):
    assert moai(*words) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(("command", "code", "err"), [("chat", 0, b""), ("generate", 2, b"error: stdin: no prompt")])
def test_a_closed_stdin_is_an_empty_one(command, code, err, folder):
    line = f"'{sys.executable}' -m moai_cli {command} -m '{folder}' <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True)
    assert (done.returncode, done.stdout) == (code, b"") and done.stderr.startswith(err), done.stderr


def test_paths_in_hints_can_be_pasted(moai, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PRETRAINED", tmp_path / "nothing")
    (tmp_path / "runs" / "작은 모델" / "step-3").mkdir(parents=True)
    (tmp_path / "runs" / "작은 모델" / "step-3" / "manifest.json").touch()
    assert moai("chat")[2] == "error: no model given\nhint: the newest one here: --model 'runs/작은 모델'\n"
    assert (
        "train it with moai train --recipe 'my recipe.yaml'" in moai("recipes", "cp", "cpu-tiny", "my recipe.yaml")[1]
    )


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOENT, "check the path: a file or folder in it doesn't exist"),
        (errno.EISDIR, "name a file, not a folder"),
        (errno.EEXIST, "a file stands where a folder should be: choose another name"),
        (errno.EACCES, "check that the path exists and that you may read and write there"),
        (errno.ENOSPC, "free some space or choose another folder, then run the same command again"),
    ],
)
def test_hints_say_what_is_wrong_with_a_path(number, hint):
    assert storage_error(OSError(number, os.strerror(number)), "x").hint == hint


def test_a_cache_that_cannot_be_written_is_told(folder, tmp_path, monkeypatch):
    from moai_core.data.cache import tokenized
    from moai_core.data.tokenize import load_tokenizer

    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text\n" * 9)
    os.utime(tmp_path / "a.txt", (1, 1))
    with pytest.raises(StorageError) as caught:
        tokenized(str(tmp_path / "a.txt"), load_tokenizer("moai_tiny"))
    assert caught.value.hint == "free some space there, or set MOAI_CACHE to a folder you may write to"
    code = (
        "import logging; from moai_core import cpu; log = logging.getLogger('moai'); log.setLevel(20)\n"
        "log.addHandler(logging.StreamHandler()); cpu.settings()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "can't be written: kernels are compiled at each start" in done.stderr, done.stderr


def test_work_that_happens_once_is_a_line_on_stderr(moai, capsys):
    """A first use of GPU kernels compiles them; the core logs it, and a second command doesn't say it twice."""
    assert moai("recipes", "ls")[0] == moai("recipes", "ls")[0] == 0
    for name in ("conv", "[norm]", "conv"):
        logging.getLogger("moai.cuda").info("compiling GPU kernels for sm_%d (once): %s", 90, name)
    logging.getLogger("moai.cuda").debug("nobody asked")
    out, err = capsys.readouterr()
    want = [f"compiling GPU kernels for sm_90 (once): {name}" for name in ("conv", "[norm]")]
    assert out == "" and err.splitlines() == want


def test_one_process_of_a_distributed_run_speaks(moai, capsys, monkeypatch):
    log = logging.getLogger("moai")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setenv("RANK", "1")
    assert moai("recipes", "ls")[0] == 0 and log.handlers == []
