"""`moai recipes`: what it prints loads again, what is wrong is named with file and line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import yaml

from moai_core import recipe as recipes


def test_ls_has_the_exact_sizes(moai):
    code, out, _ = moai("recipes", "ls", "--json")
    found = {r["name"]: r for r in json.loads(out)}
    assert code == 0 and set(found) == set(recipes.names())
    assert found["a100-2b"]["parameters"] == 1_989_416_704 and found["a100-2b"]["fits"] is True
    code, out, _ = moai("recipes", "ls")
    assert code == 0 and "1,989,416,704" in out and "cpu-tiny" in out


def test_show_loads_to_the_same_recipe(moai, tmp_path):
    code, out, _ = moai("recipes", "show", "a40-2b", "optim.lr=8e-5", "~train.save_every")
    (tmp_path / "shown.yaml").write_text(out)
    want = recipes.load("a40-2b", ["optim.lr=8e-5", "~train.save_every"])
    assert code == 0 and recipes.load(tmp_path / "shown.yaml") == want
    assert "lr: 8.0e-05" in out and "# override 'optim.lr=8e-5'" in out
    assert "warmup_steps: 2000" in out and "# recipes/base/2b.yaml:" in out and "# default" in out
    code, out, _ = moai("recipes", "show", "a40-2b", "--json")
    assert recipes.Recipe.from_dict(json.loads(out)) == recipes.load("a40-2b")
    assert "eos_token_id: null" in moai("recipes", "show", "a40-2b", "--all")[1]


def test_show_schema_lists_every_key(moai):
    keys = {row["key"] for row in json.loads(moai("recipes", "show", "--schema", "--json")[1])}
    assert {"optim.lr", "model.hidden_size", "train.steps", "data.train", "hardware.gpu", "output"} <= keys
    code, out, _ = moai("recipes", "show", "--schema")
    assert code == 0 and "optim.lr" in out


def test_show_without_or_with_a_wrong_name(moai):
    code, _, err = moai("recipes", "show")
    assert code == 2 and "name a recipe" in err and "a100-2b" in err
    code, _, err = moai("recipes", "show", "a100-3b")
    assert code == 2 and "error: no recipe 'a100-3b'" in err and "did you mean a100-2b" in err


def test_cp_to_a_full_disk(moai, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write(2) says it, without a name

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = moai("recipes", "cp", "cpu-tiny", "mine.yaml")
    assert code == 4 and "error: mine.yaml: disk full" in err and not list(tmp_path.iterdir())


def test_cp(moai, tmp_path):
    code, out, _ = moai("recipes", "cp", "cpu-tiny", "mine.yaml")
    assert code == 0 and "moai train --recipe mine.yaml" in out
    copied, packaged = recipes.load(tmp_path / "mine.yaml"), recipes.load("cpu-tiny")
    assert (copied.name, copied.data, copied.train) == ("mine", packaged.data, packaged.train)
    code, _, err = moai("recipes", "cp", "cpu-tiny", "mine.yaml")
    assert code == 2 and "error: mine.yaml exists" in err and "--force" in err
    (tmp_path / "mine.yaml").write_text("x")
    assert moai("recipes", "cp", "a100-2b", "mine.yaml", "--force")[0] == 0
    assert recipes.load(tmp_path / "mine.yaml").model.preset == "2b"
    code, out, _ = moai("recipes", "cp", "a100-2b", "new/folder", "--json")
    assert code == 0 and json.loads(out)["to"] == "new/folder/a100-2b.yaml"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a100-2b.yaml", "folder", "mine.yaml", "new"]
    (tmp_path / "file").write_text("")
    code, _, err = moai("recipes", "cp", "a100-2b", "file/x.yaml")
    assert code == 4 and "file" in err and "Traceback" not in err


def test_check_prints_every_error(moai, tmp_path):
    (tmp_path / "bad.yaml").write_text("train: {steps: 0}\noptim:\n  lrr: 1\n  lr: '\x1b[2J'\n".replace("\x1b", ""))
    code, out, err = moai("recipes", "check", "a100-2b", "bad.yaml")
    assert code == 2 and "a100-2b: valid" in out
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 3 and all(line.startswith("error: bad.yaml:") for line in lines)
    assert "bad.yaml:3: unknown key 'optim.lrr'; did you mean optim.lr?" in err
    code, out, _ = moai("recipes", "check", "bad.yaml", "a100-2b", "--json")
    report = json.loads(out)
    assert code == 2 and [r["valid"] for r in report] == [False, True] and len(report[0]["errors"]) == 3
    assert moai("recipes", "check", "a100-2b", "optim.lr=1e-3")[0] == 0
    code, _, err = moai("recipes", "check", "a100-2b", "optim.lr=fast")
    assert code == 2 and "error: override 'optim.lr=fast': optim.lr must be a number" in err
    code, _, err = moai("recipes", "check", "optim.lr=1")
    assert code == 2 and "name at least one recipe" in err


def test_control_characters_never_reach_the_terminal(moai, tmp_path):
    (tmp_path / "evil.yaml").write_text(
        'train: {steps: 1}\ndescription: "a\\e[2Jb\\r\\nc"\noptim: {name: "\\e[31mx"}\n'
    )
    code, _, err = moai("recipes", "check", "evil.yaml")
    assert code == 2 and "optim.name must be one of" in err
    (tmp_path / "evil.yaml").write_text('train: {steps: 1}\ndescription: "a\\e[2Jb\\r\\nc \\u202e"\n')
    code, out, _ = moai("recipes", "show", "evil.yaml")
    assert code == 0 and yaml.safe_load(out)["description"].startswith("a")
