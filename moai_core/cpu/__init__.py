"""Machine code on processors: how kernels written as numba functions are compiled, cached and run in torch's threads.

    run(name of a module, name of its kernel, items, work, *slots)

A kernel (`instructions.kernel`) is called with the address of an array of 64-bit integers, in any number of threads at
once: slot 0 counts the work items taken, slot 1 says how many there are, the rest are addresses, sizes and strides.
What an item computes must not depend on the thread that takes it, so that results are the same bits for any number of
threads. Nothing here knows what is computed: scan/cpu.py and quant/cpu.py do.

Threads: a kernel runs in torch's own OpenMP team, called through `GOMP_parallel`. A pool of our own would fight with
that team, whose threads spin for milliseconds after each matrix product (measured: with a pool of our own two threads
were no faster than one). Where the symbol doesn't exist (macOS, Windows) there is a pool of Python threads. In a
forked child torch's team is gone: there one thread works.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from moai_core.paths import cache_dir

# Elementary operations; below it a second thread costs more than it gives.
SMALL = 1 << 16
# Who compiles kernels beside this process (warm.Helper), if anybody does.
helpers: list[Any] = []
_forked = False
_log = logging.getLogger("moai.cpu")


def run(module: str, name: str, items: int, work: int, *slots: int) -> None:
    """Calls a kernel with its slots in as many threads as torch uses, in one if there is little work."""
    array = (ctypes.c_int64 * (2 + len(slots)))(0, items, *slots)
    start(entry(module, name), ctypes.addressof(array), 1 if work < SMALL else min(threads(), items))


def threads() -> int:
    """As many as torch uses."""
    import torch  # not above: the process that compiles kernels (warm.py) has no use for it

    return 1 if _forked else torch.get_num_threads()


def start(kernel: Any, address: int, threads: int) -> None:
    """Calls a C function with an address in so many threads, and waits for them."""
    if threads <= 1:
        kernel(address)
    elif found := team():
        found(kernel, address, threads, 0)
    else:
        others = [_pool(threads - 1).submit(kernel, address) for _ in range(threads - 1)]
        kernel(address)
        for other in others:
            other.result()


@cache
def entry(module: str, name: str) -> Any:
    """The C function of a kernel: compiled, or read from disk, at first use."""
    for helper in helpers:
        helper.wait(module, name)
    compiled = getattr(load(module), name)()
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


@cache
def load(module: str) -> ModuleType:
    """Imports a module of kernels, numba's settings made first."""
    settings()
    return import_module(module)


@cache
def problem() -> str | None:
    """Why there is no numba here; None where there is."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba can't be imported ({error})"
    return None


@cache
def settings() -> None:
    """Where numba caches, and how wide its vectors are; before it compiles anything."""
    from numba.core import codegen, config

    values: Any = config
    folder = cache_folder()
    values.CACHE_DIR = str(folder) if _writable(folder) else ""
    if not values.CACHE_DIR:
        _log.info("%s can't be written: kernels are compiled at each start; MOAI_CACHE=FOLDER keeps them", folder)
    # LLVM halves the vectors of processors with AVX-512, since the first of them slowed down at full width. Those that
    # know vbmi2 (Ice Lake, Zen 4 and later) don't: measured 1.3 times as fast.
    features = codegen.get_host_cpu_features()
    if values.CPU_FEATURES is None and "+avx512vbmi2" in features:
        values.CPU_FEATURES = f"{features},-prefer-256-bit"


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@cache
def cache_folder() -> Path:
    """Where compiled kernels lie. Its name changes with the instructions that they are made of: numba looks at a
    kernel's own file only."""
    own = sorted(Path(__file__).parent.glob("*.py"))
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in own)).hexdigest()[:16]
    return Path(os.environ.get("NUMBA_CACHE_DIR") or cache_dir() / "kernels") / sources


@cache
def openmp() -> Any:
    """The OpenMP library that torch itself uses, or None where its functions are out of reach."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel, library.omp_get_num_threads  # noqa: B018 (looked up)
    except (OSError, AttributeError):
        return None
    return library


@cache
def team() -> Any:
    """`GOMP_parallel(function, data, threads, flags)`, or None."""
    if (library := openmp()) is None:
        return None
    parallel = library.GOMP_parallel
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="moai")


def _alone() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)
