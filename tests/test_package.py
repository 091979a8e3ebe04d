"""The wheel carries recipes, packaged text, tokenizers, GPU kernels and the model, and finds them without a checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_finds_its_recipes_and_tokenizers(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("moai-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    top = {path.name for path in (tmp_path / "site").iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"moai_core", "moai_cli"}, "a top-level tokenizers/ would shadow the library"
    kernels = {path.name for path in (ROOT / "moai_core" / "cuda").glob("*.cu*")}
    inside = {path.name for path in (tmp_path / "site" / "moai_core" / "cuda").glob("*.cu*")}
    assert {"common.cuh", "adamw.cu"} <= kernels == inside
    code = (
        "import moai_core; from moai_core import paths, recipe; from moai_core.data.tokenize import load_tokenizer; "
        "assert str(paths.RECIPES).startswith(sys.argv[1]); made = recipe.load('cpu-tiny'); "
        "assert made.data.train[0].path.startswith(sys.argv[1]); from moai_core import storage; "
        "model = paths.pretrained(); assert str(model).startswith(sys.argv[1]); storage.verify(model); print(len(load_tokenizer('moai_tiny')), recipe.names())"
    )
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); " + code, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6144 ['a100-2b'")
