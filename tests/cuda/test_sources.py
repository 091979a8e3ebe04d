"""Every CUDA file compiles for every architecture that moai names, without a GPU and without spilling registers, but for
a few bytes where a kernel fills all that a thread can have.

A file's first line (or lines, each with `// moai: `) lists its kernels and the sets of macros that stand for all in
use: `// moai: kernels NAME, NAME; macros T=bf16 K=4 | T=float K=4`. The first set has all kernels; others may leave out
what their macros rule out. `; spills 208` allows as many bytes a thread where a file has its reasons; `; none on sm_90`
allows a line's sets not a byte on that architecture, whose speed the project promises.
"""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest

from moai_core import cuda
from moai_core.cuda import nvrtc

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
BOUNDS = r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)"
SOURCES = sorted(cuda.FOLDER.glob("*.cu"))


def lines(path: Path) -> list[list[tuple[str, str]]]:
    """What each of a file's first lines says: [("kernels", "NAME, NAME"), ("macros", "T=bf16 K=4 | T=float K=4")]."""
    found = takewhile(lambda line: line.startswith("// moai: "), path.read_text(encoding="utf-8").split("\n"))
    split = [[part.strip().partition(" ") for part in line.removeprefix("// moai: ").split(";")] for line in found]
    return [[(key, rest) for key, _, rest in line] for line in split]


def sets_of(line: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(one.split()) for key, rest in line if key == "macros" for one in rest.split("|")]


def header(path: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """Kernels of a file and its sets of macros; no kernels where its first lines say none."""
    parts = [part for line in lines(path) for part in line]
    kernels = [name.strip() for key, rest in parts if key == "kernels" for name in rest.split(",")]
    return kernels, sets_of(parts) or [()]


def allowed_spills(path: Path, macros: tuple[str, ...], arch: int) -> int:
    """Bytes a thread; 64 unless the file says more, or none: pointers that wait outside of the loops, where 255
    registers are all in use.
    """
    found = lines(path)
    if arch == 90 and any(("none", "on sm_90") in line and macros in sets_of(line) for line in found):
        return 0
    return max([64, *(int(rest) for line in found for key, rest in line if key == "spills")])


CASES = [(path, i, arch) for path in SOURCES for i in range(len(header(path)[1])) for arch in ARCHITECTURES]


def cases(quick: bool):
    """One architecture of each set of macros and each architecture once a file is quick; the rest is not."""
    for path, i, arch in CASES:
        if (i == 0 or arch == 90) == quick:
            yield pytest.param(path, header(path)[1][i], arch, id=f"{path.stem}-{i}-sm_{arch}")


def compile_and_check(path: Path, macros: tuple[str, ...], arch: int) -> None:
    try:
        compiler = nvrtc.load()
    except nvrtc.NotFound as exc:
        pytest.skip(str(exc))
    if arch not in compiler.architectures:
        pytest.skip(f"NVRTC {compiler.version} doesn't know sm_{arch}")
    text = nvrtc.source(path, cuda.defines(dict(one.split("=") for one in macros)))
    flags = [*nvrtc.options(arch), "--ptxas-options=-v"]
    code, log = compiler.compile(path.name, text, nvrtc.headers(), flags)
    assert code[:4] == b"\x7fELF"
    found = dict.fromkeys(re.findall(r"Compiling entry function '(\w+)'", log))
    kernels, sets = header(path)
    assert found and set(found) <= set(kernels) and (macros != sets[0] or set(found) == set(kernels)), log
    spills = [int(n) for one in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) for n in one]
    assert len(spills) >= 2 * len(found) and max(spills) <= allowed_spills(path, macros, arch), log


@pytest.mark.parametrize("path, macros, arch", cases(quick=True))
def test_compiles_without_spills(path, macros, arch):
    compile_and_check(path, macros, arch)


@pytest.mark.slow
@pytest.mark.parametrize("path, macros, arch", cases(quick=False))
def test_compiles_without_spills_everywhere(path, macros, arch):
    compile_and_check(path, macros, arch)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_names_its_kernels(path):
    kernels, _ = header(path)
    text = path.read_text(encoding="utf-8")
    includes = re.findall(r"^#include (\S+)", text, re.MULTILINE)
    assert all((cuda.FOLDER / name.strip('"')).suffix == ".cuh" for name in includes), "only headers of this folder"
    found = re.findall(rf'extern "C" __global__ void\s+(?:CLUSTER\s+)?(?:{BOUNDS}\s*)?(\w+)\(', text)
    assert sorted(found) == sorted(kernels) and len(found) == text.count("__global__"), "see this file's top"
