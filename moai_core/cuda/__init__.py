"""GPU kernels: CUDA C++ files in this folder, compiled at first use on the user's machine, launched on torch's stream.

Why not at installation: NVRTC, the compiler as a library, comes with torch's own CUDA wheels, so that nobody needs nvcc
or a toolkit, and every GPU gets code for its exact architecture. `nvrtc` compiles and keeps the result on disk,
`driver` loads and launches. A kernel is `extern "C" __global__`; each of its parameters is a pointer, a `long long` or
a `float`. Leaves out PTX (a driver would compile it again at every start) and AMD's and Intel's GPUs.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from moai_core.cuda import driver, nvrtc
from moai_core.cuda.driver import Kernel
from moai_core.tracing import constant

__all__ = ["FOLDER", "TYPES", "Kernel", "kernel", "why_not"]

FOLDER = Path(__file__).resolve().parent

# The numbers that kernels know, by the short names that macros take.
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float"}

# bf16 tensor-core products, cp.async: what the kernels are written for begins with Ampere.
MIN_CAPABILITY = (8, 0)

_TYPES = {"bf16": "__nv_bfloat16", "fp16": "__half", "float": "float"}
_modules: dict[tuple[str, tuple[tuple[str, str], ...], int], driver.Module] = {}
_lock = threading.Lock()


def why_not(device: torch.device | None = None) -> str | None:
    """Why moai's kernels can't run on `device` (None: torch's current GPU), in one sentence, or None if they can."""
    if device is not None and device.type != "cuda":
        return f"it runs on CUDA GPUs only, not on {device.type}"
    index = device.index if device is not None else None
    if index is None:
        return _no_gpu() or _refusal(torch.cuda.current_device())
    return _refusal(index)


def _no_gpu() -> str | None:
    if torch.version.hip:
        return "it needs an NVIDIA GPU; this torch is built for ROCm"
    return None if torch.cuda.is_available() else "torch finds no CUDA GPU on this machine"


@lru_cache(maxsize=64)
@constant  # torch.compile asks once and doesn't look inside
def _refusal(index: int) -> str | None:
    if why := _no_gpu():
        return why
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(index), capability
        return f"it needs compute capability 8.0 or newer, and {name} has {major}.{minor}"
    try:
        compiler = nvrtc.load()
    except nvrtc.NotFound as exc:
        return str(exc)
    try:
        compiler.architecture(capability)
    except nvrtc.TooOld as exc:
        return str(exc)
    known = driver.version()
    if compiler.version[0] > known[0]:
        mine = f"NVRTC {compiler.version[0]}.{compiler.version[1]}"
        return f"{mine} is newer than the driver, which knows CUDA {known[0]}.{known[1]}: {nvrtc.install_hint()}"
    return None


def defines(macros: Mapping[str, str | int]) -> dict[str, str]:
    """What each macro stands for: the short names of number types become those of CUDA."""
    return {key: _TYPES.get(str(value), str(value)) for key, value in sorted(macros.items())}


@lru_cache(maxsize=1024)
def kernel(file: str, name: str, device: torch.device, **macros: str | int) -> Kernel:
    """The kernel `name` of `file` (in this folder, or an absolute path), ready to be launched on `device`.

    macros: what the source leaves open, `T="bf16"` (also "fp16", "float") or `K=4`; each combination is a module of its
    own. Compiles at the first use ever, afterwards reads the disk; repeated calls cost a look-up. `device` has its
    index, as a tensor's device does. Ask `why_not` before; RuntimeError when the file doesn't compile or has no such
    kernel.
    """
    assert device.type == "cuda" and device.index is not None, f"{name}: no CUDA device with its index: {device}"
    chosen = defines(macros)
    key = (file, tuple(chosen.items()), device.index)
    with _lock:  # the backward pass runs in a thread of its own
        if key not in _modules:
            arch = nvrtc.load().architecture(torch.cuda.get_device_capability(device))
            _modules[key] = driver.Module(nvrtc.cubin(FOLDER / file, chosen, arch), device.index)
        return _modules[key].kernel(name)
