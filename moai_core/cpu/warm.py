"""Kernels compiled beside a program while it starts, so that the very first answer waits for no compiler.

A command that will need them calls `begin` first of all. Where the cache lacks them it starts processes that run
`main`: they compile into the cache and name each kernel when it is there; `cpu.entry` waits for the name instead of
compiling a second time. Those processes import neither torch nor transformers, which take the
program itself longer than the first kernels take here. A quantized model needs two kinds, in two processes: once the
program waits, its core is free for one of them. With one core there is nothing to gain.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

from moai_core import cpu

_ROOT = Path(__file__).resolve().parent.parent
_SCAN, _CONV = "moai_core.scan.cpu_kernels", "moai_core.scan.cpu_conv_kernels"
_STEP, _QUANT = "moai_core.model.step_kernels", "moai_core.quant.cpu_kernels"
# By kind, in the order in which they are needed: a prompt is read, then a token made. (tiles are a prompt's, on
# processors with a matrix unit.)
KERNELS = {
    "plain": [
        (_CONV, "conv_forward"),
        (_SCAN, "scan_forward"),
        *((_STEP, name) for name in ("add_norm", "dense", "small_norms", "negative_exp")),
        (_SCAN, "scan_step"),
        (_STEP, "swiglu"),
        ("moai_core.cpu.program_kernel", "run_all"),
    ],
    "quantized": [(_QUANT, "quantize"), (_QUANT, "rows"), (_QUANT, "tiles")],
}


# The folder that a command is called in is no place to import from: a file there may be called numba.py.
_PROGRAM = "import sys; sys.path[0] = sys.argv[1]; from moai_core.cpu import warm; warm.main(sys.argv[2])"


class Helper:
    """A process that compiles, and what it hasn't named yet."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(_ROOT.parent), kind]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=null, stdout=subprocess.PIPE, stderr=null, text=True)
        self.left = set(KERNELS[kind])
        atexit.register(self.process.kill)

    def wait(self, module: str, kernel: str) -> None:
        """Until the kernel is in the cache, or the process has ended without it."""
        while (module, kernel) in self.left:
            assert self.process.stdout is not None
            words = self.process.stdout.readline().split()
            if not words:
                self.left.clear()
                return
            self.left.discard((words[0], words[1]))


def begin(quantized: bool = False) -> None:
    """Starts other processes where they help; costs a few milliseconds where the cache has everything. To be called
    before torch is imported, whose OpenMP reads the environment then."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or cpu.helpers:
        return
    try:
        for kind in KERNELS if quantized else ["plain"]:
            if not _mark(kind).exists():
                cpu.helpers.append(Helper(kind))
                # Torch's threads would spin between their tasks, on the cores of those that compile: half a second.
                os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    except (OSError, metadata.PackageNotFoundError):
        return  # then each kernel is compiled where it is needed


def _mark(kind: str) -> Path:
    """A file that is there when the cache has all kernels of a kind, of these sources and this numba."""
    sources = [path for folder in ("cpu", "scan", "model", "quant") for path in sorted((_ROOT / folder).glob("*.py"))]
    text = b"".join(path.read_bytes() for path in sources if "kernel" in path.name or path.parent.name == "cpu")
    digest = hashlib.sha256(text + metadata.version("numba").encode()).hexdigest()[:16]
    return cpu.cache_folder() / f"all-{kind}-{digest}"


def main(kind: str) -> None:
    """Compiles, and prints each kernel's module and name when it is in the cache."""
    for package in ("scan", "model", "quant"):
        # Their own __init__ imports torch; the kernels need none of it.
        bare: Any = types.ModuleType(f"moai_core.{package}")
        bare.__path__ = [str(_ROOT / package)]
        sys.modules[bare.__name__] = bare
    gc.disable()  # this process ends before it would pay: a fifteenth of its time
    for module, kernel in KERNELS[kind]:
        cpu.entry(module, kernel)
        print(module, kernel, flush=True)
    mark = _mark(kind)
    if mark.parent.is_dir():
        mark.touch()
