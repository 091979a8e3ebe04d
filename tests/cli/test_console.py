"""What the command line says beside its results."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from moai_cli import console, watch
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


@pytest.mark.parametrize("terminal", [False, True])
def test_long_work_tells_a_pipe_now_and_then_how_far_it_is(terminal, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=terminal, width=80))
    seconds = iter([0.0, 5.0, 10.5, 10.5, 12.0, 21.0, 21.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds))
    tell = console.NowAndThen()
    for done in range(4):
        tell(f"layers {done}/24")
    assert shown.getvalue() == ("" if terminal else "layers 1/24\nlayers 3/24\n")


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


# What a table may hold: names, paths, sentences, figures, scripts without spaces between words, marks without a name.
COLUMNS = ("package", "path", "version", "", "forward", "multiplied by")
ROWS = [
    ("compressed-tensors", "/a/path/that/is/long/enough/to/be/folded", "0.19.0", "ok", "1.3e-07", "[bold] it is"),
    ("모델 패키지", "runs/작은 모델", "2.13.0+cpu", "-", "", "not installed; pip install 'moai[gptq]'"),
    ("中文没有空格的一个很长很长很长的句子", "~/x", "1", "ok", "12,345,678.9", "activations in 16-bit integers"),
]


@pytest.mark.parametrize("width", [32, 40, 60, 80, 120, 300])
def test_tables_break_no_word_at_any_width(capsys, monkeypatch, width):
    """But paths, and what has no spaces; every cell is there, and no line is longer than the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    console.table(COLUMNS, ROWS, title="what a [title] says", right=(4,))
    lines = capsys.readouterr().out.split("\n")
    assert max(map(cell_len, lines)) <= width
    words = " ".join(lines).split()
    whole = [w for row in ROWS for cell in row for w in cell.split() if "/" not in w and w.isascii()]
    assert not {*whole, "[title]", "모델", "패키지", "multiplied"} - {*words}
    folded = "".join(words)
    assert all(letter in folded for letter in set("".join(row[0] + row[1] for row in ROWS)) - {" "})
    if width == 300:
        assert lines[2].split()[:3] == [ROWS[0][0], ROWS[0][1], "0.19.0"]
        assert lines[1].index("forward") == lines[2].index("1.3e-07"), "at the right"


def test_a_pipe_gets_whole_lines(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console.table(COLUMNS, ROWS, title="a title " * 20)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "a title " * 20 and not any(line.endswith(" ") for line in lines)
    assert len(lines) == 1 + len(ROWS) and all(row[5] in line for row, line in zip(ROWS, lines[1:], strict=True))


@pytest.mark.parametrize("width", [40, 49, 50, 60, 66, 76, 80, 90, 100, 120])
def test_a_bar_of_training_shows_count_and_eta_at_any_width(monkeypatch, width):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    for module in (console, watch):
        monkeypatch.setattr(module, "err", terminal)
    event = {"parameters": 9, "device": "cpu", "ranks": 1, "precision": "fp32", "rows": 8, "run_dir": "r", "step": 0}
    event |= {"event": "start", "resumed_from": None, "log_every": 10, "steps": 1600}
    step = {"event": "step", "step": 1234, "steps": 1600, "loss": 2.5, "lr": 1e-4, "memory_mb": 29700.0}
    with watch.Watch() as shown:
        shown(event)
        shown(step | {"tokens_per_s": 47400.0})
    last = [line for line in terminal.file.getvalue().split("\r") if "1234/1600" in line][-1]
    assert "ETA" in last and "loss 2.5000" in last and "…" not in last
    assert ("47.4k tok/s" in last) == (width >= 66) and ("29.7 GB" in last) == (width >= 76)
