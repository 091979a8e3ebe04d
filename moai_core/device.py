"""The devices of this machine, and whether a recipe can run on them.

A recipe made for a GPU class asks for its memory and for bf16 in hardware, not for its name: a larger or newer card
will do. What this file leaves out is choosing between kernels, which is the scan's business, and distributing work,
which is the training loop's.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from typing import Any

import torch

from moai_core import plan
from moai_core.errors import UsageError
from moai_core.recipe import Recipe

# A card of the class may report a little less memory than the table says: ECC, driver and board differ.
_SLACK = 0.96


@dataclass(frozen=True)
class Device:
    """One device: torch's name of it (`cpu`, `cuda:0`), its product name, bytes in total and free, whether it
    multiplies bf16, and its capability."""

    name: str
    label: str
    memory: int
    free: int
    bf16: bool
    capability: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(self.__dict__)


def cpu() -> Device:
    """This machine's processor and memory."""
    total, free = memory()
    return Device("cpu", f"{_processor()}, {cores()} cores", total, free, _cpu_bf16())


def gpus() -> list[Device]:
    """The CUDA devices that torch sees; empty without one."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        props = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capable = props.major >= 8
        found.append(Device(f"cuda:{index}", props.name, total, free, capable, f"{props.major}.{props.minor}"))
    return found


def place(name: str) -> torch.device:
    """The device that a --device flag names; auto is the first GPU, else the CPU. A GPU becomes torch's current one.
    Raises UsageError for a device that is unknown or not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N (got {name!r})")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name[5:]) if ":" in name else torch.cuda.current_device() if count else 0
    if index >= count:
        held = f"{count} CUDA GPU{'s' * (count > 1)}, numbered from 0" if count else "no CUDA GPU"
        raise UsageError(f"--device {name}: this machine has {held}", hint="--device auto takes what there is")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def require(recipe: Recipe) -> None:
    """Raises UsageError, in one line, when this machine lacks the devices that the recipe is made for."""
    kind, count = recipe.hardware.gpu, recipe.hardware.count
    if kind == "cpu" or (kind is None and not gpus()):
        return _require_memory(recipe)
    if kind is None:
        return
    needed, have = plan.GPUS[kind], gpus()
    memory_needed = int(recipe.hardware.memory_gb * 1e9) if recipe.hardware.memory_gb else needed.memory
    what = f"this recipe needs {f'{count} x ' if count > 1 else 'an '}{needed.label}"
    hint = "--dry-run shows the plan; cpu-tiny trains here"
    if not have:
        raise UsageError(f"{what}; this machine has no CUDA GPU", hint=hint)
    fit = [one for one in have if one.memory >= _SLACK * memory_needed and one.bf16]
    if len(fit) < count:
        names = ", ".join(f"{one.label} ({one.memory / 1e9:.0f} GB)" for one in have)
        raise UsageError(
            f"{what}; this machine has {names}", hint="--dry-run shows the plan; hardware.gpu=null tries anyway"
        )


def _require_memory(recipe: Recipe) -> None:
    """On a processor there is no error to catch: a process that asks for too much is killed by the system."""
    peak, have = plan.plan(recipe).peak, memory()[0]
    if have and peak > have:
        raise UsageError(
            f"this recipe needs {peak / 2**30:.1f} GiB by its plan; this machine has {have / 2**30:.1f} GiB",
            hint="lower train.batch_size or data.max_length, or set train.checkpointing=selective or full; "
            "--dry-run shows the plan",
        )


def nearest_class() -> str:
    """The GPU class of `plan.GPUS` that this machine's first GPU covers best, else `cpu`."""
    have = gpus()
    if not have or not have[0].bf16:
        return "cpu"
    for kind, gpu in plan.GPUS.items():
        if kind in "".join(have[0].label.lower().split()) and have[0].memory >= _SLACK * gpu.memory:
            return kind
    covered = [(gpu.memory, kind) for kind, gpu in plan.GPUS.items() if have[0].memory >= _SLACK * gpu.memory]
    return max(covered)[1] if covered else "cpu"


def memory() -> tuple[int, int]:
    """(total, available) bytes of this machine's memory, within the limit of a container; zeros where the system
    doesn't say."""
    total = free = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and 0 < limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return total, free


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware (AVX-512 BF16 or AMX), as Linux names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
