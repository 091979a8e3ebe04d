"""The house's rules, read from the code: imports point down only, data folders stay data, start-up stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"errors", "paths"},
    {"config", "locks"},
    {"storage"},
    {"recipe"},
    {"footprint"},
    {"plan"},
    {"tracing"},
    {"cuda", "cpu", "tensors"},
    {"device", "scan", "quant"},
    {"model", "data"},
    {"weights"},
    {"checkpoint", "evaluate"},
    {"training", "generation", "convert", "tokenizer"},
    {"quantize"},
    {"bench"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
TORCH_FREE = {"errors", "paths", "config", "locks", "storage", "recipe", "footprint", "plan"}
SOURCES = sorted(p for top in ("moai_core", "moai_cli") for p in (ROOT / top).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part_of(module: str) -> str | None:
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "moai_core" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    relative = path.relative_to(ROOT)
    used = imports(path)
    if relative.parts[0] == "moai_core":
        assert not any(name.split(".")[0] in {"moai_cli", "typer", "rich"} for name in used), (
            "only moai_cli knows Typer and Rich"
        )
        if relative.name == "__init__.py" and len(relative.parts) == 2:
            return  # the lazy public API
        mine = Path(relative.parts[1]).stem
        assert mine in LEVEL, f"give {mine} a place in LAYERS"
        for name in used:
            other = part_of(name)
            if other in LEVEL and other != mine:
                assert LEVEL[other] < LEVEL[mine], f"{relative} imports {name}, which is not below it"
        if mine in TORCH_FREE:
            assert not any(name.split(".")[0] in {"torch", "transformers"} for name in used)
    else:
        heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "numba", "accelerate"}
        top = imports(path, top_level_only=True)
        assert not any(name.split(".")[0] in heavy for name in top), "heavy imports belong inside the command"
        light = {"errors", "paths", "config", "recipe", "plan", None, "__version__"}
        assert all(part_of(name) in light for name in top if name.startswith("moai_core")), (
            "the core is imported inside the command"
        )


def test_tokenizers_is_data_only():
    assert not list((ROOT / "tokenizers").rglob("*.py")), "a Python file there would shadow the tokenizers library"


def test_every_command_is_listed_in_help():
    names = {p.stem for p in (ROOT / "moai_cli" / "commands").glob("*.py")} - {"__init__"}
    from moai_cli.main import app

    registered = {c.name for c in app.registered_commands} | {g.name for g in app.registered_groups}
    assert registered == names


def test_help_is_light():
    """`moai --help` loads no heavy library (its time is measured in docs/LOG.md, not here)."""
    code = (
        "import sys; sys.argv = ['moai', '--help']\n"
        "from moai_cli.main import run\n"
        "assert run() == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'numba', 'matplotlib', 'accelerate', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pure-Mamba language models" in done.stdout


def test_code_speaks_of_the_project_alone_and_is_safe():
    banned = ["trust_remote_code=True", "torch.load(", "yaml.load(", "import pickle", "shell=True"]
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if path.name == "torch_bin.py":  # other people's .bin files: torch's restricted unpickler, and nothing else
            loads = re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text)
            assert len(loads) == text.count("torch.load(") == 1 and "weights_only=True" in loads[0]
            text = text.replace("torch.load(", "")
        for word in banned:
            assert word not in text, f"{path.relative_to(ROOT)} contains {word}"


def test_metadata_matches_the_house():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"moai": "moai_cli.__main__:main"} and project["requires-python"] == ">=3.10"
    assert {"cuda", "quant", "gptq", "eval", "gguf", "track", "test", "dev"} <= set(project["optional-dependencies"])
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert top - {"build", "dist", "runs"} <= {
        "moai_cli",
        "moai_core",
        "recipes",
        "tokenizers",
        "tests",
        "docs",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
