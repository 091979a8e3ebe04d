"""`moai chat`: from a pipe, and on a pseudo-terminal with Ctrl-C and Ctrl-D."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from moai_core import locks


def say(*lines):
    return "".join(line + "\n" for line in lines).encode()


# ---- from a pipe ----------------------------------------------------------------------------------------------------


def test_each_line_is_a_message_and_each_answer_a_line(moai, folder):
    flags = ("chat", "--model", folder, "-n", "8", "--seed", "1")
    code, out, err = moai(*flags, stdin=say("hello", "한국어", "  ", "again"))
    assert code == 0 and len(out.split("\n")) >= 4 and err.count("cut at 8 tokens") == 3
    assert moai(*flags, stdin=say("hello", "한국어", "again"))[1] == out
    assert moai(*flags, stdin=say("hello"))[1] == out[: len(moai(*flags, stdin=say("hello"))[1])]
    assert moai(*flags, stdin=b"")[:2] == (0, "")


def test_lines_can_be_joined(moai, folder, tmp_path):
    for lines in (["one\\", "two"], ['"""one', 'two"""'], ['"""', "one", "two", '"""']):
        moai("chat", "-m", folder, "-n", "4", stdin=say(*lines, "/save a.session --force"))
        messages = transcript(tmp_path / "a.session")
        assert messages[0] == {"role": "user", "content": "one\ntwo"} and len(messages) == 2


def transcript(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(bytes(file.get_tensor("session").tolist()))["messages"]


def test_commands(moai, folder, tmp_path):
    lines = [
        "/help",
        "/system",
        "/system Be kind.",
        "hello",
        "again",
        "/retry",
        "/undo",
        "/set temperature 0.25",
        "/set stop END",
        '/set stop ["a", "b"]',
        "/set",
        "/stats",
        "/save one.session",
        "/clear",
        "/save two.session",
        "/load one.session",
        "/system -",
        "/save one.session",
        " /not a command",
        "/exit",
        "never read",
    ]
    code, out, err = moai("chat", "-m", folder, "-n", "6", "--seed", "2", stdin=say(*lines))
    assert code == 0, err
    for name in ("/help", "/system", "/set", "/retry", "/undo", "/clear", "/save", "/load", "/stats", "/exit"):
        assert name in out
    assert "no system message" in err and "system: Be kind." in err and "taken back: again" in err
    assert 'stop = ["END"]' in err and 'stop = ["a", "b"]' in err and "temperature = 0.25" in err
    assert re.search(r"turns +1 *\n", out) and re.search(r"temperature +0.25", out) and re.search(r"seed +2", out)
    assert "saved to one.session" in err and "one.session: 1 turns" in err
    assert transcript(tmp_path / "two.session") == [{"role": "system", "content": "Be kind."}]
    assert transcript(tmp_path / "one.session")[0]["content"] == "hello"


def test_a_session_file_continues_bit_for_bit(moai, folder, tmp_path):
    flags = ("chat", "-m", folder, "-n", "8", "--seed", "5")
    whole = moai(*flags, stdin=say("hello", "한국어", "again"))[1]
    first = moai(*flags, "--session", "a.session", stdin=say("hello"))
    assert first[0] == 0 and "a new conversation" in first[2] and "saved to a.session" in first[2]
    second = moai("chat", "-m", folder, "--session", "a.session", stdin=say("한국어"))
    third = moai("chat", "-m", folder, stdin=say("/load a.session", "again"))
    assert "1 turns" in second[2] and "2 turns" in third[2]
    assert first[1] + second[1] + third[1] == whole
    changed = moai("chat", "-m", folder, "--session", "a.session", "-t", "0", "--system", "New.", stdin=say("/set"))
    assert "reading the conversation again" in changed[2] and re.search(r"temperature +0(\.0)?\n| *$", changed[1])
    assert re.search(r"max_new_tokens +8", changed[1])


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        (["/loat x"], 2, "error: unknown command '/loat'\nhint: did you mean /load?"),
        (["/undo"], 2, "error: there is no turn to take back"),
        (["/retry"], 2, "error: there is no turn to take back"),
        (["/set temprature 1"], 2, "error: unknown setting 'temprature'\nhint: did you mean temperature?"),
        (
            ["/set temperature hot"],
            2,
            "error: /set temperature must be a number >= 0 (0 takes the likeliest token) (got 'hot')",
        ),
        (["/set top_p 0"], 2, "error: /set top_p must be"),
        (["/set seed"], 2, "error: /set seed must be"),
        (["/save"], 2, "error: /save needs a file name"),
        (["/save there"], 2, "error: there: exists already"),
        (
            ["/save a b.session"],
            2,
            "error: /save takes one file name (got 2)\nhint: quote a name with spaces: /save 'a b.session'\n",
        ),
        (["/load a b.session"], 2, "error: /load takes one file name (got 2)"),
        (["/save no/folder/x"], 4, "no/folder/x: No such file"),
        (["/save 'x"], 2, "error: can't read the file name"),
        (["/load"], 2, "error: /load needs a file name"),
        (["/load none"], 3, "error: none: can't be read (No such file"),
        (["/load there"], 3, "error: there: truncated or not a safetensors file"),
        (["ok", "\udcff"], 2, "error: stdin:2: not valid UTF-8 (byte 1 of the line)"),
    ],
)
def test_a_pipe_ends_at_the_first_error(lines, code, message, moai, folder, tmp_path):
    (tmp_path / "there").write_text("x")
    stdin = "".join(line + "\n" for line in lines).encode(errors="surrogateescape")
    result = moai("chat", "-m", folder, "-n", "2", stdin=stdin)
    assert result[0] == code and message in result[2]
    assert (tmp_path / "there").read_text() == "x"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["-m", "nowhere"], 3, "nowhere: doesn't exist"),
        (["-m", "MODEL", "--top-p", "2"], 2, "--top-p must be"),
        (["-m", "MODEL", "--session", "no/folder/x"], 2, "the folder no/folder doesn't exist"),
        (["-m", "MODEL", "--session", "."], 2, "--session .: is a folder"),
        (["-m", "MODEL", "--session", "/dev/null"], 2, "--session /dev/null: is not a regular file"),
        (["-m", "MODEL", "--session", "there"], 3, "there: truncated or not a safetensors file"),
    ],
)
def test_wrong_use_gets_one_line_and_an_exit_code(flags, code, message, moai, folder, tmp_path):
    (tmp_path / "there").write_text("x")
    result = moai("chat", *(folder if flag == "MODEL" else flag for flag in flags), stdin=say("hello"))
    assert (result[0], result[1]) == (code, "") and message in result[2] and len(result[2].splitlines()) <= 2
    assert (tmp_path / "there").read_text() == "x"


def test_a_session_is_open_in_one_chat_at_a_time(moai, folder, tmp_path):
    """The second is told before it loads anything; the lock is gone with the first."""
    with locks.lock_file(tmp_path / "금요일"):
        code, out, err = moai("chat", "-m", folder, "--session", "금요일", stdin=say("hello"))
        assert (code, out) == (6, "") and f"금요일: process {os.getpid()} has it open\nhint: " in err, err
        assert not (tmp_path / "금요일").exists()
    assert moai("chat", "-m", folder, "-n", "2", "--session", "금요일", stdin=say("hello"))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["금요일"]


def test_a_folder_that_refuses_files_is_named_before_the_first_message(moai, folder, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path() and access(path, mode))
    code, out, err = moai("chat", "-m", folder, "--session", "a.session", stdin=say("hello"))
    assert (code, out) == (4, "") and "--session a.session: no permission to write to ." in err
    code, out, err = moai("generate", "-m", folder, "-p", "hello", "-o", "a.txt")
    assert (code, out) == (4, "") and "--output-file a.txt: no permission to write to ." in err


def test_another_models_session_is_refused(moai, folder, tmp_path):
    import torch

    from moai_core.checkpoint import load_model

    assert moai("chat", "-m", folder, "-n", "2", stdin=say("hello", "/save a.session"))[0] == 0
    other = load_model(folder)
    with torch.no_grad():
        other.lm_head.weight[50] += 1
    other.save_pretrained(tmp_path / "other")
    flags = ("-m", tmp_path / "other", "--tokenizer", "moai_tiny", "--session", "a.session")
    before = (tmp_path / "a.session").read_bytes()
    code, out, err = moai("chat", *flags, stdin=say("hello"))
    assert (code, out) == (3, "") and "a.session: this session was made with another model" in err
    assert (tmp_path / "a.session").read_bytes() == before


def test_escapes_from_messages_files_and_answers_never_reach_the_terminal(moai, folder, monkeypatch):
    from moai_core.generation.text import Vocabulary

    pieces = [b"\x1b", b"[2J", b"\x1b]0;x\x07", b"ok", "\u202e".encode(), b"\r", b"\xc2", b"\x9b"]
    monkeypatch.setattr(Vocabulary, "bytes", lambda self, token: pieces[token % len(pieces)])
    evil = "\x1b[2J\x1b]0;x\x07\u202e"
    lines = [evil + "hi", "/system " + evil, "/undo", "hi", "/save a.session", "/load a.session", "/system", "/stats"]
    code, out, _ = moai("chat", "-m", folder, "-n", "40", "-t", "3", "--seed", "1", stdin=say(*lines))
    assert code == 0 and "ok" in out
    assert moai("chat", "-m", folder, stdin=say("/" + evil))[0] == 2


def test_sigterm_saves_the_session_and_exits_143(moai, folder, tmp_path, monkeypatch):
    from moai_core.generation import engine

    step, steps = engine._step, iter(range(10**9))

    def signalled(*args):
        if next(steps) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(engine, "_step", signalled)
    flags = ("chat", "-m", folder, "-t", "0", "--session", "a.session")
    code, _, err = moai(*flags, stdin=say("/set max_new_tokens 5", "hello", "/set max_new_tokens 100000", "again"))
    assert code == 143 and "saved to a.session" in err
    assert [message["role"] for message in transcript(tmp_path / "a.session")] == ["user", "assistant"]


# ---- on a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """A `moai chat` on a pseudo-terminal."""

    def __init__(self, folder, cwd, *flags):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "moai_cli", "chat", "-m", str(folder), "-t", "0", "-n", "1000000", *flags]
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            # Ctrl-C reaches the foreground processes of the terminal that one controls.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text = ""

    def until(self, wanted, seconds=120):
        """Read until `wanted` (a regular expression) appears in what is new; returns it all."""
        start, end = len(self.text), time.monotonic() + seconds
        while not re.search(wanted, self.text[start:]):
            assert time.monotonic() < end, f"{wanted!r} not in {self.text[start:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:
                    data = b""
                assert data or re.search(wanted, self.text[start:]), self.text
                self.text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text + data.decode("utf-8", "replace"))
        return self.text[start:]

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        """Exit code, once the program has left by itself."""
        try:
            while self.process.poll() is None and select.select([self.master], [], [], 60)[0]:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")
        except OSError:
            pass
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(folder, tmp_path):
    terminal = Terminal(folder, tmp_path)
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until(r"hello\s+\S.{40}")
    terminal.type("\x03")
    assert "Traceback" not in terminal.until(r"stopped(?s:.*)> ")
    terminal.type("/stats\n")
    assert re.search(r"turns +1\b", terminal.until("last answer(?s:.*)> "))
    terminal.type("/nonsense\n")
    terminal.until(r"error: unknown command(?s:.*)> ")
    terminal.type("/save kept.session\n")
    terminal.until(r"saved to kept.session(?s:.*)> ")
    terminal.type("\x04")
    assert terminal.end() == 0 and "Traceback" not in terminal.text
    messages = transcript(tmp_path / "kept.session")
    assert [message["role"] for message in messages] == ["user", "assistant"] and len(messages[1]["content"]) > 20
    history = Path(os.environ["MOAI_CACHE"]) / "chat_history"
    assert "hello" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_a_second_ctrl_c_at_the_prompt_leaves_with_0(folder, tmp_path):
    terminal = Terminal(folder, tmp_path)
    terminal.until("> ")
    terminal.type("half a mess")
    terminal.until("half a mess")
    time.sleep(0.3)  # a signal that comes while readline still draws the last letter is seen at the next one only
    terminal.type("\x03")
    terminal.until(r"Ctrl-C again(?s:.*)> ")
    terminal.type("\x03")
    assert terminal.end() == 0 and "Traceback" not in terminal.text
