"""`moai generate`: every source of prompts, every kind of output, and one clear line for whatever is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from moai_cli.console import clean

# Erases the screen, retitles the window, writes right to left, C1's CSI.
ESCAPES = "\x1b[2J\x1b]0;pwned\x07\u202e\x9b31m"

# ---- what works -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_continued_on_stdout_and_the_same_seed_gives_the_same_text(moai, folder):
    code, out, err = moai("generate", "--model", folder, "--prompt", "옛날 옛적에", "-n", "12", "--seed", "7")
    assert code == 0 and out.endswith("\n") and "12 tokens" in err and "seed 7" in err
    assert moai("generate", "-m", folder, "-p", "옛날 옛적에", "-n", "12", "--seed", "7")[1] == out
    assert moai("generate", "-m", folder, "-n", "12", "--seed", "7", stdin="옛날 옛적에\n".encode())[1] == out
    assert moai("generate", "-m", folder, "-p", "옛날 옛적에", "-n", "12", "--seed", "8")[1] != out


def test_a_file_of_text_gives_a_line_a_prompt(moai, folder, tmp_path):
    (tmp_path / "in.txt").write_text("hello\r\n세계\nこんにちは\n", encoding="utf-8")
    code, out, _ = moai("generate", "-m", folder, "-i", "in.txt", "-n", "8", "--seed", "1")
    assert code == 0 and len(out.splitlines()) == 3
    alone = moai("generate", "-m", folder, "-p", "세계", "-n", "8", "--seed", "1", "--json")[1]
    alone = json.loads(alone)["results"][0]["text"]
    assert out.split("\n")[1] == clean(alone.replace("\n", "\\n"))
    code, out2, err = moai("generate", "-m", folder, "-i", "in.txt", "-o", "out.txt", "-n", "8", "--seed", "1")
    assert (code, out2) == (0, "") and (tmp_path / "out.txt").read_text(encoding="utf-8") == out and "out.txt" in err
    piped = moai(
        "generate", "-m", folder, "-i", "-", "-n", "8", "--seed", "1", stdin=(tmp_path / "in.txt").read_bytes()
    )
    assert piped[1] == out


def test_rows_of_jsonl_have_their_own_settings_and_keep_their_order(moai, folder, tmp_path):
    rows = [
        {"prompt": "hello", "max_new_tokens": 20, "temperature": 0, "id": "a"},
        {"prompt": "dog " * 50, "max_new_tokens": 1, "seed": 9},
        {
            "messages": [{"role": "system", "content": "친절"}, {"role": "user", "content": "hi"}],
            "logprobs": 2,
            "id": 7,
        },
        {"prompt": "", "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "stop": ["x", "y"]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = moai(
        "generate", "-m", folder, "-i", "in.jsonl", "-o", "out.jsonl", "-n", "5", "--seed", "3", "--json"
    )
    assert code == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == json.loads(out)["results"]
    assert [row.get("id") for row in written] == ["a", None, 7, None]
    assert [row["completion_tokens"] for row in written][:3] == [20, 1, 5]
    assert [row["seed"] for row in written][1:] == [9, 3, 3]
    assert (
        len(written[2]["logprobs"]) == 5 and len(written[2]["logprobs"][0]["top"]) == 2 and "logprobs" not in written[0]
    )
    for row, answer in zip(rows, written, strict=True):
        (tmp_path / "one.jsonl").write_text(json.dumps(row))
        one = json.loads(
            moai("generate", "-m", folder, "-i", "one.jsonl", "-n", "5", "--seed", "3", "--batch-size", 1)[1]
        )
        drop = {"prefill_seconds", "decode_seconds"}
        assert {k: v for k, v in one.items() if k not in drop} == {k: v for k, v in answer.items() if k not in drop}


def test_chat_wraps_prompts_in_the_template(moai, folder, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]}'
    )
    row = json.loads(moai("generate", "-m", folder, "-i", "in.jsonl", "-n", "6", "--seed", "3")[1])
    for flags in (("--system", "S"), ("--chat", "--system", "S")):
        out = json.loads(moai("generate", "-m", folder, "-p", "hi", *flags, "-n", "6", "--seed", "3", "--json")[1])
        assert out["results"][0]["text"] == row["text"]


def test_no_control_character_reaches_the_terminal(moai, folder, tmp_path, monkeypatch):
    from moai_core.generation.text import Vocabulary

    # A model whose every token is an escape sequence, cut across the borders of tokens.
    pieces = [piece.encode() for piece in ("\x1b", "[2J", "\x1b]0;x\x07", "ok", "\u202e", "\r")] + [b"\xc2", b"\x9b"]
    monkeypatch.setattr(Vocabulary, "bytes", lambda self, token: pieces[token % len(pieces)])
    for flags in ((), ("--json",), ("-i", "in.txt"), ("-i", "in.jsonl")):
        (tmp_path / "in.txt").write_text(ESCAPES + "\n")
        (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": ESCAPES, "id": ESCAPES}))
        source = () if "-i" in flags else ("-p", ESCAPES)
        code, out, _ = moai("generate", "-m", folder, *source, *flags, "-n", "60", "--temperature", "3", "--seed", "1")
        assert code == 0 and "ok" in out
    result = json.loads(
        moai("generate", "-m", folder, "-p", ESCAPES, "-n", "60", "--seed", "1", "-t", "3", "--json")[1]
    )
    assert result["results"][0]["prompt"] == ESCAPES and "\x1b" in result["results"][0]["text"]
    code, _, err = moai("generate", "-m", folder, "-i", ESCAPES.replace("\x1b", "e\x1b"))
    assert code == 4 and "pwned" in err


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["-m", "nowhere", "-p", "x"], 3, "error: nowhere: doesn't exist"),
        (["-m", "MODEL"], 2, "error: stdin: no prompt in it"),
        (["-m", "MODEL", ""], 2, 'error: the prompt is empty\nhint: --prompt "" begins a text from nothing\n'),
        (["-m", "MODEL", "-p", "x", "-i", "y"], 2, "a prompt or --input-file, not both"),
        (["-m", "MODEL", "x", "-i", "y"], 2, "a prompt or --input-file, not both"),
        (["-m", "MODEL", "x", "-p", "y"], 2, "two prompts: 'x' and --prompt 'y'"),
        (["-m", "MODEL", "-i", "none.txt"], 4, "none.txt: No such file"),
        (
            ["-m", "MODEL", "-p", "x", "--top-p", "1.5"],
            2,
            "--top-p must be a number > 0 and <= 1 (1 switches it off) (got 1.5)",
        ),
        (["-m", "MODEL", "-p", "x", "--temperature", "-1"], 2, "--temperature must be a number >= 0"),
        (["-m", "MODEL", "-p", "x", "--temperature", "nan"], 2, "--temperature must be"),
        (
            ["-m", "MODEL", "-p", "x", "--max-new-tokens", "0"],
            2,
            "--max-new-tokens must be a whole number >= 1 (got 0)",
        ),
        (["-m", "MODEL", "-p", "x", "--top-k", "-2"], 2, "--top-k must be"),
        (["-m", "MODEL", "-p", "x", "--min-p", "2"], 2, "--min-p must be"),
        (["-m", "MODEL", "-p", "x", "--repetition-penalty", "0"], 2, "--repetition-penalty must be"),
        (["-m", "MODEL", "-p", "x", "--seed", "-1"], 2, "--seed must be"),
        (["-m", "MODEL", "-p", "x", "--stop", ""], 2, "--stop must be"),
        (["-m", "MODEL", "-p", "x", "--batch-size", "0"], 2, "--batch-size must be"),
        (["-m", "MODEL", "-p", "x", "--logprobs", "2"], 2, "error: --logprobs: plain text has no place for them"),
        (["-m", "MODEL", "-p", "x", "--device", "tpu"], 2, "--device must be auto, cpu, cuda or cuda:N (got 'tpu')"),
        (["-m", "MODEL", "-p", "x", "--device", "cuda:99"], 2, "--device cuda:99: this machine has"),
        (["-m", "MODEL", "-p", "x", "--dtype", "int4"], 2, "--dtype must be one of"),
        (["-m", "MODEL", "-p", "x", "--scan", "magic"], 2, "unknown scan backend 'magic'"),
        (["-m", "MODEL", "-p", "x", "--tokenizer", "nope"], 2, "nope"),
        (["-m", "MODEL", "-p", "a\udcffb"], 2, "the prompt is not valid UTF-8 (character 2)"),
        (["-m", "MODEL", "-p", "x", "-o", "there.txt"], 2, "there.txt: exists already"),
        (["-m", "MODEL", "-p", "x", "-o", "no/dir/x.txt"], 2, "the folder no/dir doesn't exist"),
        (["-m", "MODEL", "-p", "x", "-o", "."], 2, "is a folder"),
        (["-m", "MODEL", "-p", "x", "-o", "/dev/null", "--force"], 2, "/dev/null: is not a regular file"),
        (["-m", "MODEL", "-p", "x", "--sead", "1"], 2, "No such option: --sead"),
    ],
)
def test_wrong_use_gets_one_line_and_an_exit_code(args, code, message, moai, folder, tmp_path):
    (tmp_path / "there.txt").write_text("precious")
    result = moai("generate", *(folder if arg == "MODEL" else arg for arg in args))
    assert (result[0], result[1]) == (code, "") and message in result[2]
    assert result[2].startswith("error: ") and len(result[2].splitlines()) <= 2
    assert (tmp_path / "there.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"prompt": "a"}\n{"prompt": "b", "temperatur": 1}\n',
            "in.jsonl:2: unknown key 'temperatur'\nhint: did you mean 'temperature'?",
        ),
        (b'{"prompt": "a", "top_p": 0}', "in.jsonl:1: top_p must be a number > 0 and <= 1 (1 switches it off) (got 0)"),
        (b'{"prompt": "a", "temperature": NaN}', "in.jsonl:1: temperature must be"),
        (b'{"prompt": "a", "stop": [1]}', "in.jsonl:1: stop must be"),
        (b'{"prompt": "a"\n', "in.jsonl:1: not valid JSON"),
        (b"[" * 100_000, "in.jsonl:1: not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "in.jsonl:1: not valid JSON (a key appears twice)"),
        (b'["a"]', 'in.jsonl:1: must be an object such as {"prompt": "..."} (got list)'),
        (b'{"prompt": 5}', "in.jsonl:1: prompt must be a text (got int)"),
        (b'{"temperature": 0.5}', 'in.jsonl:1: must have either "prompt" or "messages"'),
        (b'{"prompt": "a", "messages": []}', 'in.jsonl:1: must have either "prompt" or "messages"'),
        (b'{"messages": [{"role": "bot", "content": "x"}]}', "in.jsonl:1: messages, message 1: role must be one of"),
        (b'{"prompt": "a"}\n\n{"prompt": "b"}', "in.jsonl:2: empty line"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', "in.jsonl:2: not valid UTF-8 (byte 13 of the line)"),
        (b'{"prompt": "\\ud800"}', "in.jsonl:1: prompt is not valid UTF-8"),
        (b'{"prompt": "a", "id": {}}', "in.jsonl:1: id must be a text or a whole number"),
        (b"", "in.jsonl: no prompts in it"),
        (b"\n\n", "in.jsonl: no prompts in it"),
        (bytes(range(256)), "in.jsonl:1: not valid"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_generated(content, message, moai, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(content)
    # Not even a model is needed to be told: the rows are read first.
    code, out, err = moai("generate", "-m", "nowhere", "-i", "in.jsonl", "-o", "out.jsonl")
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_damaged_or_mismatched_model_is_refused(moai, folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    assert moai("generate", "-m", broken, "-p", "x")[0] == 3
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    code, _, err = moai("generate", "-m", bare, "-p", "x")
    assert code == 3 and "has no tokenizer.json" in err and "--tokenizer" in err
    assert moai("generate", "-m", bare, "-p", "x", "-n", "2", "--tokenizer", "moai_tiny")[0] == 0


def test_weights_of_nan_end_with_their_own_code(moai, folder, tmp_path):
    from moai_core.checkpoint import load_model

    model = load_model(folder)
    model.lm_head.weight.data[9] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    code, _, err = moai("generate", "-m", tmp_path / "nan", "--tokenizer", "moai_tiny", "-p", "x")
    assert code == 5 and "not finite" in err


def test_the_newest_run_is_offered(moai, folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "runs" / name / "step-5").mkdir(parents=True)
        (tmp_path / "runs" / name / "step-5" / "manifest.json").write_text("{}")
        time.sleep(0.01)
    assert "--model runs/two" in moai("generate", "-p", "x")[2]


def test_help_has_examples(moai):
    code, out, _ = moai("generate", "--help")
    assert code == 0 and "--input-file" in out and "moai generate --model runs/cpu-tiny" in out


# ---- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("flags", [("-i", "in.txt", "-o", "out.txt"), ("-p", "hello")])
def test_a_signal_ends_the_work_with_its_code_and_without_a_file(flags, signum, moai, folder, tmp_path, monkeypatch):
    from moai_core.generation import engine

    (tmp_path / "in.txt").write_text("hello\nworld\n")
    step, steps = engine._step, iter(range(10**9))

    def signalled(*args):
        if next(steps) == 20:
            os.kill(os.getpid(), signum)
        return step(*args)

    monkeypatch.setattr(engine, "_step", signalled)
    code, out, err = moai("generate", "-m", folder, *flags, "-n", "1000000", "-t", "0")
    assert code == 128 + signum and "error: interrupted" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]
    assert bool(out.strip()) == ("-p" in flags)


def test_text_streams_through_a_pipe_and_ends_with_its_reader(folder):
    command = [
        sys.executable,
        "-m",
        "moai_cli",
        "generate",
        "-m",
        str(folder),
        "-p",
        "hello",
        "-n",
        "1000000",
        "-t",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(process.stdout.read(64)) == 64
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("redirect", "code", "message"),
    [
        ("> /dev/full", 4, b"error: stdout: disk full (No space left on device)\nhint: free some space"),
        ("--json > /dev/full", 4, b"error: stdout: disk full"),
        (">&-", 0, b"seed 1"),
        ("| cat", 0, b"seed 1"),
    ],
)
def test_where_stdout_leads(redirect, code, message, folder):
    command = (
        f"set -o pipefail; '{sys.executable}' -m moai_cli generate -m '{folder}' -p 옛날 -n 40 --seed 1 {redirect}"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environment)
    assert done.returncode == code and message in done.stderr and b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    if redirect == "| cat":
        assert not done.stdout.decode().isascii()


@pytest.mark.slow
def test_a_million_characters_from_a_pipe(moai, folder):
    text = ("The quick brown fox jumps over the lazy dog. " * 23_000)[:1_000_000].encode()
    code, out, err = moai("generate", "-m", folder, "-n", "5", "-t", "0", stdin=text)
    assert code == 0 and out.strip() and re.search(r"\d{6} \+ 5 tokens", err)
