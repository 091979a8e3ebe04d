"""What `moai_core.bench.train` times of one model: training steps, phase by phase, and the reading of a prompt, with
the memory that they take.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moai_core import config as sizes
from moai_core.bench import report, timing
from moai_core.bench.models import Model
from moai_core.bench.work import recorded
from moai_core.recipe import Recipe
from moai_core.training import optim
from moai_core.training.in_backward import InBackward

PHASES = ("forward", "backward", "optimizer")
# Unmeasured steps: they compile, and make the optimizer's moments.
WARMUP = 3
# Matrix product that the MFU is measured against: N x N x N.
_PRODUCT = {"cuda": 8192, "cpu": 1024}


def make_optimizer(model: Model, recipe: Recipe, name: str) -> torch.optim.Optimizer:
    """`torch`: torch's fused AdamW with moments in the weights' own type; else the recipe's optimizer."""
    o = recipe.optim
    if name == "torch" or model.name != "moai":
        groups = optim.parameter_groups(model.module, o.weight_decay)
        return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
    return optim.make_optimizer(model.module, o, lr=o.lr, seed=0)


class Marks:
    """Times between marks: by CUDA's events on a GPU, else by the clock on the wall."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self._marks = device.type == "cuda", list[Any]()

    def __call__(self) -> None:
        """Sets a mark."""
        if not self.cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next; waits for the device."""
        pairs = list(itertools.pairwise(self._marks))
        if not self.cuda:
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def train(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor | None]],
    *,
    steps: int,
    clip: float | None,
    device: torch.device,
    on_step: Callable[[int], None],
    early: InBackward | None = None,
) -> dict[str, Any]:
    """Measured steps after a few unmeasured ones: {"step": timing, "phases_ms", "loss", "peak_bytes",
    "reserved_bytes"}. early: updates inside of the backward pass, whose time then holds them."""
    parameters, losses, marks = model.parameters, [], Marks(device)
    for number in range(WARMUP + steps):
        on_step(number)
        if number == WARMUP:
            reset_peak(device)
            marks = Marks(device)
            marks()
        tokens, seq_idx = next(batches)
        loss = model.loss(tokens, seq_idx)
        marks()
        loss.backward()
        if early is not None:
            early.join()
        marks()
        if clip is None:  # then nothing asks for the norm
            optimizer.step()
        else:
            optim.clip_and_step(optimizer, parameters, optim.grad_norm(parameters), clip)
        optimizer.zero_grad(set_to_none=True)
        marks()
        losses.append(loss.detach())
    times = marks.seconds()
    phases = {name: statistics.median(times[i::3]) * 1e3 for i, name in enumerate(PHASES)}
    whole = [sum(times[i : i + 3]) for i in range(0, len(times), 3)]
    low, median, high = timing.quartiles(whole)
    found = {"step": timing.Timing(median, low, high, steps).to_dict(), "phases_ms": phases}
    return {**found, "loss": float(losses[-1]), **peak(device)}


def reset_peak(device: torch.device) -> None:
    """From now on `peak` speaks of what is yet to come."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # where the system can't, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> dict[str, int | None]:
    """Bytes at the peak: of tensors and of what torch reserved for them on a GPU, else of the process."""
    if device.type == "cuda":
        used, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_bytes": used, "reserved_bytes": reserved}
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        high = next(line for line in lines if line.startswith("VmHWM:"))
        return {"peak_bytes": int(high.split()[1]) * 1024, "reserved_bytes": None}
    except (OSError, StopIteration):
        return {"peak_bytes": None, "reserved_bytes": None}


def read(model: Model, length: int, vocabulary: int, clock: timing.Clock, repeats: int | None) -> dict[str, Any]:
    """Reading one prompt: {"prefill": timing, "peak_bytes", "reserved_bytes"}."""
    prompts = torch.randint(vocabulary, (2, 1, length), device=clock.device)

    def call(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model.hidden(tokens)

    model.module.eval()
    reset_peak(clock.device)
    work = {"prefill": timing.Rotation(list(prompts)).calls(call)}
    calls = timing.take_turns(work, clock, repeats=repeats)["prefill"]
    model.module.train()
    if not calls:
        raise torch.OutOfMemoryError
    return {"prefill": timing.summary(calls, clock).to_dict(), **peak(clock.device)}


def product_rate(clock: timing.Clock, dtype: torch.dtype) -> dict[str, Any]:
    """FLOPs a second of a large square matrix product: what a training step could at best come to."""
    n = _PRODUCT[clock.device.type]
    pairs = [torch.randn(2, n, n, device=clock.device, dtype=dtype) for _ in range(2)]
    work = timing.Rotation(pairs).calls(lambda pair: pair[0] @ pair[1])
    found = timing.summary(timing.take_turns({"product": work}, clock, repeats=20)["product"], clock)
    return {"n": n, "dtype": report.short(dtype), "flops_per_s": 2 * n**3 / found.median}


def is_preset(numbers: dict[str, Any], preset: str) -> bool:
    """Whether a model has a preset's numbers."""
    same = {k: v for k, v in sizes.fields(preset).items() if k != "use_checkpoint"}
    return all(numbers[k] == v for k, v in same.items())


def attach(results: list[dict[str, Any]], reading: list[dict[str, Any]]) -> None:
    """Puts what is known of mamba_ssm, and the goals, beside moai's rows, as `recorded`."""
    known = recorded()
    for rows, table, keys in ((results, "training", ("batch", "length")), (reading, "prefill", ("length",))):
        for row in [r for r in rows if r["model"] == "moai"]:
            same = [k for k in known[table] if all(k[key] == row[key] for key in keys)]
            row["recorded"] = {who: same[0][who] for who in ("mamba_ssm", "goal")} if same else None
