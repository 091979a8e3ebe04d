"""`moai init`: the folder trains at once; nothing is half-written; it asks only a person."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from typer.exceptions import TyperException
from typer.main import get_command

from moai_cli import main
from moai_core import device, paths
from moai_core import recipe as recipes

FILES = {
    ".gitignore",
    "NOTES.md",
    "recipe.yaml",
    "data/train/text.jsonl",
    "data/train/chat.jsonl",
    "data/valid/text.jsonl",
    "data/valid/chat.jsonl",
}


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_project_resolves_and_its_data_is_in_four_languages(moai, tmp_path):
    code, out, _ = moai("init", "proj")
    assert code == 0 and files(tmp_path / "proj") == FILES and "cd proj && moai train --recipe recipe.yaml" in out
    r = recipes.load(tmp_path / "proj/recipe.yaml")
    assert r.name == "proj" and r.output == "runs/proj" and r.tokenizer == "moai_tiny"
    assert r.data.train[0].path == str(tmp_path / "proj/data/train") and r.data.valid[0].path.endswith("data/valid")
    assert r.model == recipes.load("cpu-tiny").model
    rows = [json.loads(line) for p in (tmp_path / "proj/data").rglob("*.jsonl") for line in p.open(encoding="utf-8")]
    text = "".join(row.get("text", "") for row in rows)
    for first, last in (("가", "힣"), ("ぁ", "ん"), ("一", "龥"), ("a", "z")):
        assert sum(first <= c <= last for c in text) > 120
    assert sum("messages" in row for row in rows) >= 8
    notes = (tmp_path / "proj/NOTES.md").read_text()
    assert "moai train --recipe recipe.yaml" in notes and "runs/proj" in notes


def test_the_notes_can_be_pasted(moai, tmp_path):
    """Each command of the notes, as a shell splits it, is one that `moai` takes."""
    assert moai("init", "내 프로젝트")[0] == 0
    notes = (tmp_path / "내 프로젝트/NOTES.md").read_text(encoding="utf-8")
    commands = [shlex.split(c) for c in re.findall(r"^\| `moai (.*?)` \|", notes, re.M)]
    assert [c[0] for c in commands] == ["train", "train", "generate", "chat", "eval", "doctor"]
    assert all(c[c.index("--model") + 1] == "runs/내 프로젝트" for c in commands if "--model" in c)
    app = get_command(main.app)
    for name, *args in commands:
        app.commands[name].make_context(name, args)
    with pytest.raises(TyperException):
        app.commands["eval"].make_context("eval", ["data/valid"])


def test_it_trains_really(moai, tmp_path, monkeypatch):
    """The folder as it was written, for a few steps of a narrower model."""
    assert moai("init", "proj")[0] == 0
    monkeypatch.chdir(tmp_path / "proj")
    small = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "data.max_length=64"]
    code, _, err = moai("train", "--recipe", "recipe.yaml", "train.steps=3", "train.sample_every=0", *small)
    assert code == 0, err
    assert (tmp_path / "proj/runs/proj/step-3/model.safetensors").is_file()


@pytest.mark.slow
def test_it_trains_as_written(moai, tmp_path, monkeypatch):
    assert moai("init", "proj")[0] == 0
    monkeypatch.chdir(tmp_path / "proj")
    code, out, err = moai("train", "--recipe", "recipe.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] < 4, "the sample data is small enough to be learned"


def test_flags(moai, tmp_path):
    shutil.copytree(paths.TOKENIZERS / "moai_tiny", tmp_path / "tok")
    args = ("--recipe", "a100-2b", "--tokenizer", "tok", "--name", "한국 'x'", "--yes", "--json")
    code, out, _ = moai("init", "p", *args)
    assert code == 0 and set(json.loads(out)["files"]) == FILES
    r = recipes.load(tmp_path / "p/recipe.yaml")
    assert (r.name, r.model.preset, r.tokenizer) == ("한국 'x'", "2b", str(tmp_path / "tok"))
    shutil.move(tmp_path / "tok", tmp_path / "run" / "step-3")
    for n, (given, kept) in enumerate({"run": str(tmp_path / "run"), "moai-30m": "moai-30m"}.items()):
        assert moai("init", f"t{n}", "--tokenizer", given)[0] == 0
        assert recipes.load(tmp_path / f"t{n}" / "recipe.yaml").tokenizer == kept
    own = tmp_path / "own.yaml"
    own.write_text("train: {epochs: 2}\nmodel: {hidden_size: 16}\n")
    assert moai("init", "q", "--recipe", "own.yaml")[0] == 0
    r = recipes.load(tmp_path / "q/recipe.yaml")
    assert r.model.hidden_size == 16 and r.train.epochs is None and r.train.steps


@pytest.mark.parametrize("kind", ["a100", "h100", "a40", "rtx4090"])
def test_the_recipe_fits_the_gpu_found(moai, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(device, "nearest_class", lambda: kind)
    assert moai("init")[0] == 0
    r = recipes.load(tmp_path / "recipe.yaml")
    assert r.hardware.gpu == kind and r.name == tmp_path.name and r.accumulation() == 1


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (("full",), "full is not empty", "--force"),
        (("file",), "file is a file", "name a folder"),
        (("new", "--recipe", "cpu-tin"), "no recipe 'cpu-tin'", "did you mean cpu-tiny"),
        (("new", "--recipe", "bad.yaml"), "bad.yaml:1: unknown key 'tarin'", None),
        (("new", "--tokenizer", "moa"), "no tokenizer 'moa'", "moai_tiny"),
        (("new", "--name", "a/b"), "--name must be usable as a folder's name", None),
        (("new", "--name", ""), "--name must be usable as a folder's name (got '')", None),
        (("new", "--name", "a|b"), "--name must be usable as a folder's name", None),
        (("new", "--name", "a\x1b[2J"), "--name must be usable as a folder's name", None),
    ],
)
def test_refusals_leave_nothing(moai, tmp_path, args, message, hint):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.yaml").write_text("tarin: {steps: 3}\n")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = moai("init", *args)
    assert code == 2 and f"error: {message}" in err and (hint is None or hint in err)
    assert sorted(tmp_path.rglob("*")) == before


def test_force_writes_into_a_folder_with_files(moai, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "recipe.yaml").write_text("old")
    assert moai("init", ".", "--force")[0] == 0
    assert files(tmp_path) == FILES | {"mine.txt"} and (tmp_path / "mine.txt").read_text() == "keep"
    recipes.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_nothing(moai, tmp_path, monkeypatch, existed):
    if existed:
        (tmp_path / "p").mkdir()

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write(2) says it, without a name

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = moai("init", "p")
    assert code == 4 and f"error: {tmp_path / 'p'}: disk full" in err
    assert [p.name for p in tmp_path.rglob("*")] == (["p"] if existed else [])


def test_a_person_is_asked_and_enter_accepts(tmp_path):
    pty = pytest.importorskip("pty")
    import select
    import time

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-m", "moai_cli", "init", "p"])
    seen, answers, end = b"", [b"\n", b"a40-2b\n", b"\n"], time.monotonic() + 60
    prompts = [b"name [p]", b"recipe (", b"tokenizer ("]
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                chunk = os.read(terminal, 4096)
            except OSError:
                break
            if not chunk:
                break
            seen += chunk
        if prompts and prompts[0] in seen and seen.rstrip(b" ").endswith(b":"):
            os.write(terminal, answers.pop(0))
            seen += b" "
            prompts.pop(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen
    assert not prompts and recipes.load(tmp_path / "p/recipe.yaml").hardware.gpu == "a40"
