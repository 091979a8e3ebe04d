"""What is kept of a compilation, and what a damaged, full or shared disk does to it: a compiler that counts stands for
NVRTC, a small file for a kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moai_core import cuda
from moai_core.cuda import nvrtc

SOURCE = 'extern "C" __global__ void fill(T* x) { x[0] = from_float<T>(1.0f); }\n'


class Counting:
    """Compiles by remembering what it was given."""

    version = (13, 0)

    def __init__(self):
        self.given = []

    def compile(self, name, text, includes, flags):
        self.given.append((name, text, includes, flags))
        return b"code of " + repr((text, flags)).encode(), ""


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    one = Counting()
    monkeypatch.setattr(nvrtc, "load", lambda: one)
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path / "cache"))
    return one


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "fill.cu"
    path.write_text(SOURCE)
    return path


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "cubin").iterdir())


def test_compiles_once(compiler, source, tmp_path, caplog):
    caplog.set_level(logging.INFO, "moai.cuda")
    first = nvrtc.cubin(source, {"T": "float"}, 90)
    assert nvrtc.cubin(source, {"T": "float"}, 90) == first and len(compiler.given) == 1
    name, text, includes, flags = compiler.given[0]
    assert (name, "common.cuh" in includes) == ("fill.cu", True) and SOURCE in text
    assert "--gpu-architecture=sm_90a" in flags and not any("fast" in flag for flag in flags)
    assert caplog.messages == ["compiling GPU kernels for sm_90 (once): fill"]
    assert len(kept(tmp_path)) == 1 and kept(tmp_path)[0].name.startswith("fill-")


def test_whatever_changes_the_code_changes_its_name(compiler, source, monkeypatch, tmp_path):
    codes = [nvrtc.cubin(source, {"T": "float"}, 90), nvrtc.cubin(source, {"T": "__half"}, 90)]
    codes.append(nvrtc.cubin(source, {"T": "float"}, 80))
    compiler.version = (13, 1)
    codes.append(nvrtc.cubin(source, {"T": "float"}, 90))
    monkeypatch.setattr(nvrtc, "headers", lambda: {"common.cuh": "// another\n"})
    codes.append(nvrtc.cubin(source, {"T": "float"}, 90))
    source.write_text(SOURCE + "\n")
    codes.append(nvrtc.cubin(source, {"T": "float"}, 90))
    assert len(compiler.given) == len(kept(tmp_path)) == len(codes) == 6


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "checksum only", "folder"])
def test_damaged_code_is_compiled_again(compiler, source, tmp_path, damage):
    code = nvrtc.cubin(source, {"T": "float"}, 90)
    [path] = kept(tmp_path)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        wrong = {
            "empty": b"",
            "cut": data[:-1],
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
            "checksum only": data[:32],
        }
        path.write_bytes(wrong[damage])
    assert nvrtc.cubin(source, {"T": "float"}, 90) == code and len(compiler.given) == 2
    if damage != "folder":
        assert path.read_bytes() == data and kept(tmp_path) == [path]


def test_a_full_disk_costs_only_time(compiler, source, monkeypatch, tmp_path):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code = nvrtc.cubin(source, {"T": "float"}, 90)
    assert kept(tmp_path) == [], "nothing half written stays"
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    assert nvrtc.cubin(source, {"T": "float"}, 90) == code and len(compiler.given) == 2


@pytest.mark.parametrize("obstacle", ["file in the way", "read-only"])
def test_a_folder_that_cant_be_written_costs_only_time(compiler, source, monkeypatch, tmp_path, obstacle):
    if obstacle == "read-only":
        if os.geteuid() == 0:
            pytest.skip("the superuser may write everywhere")
        (tmp_path / "cache").mkdir(mode=0o500)
    else:
        (tmp_path / "cache").write_text("a file\n")
    assert nvrtc.cubin(source, {"T": "float"}, 90) == nvrtc.cubin(source, {"T": "float"}, 90)
    assert len(compiler.given) == 2


def test_processes_compile_at_once(source, tmp_path):
    """Two start together on an empty cache with the real compiler; one file is left, whole."""
    try:
        nvrtc.load()
    except nvrtc.NotFound as exc:
        pytest.skip(str(exc))
    code = (
        "import sys; from pathlib import Path; from moai_core.cuda import nvrtc\n"
        "sys.stdout.buffer.write(nvrtc.cubin(Path(sys.argv[1]), {'T': 'float'}, 90))\n"
    )
    environment = {**os.environ, "MOAI_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    outputs = {one.communicate(timeout=120)[0] for one in running}
    assert len(outputs) == 1 and outputs.pop()[:4] == b"\x7fELF" and len(kept(tmp_path)) == 1


def test_an_error_shows_the_compilers_words(tmp_path, monkeypatch):
    try:
        nvrtc.load()
    except nvrtc.NotFound as exc:
        pytest.skip(str(exc))
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "wrong.cu"
    path.write_text("// fine\n__device__ int f() { return missing; }\n")
    with pytest.raises(nvrtc.CompileError, match=r'wrong.cu\(2\): error: identifier "missing" is undefined'):
        nvrtc.cubin(path, {}, 90)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("value", ["bf16", "fp16", "float", 3, "4"])
def test_macros(value, tmp_path, monkeypatch):
    """Types may be named like template parameters; numbers are numbers."""
    path = tmp_path / "macro.cu"
    path.write_text(
        'extern "C" __global__ void f(M* x) {}\n' if value in cuda._TYPES else 'static_assert(M == N, "");\n'
    )
    try:
        compiler = nvrtc.load()
    except nvrtc.NotFound as exc:
        pytest.skip(str(exc))
    given = cuda.defines({"T": value} if value in cuda._TYPES else {"M": value, "N": int(value)})
    text = nvrtc.source(path, given).replace("M*", "T*")
    code, _ = compiler.compile(path.name, text, nvrtc.headers(), nvrtc.options(80))
    assert code[:4] == b"\x7fELF"


def test_a_gpu_gets_the_newest_code_it_can_run():
    compiler = object.__new__(nvrtc.Compiler)
    compiler.version, compiler.architectures = (12, 8), [75, 80, 86, 89, 90, 100, 120]
    wanted = {(8, 0): 80, (8, 6): 86, (8, 7): 86, (8, 9): 89, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 1): 120}
    assert {capability: compiler.architecture(capability) for capability in wanted} == wanted
    with pytest.raises(nvrtc.TooOld, match=r"NVRTC 12.8 is too old for compute capability 11.0"):
        compiler.architecture((11, 0))


@pytest.mark.parametrize(
    "version, name, major",
    [
        ("13.0", "nvidia/cu13/lib/libnvrtc.so.13", 13),
        ("12.8", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", 12),
        ("12.8", "nvidia/cu13/lib/libnvrtc.so.13", 13),
        (None, "nvidia/cu12/lib/libnvrtc.so.12", 12),
    ],
)
def test_it_is_found_in_the_wheels(monkeypatch, tmp_path, version, name, major):
    """Before the system's library, and the one of torch's CUDA version before others."""
    for other in ("nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", name):
        if other == name or version == f"{major}.0" or (version, major) == ("12.8", 12):
            (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / other).touch()
    (tmp_path / name).parent.joinpath(f"libnvrtc.alt.so.{major}").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(nvrtc.torch.version, "cuda", version)
    first = next(nvrtc._candidates())
    assert first == str(tmp_path / name)
