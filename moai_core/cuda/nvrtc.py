"""CUDA C++ source to machine code (cubin) with NVRTC, kept on disk.

NVRTC is a shared library with a C interface of a dozen functions, so `ctypes` is all it takes. It is looked for where
torch's wheels put it, then where the system keeps libraries. A cubin's name on disk is the hash of all that it was made
from; a file that was cut short or damaged is noticed by its checksum, and a disk that is full or read-only costs time,
never the run.

Source: NVRTC 13.0 documentation, https://docs.nvidia.com/cuda/nvrtc.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moai_core.paths import cache_dir

_log = logging.getLogger("moai.cuda")
_LIBRARY = "nvrtc64_*_0.dll" if sys.platform == "win32" else "libnvrtc.so.*"
_BUILTINS = "nvrtc-builtins64_*.dll" if sys.platform == "win32" else "libnvrtc-builtins.so.*"
# nvidia-cuda-nvrtc (CUDA 13) and nvidia-cuda-nvrtc-cu12, below the namespace package `nvidia`.
_IN_WHEELS = ("cu*/lib", "cuda_nvrtc/lib", "cu*/bin/x86_64", "cuda_nvrtc/bin")
_CHECKSUM = hashlib.sha256().digest_size


class NotFound(Exception):
    """No NVRTC on this machine; the message is a sentence with the command that installs it."""


class TooOld(Exception):
    """The NVRTC found doesn't know the GPU's architecture; the message is a sentence with the remedy."""


class CompileError(RuntimeError):
    """A kernel doesn't compile: a bug of moai. The message has the compiler's log."""


class Compiler:
    """NVRTC, loaded from `path`: `version` (major, minor) and `architectures`, e.g. [80, 86, 90]."""

    def __init__(self, path: str) -> None:
        for builtins in Path(path).parent.glob(_BUILTINS) if os.path.isabs(path) else ():
            # NVRTC opens it by name only, and no search path leads into a wheel.
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(builtins))
        self.path, self._library = path, ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        self.version, self.architectures = (major.value, minor.value), sorted(found)

    def architecture(self, capability: tuple[int, int]) -> int:
        """The newest architecture this compiler knows whose code runs on a GPU of that compute capability: the same
        major number, a minor one that is no greater. Raises TooOld.
        """
        major, minor = capability
        fit = [arch for arch in self.architectures if arch // 10 == major and arch % 10 <= minor]
        if not fit:
            mine = f"NVRTC {self.version[0]}.{self.version[1]}"
            raise TooOld(f"{mine} is too old for compute capability {major}.{minor}: install a torch of a newer CUDA")
        return fit[-1]

    def compile(self, name: str, text: str, includes: dict[str, str], flags: list[str]) -> tuple[bytes, str]:
        """(cubin, log) of `text`, whose headers are the texts of `includes`. Raises CompileError."""
        program = ctypes.c_void_p()
        texts, names, chosen = _strings(includes.values()), _strings(includes), _strings(flags)
        args = (text.encode(), name.encode(), len(includes), texts, names)
        self._call("nvrtcCreateProgram", ctypes.byref(program), *args)
        try:
            status = self._library.nvrtcCompileProgram(program, len(flags), chosen)
            log = self._read(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{name} doesn't compile with {' '.join(flags)}:\n{log or self._name(status)}")
            return self._read(program, "nvrtcGetCUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(what, program, buffer)
        return buffer.raw

    def _call(self, function: str, *args: object) -> None:
        status = getattr(self._library, function)(*args)
        if status:
            raise RuntimeError(f"{function} failed: {self._name(status)}")

    def _name(self, status: int) -> str:
        return self._library.nvrtcGetErrorString(status).decode()


def _strings(texts: Iterable[str]) -> Any:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


@lru_cache(maxsize=1)
def load() -> Compiler:
    """The first NVRTC that loads. Raises NotFound."""
    for path in _candidates():
        with contextlib.suppress(OSError, AttributeError):
            return Compiler(path)
    raise NotFound(f"its compiler NVRTC, a part of torch's CUDA wheels, is not installed: {install_hint()}")


def install_hint() -> str:
    """The command that installs the NVRTC for this torch."""
    version = torch.version.cuda or "13.0"
    suffix = "-cu12" if version.startswith("12.") else ""
    return f"pip install 'nvidia-cuda-nvrtc{suffix}=={version}.*'"


def _candidates() -> Iterator[str]:
    """Paths or names of the library, the likeliest first: that of torch's CUDA version, those in wheels."""
    wheels = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (wheels.submodule_search_locations or ()) if root] if wheels else []
    found = [path for root in roots for folder in _IN_WHEELS for path in root.glob(f"{folder}/{_LIBRARY}")]
    found += (Path(torch.__file__).parent / "lib").glob(_LIBRARY)  # torch's own copy: on Windows, in older wheels
    for variable, folder in (("CUDA_HOME", "lib64"), ("CUDA_PATH", "bin"), ("CONDA_PREFIX", "lib")):
        if root := os.environ.get(variable):
            found += Path(root, folder).glob(_LIBRARY)
    wanted = int((torch.version.cuda or "13").split(".")[0])
    majors = sorted({12, 13, wanted}, key=lambda major: (major != wanted, -major))
    for major in majors:
        yield from (str(path) for path in found if _major(path) == major)
    if sys.platform != "win32":
        yield from (f"libnvrtc.so.{major}" for major in majors)
        yield from (str(path) for path in Path("/usr/local/cuda/lib64").glob(_LIBRARY))
    if name := ctypes.util.find_library("nvrtc"):
        yield name


def _major(path: Path) -> int | None:
    """13 for libnvrtc.so.13, libnvrtc.so.13.0.88 and nvrtc64_130_0.dll."""
    match = re.fullmatch(r"libnvrtc\.so\.(\d+)(\.\d+)*|nvrtc64_(\d+)\d_0\.dll", path.name)
    return int(match[1] or match[3]) if match else None


def headers() -> dict[str, str]:
    """What a kernel may include: the `.cuh` files of this folder, by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.cuh"))}


def source(path: Path, defines: Mapping[str, str]) -> str:
    """The text of a CUDA file behind its macros. They come after `common.cuh` and not as options -D, for a template
    there or in NVRTC's own header may have a parameter named `T`.
    """
    lines = ['#include "common.cuh"', *(f"#define {key} {value}" for key, value in defines.items())]
    return "\n".join([*lines, f'#line 1 "{path.name}"', path.read_text(encoding="utf-8")])


def options(arch: int) -> list[str]:
    """The compiler's options. Hopper has instructions (wgmma) that only code for exactly it may use. No
    --use_fast_math: a kernel that can afford an approximation names it.
    """
    exact = "a" if arch == 90 else ""
    return ["--std=c++17", f"--gpu-architecture=sm_{arch}{exact}"]


def cubin(path: Path, defines: Mapping[str, str], arch: int) -> bytes:
    """Machine code of the CUDA file at `path` for sm_`arch`, from the disk if it was compiled before. Raises
    CompileError.
    """
    compiler = load()
    text, included, flags = source(path, defines), headers(), options(arch)
    key = hashlib.sha256(repr((text, included, flags, compiler.version)).encode()).hexdigest()
    kept = cache_dir() / "cubin" / f"{path.stem}-{key}"
    code = _read(kept)
    if code is None:
        _log.info("compiling GPU kernels for sm_%d (once): %s", arch, path.stem)
        code, _ = compiler.compile(path.name, text, included, flags)
        _write(kept, code)
    return code


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, code = data[:_CHECKSUM], data[_CHECKSUM:]
    return code if code and hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> None:
    """Whole or not at all, whoever else writes the same file; a disk that refuses is no reason to stop."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError as exc:
        _log.debug("compiled kernels can't be kept in %s: %s", path.parent, exc)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
