"""What a recipe costs before it runs: exact parameters, FLOPs a token, memory by kind on one device (footprint.py),
steps and tokens. Plain arithmetic, no torch. Not counted: time, which needs a measured throughput.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moai_core.footprint import element_bytes, letters, parameters, phases, resolved_precision
from moai_core.recipe import Recipe
from moai_core.storage import tokenizer_folder

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A class of devices: its name, the bytes that CUDA reports as its total memory, and what the CUDA context takes
    of them."""

    label: str
    memory: int
    context: int = int(0.7 * GIB)


GPUS = {
    "a100": Gpu("NVIDIA A100 (80 GB)", int(79.1 * GIB)),
    "h100": Gpu("NVIDIA H100 (80 GB)", int(79.1 * GIB)),
    "a40": Gpu("NVIDIA A40 (48 GB)", int(44.4 * GIB)),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090 (24 GB)", int(23.5 * GIB)),
}

# Share of a device that a plan may fill: the rest goes to gaps between blocks (torch reserved 5 to 10 % more than it
# used, measured on an H100).
USABLE = 0.95


def flops_per_token(
    config: Mapping[str, Any], length: int = 1, *, checkpointing: str = "none", often: int | None = None
) -> dict[str, int]:
    """FLOPs a token: `forward`, `training` (forward and backward: three times forward, what MFU counts), and
    `recompute`, which checkpointing of `often` layers (None: all) adds (selective: the convolution and dt_proj).

    A multiply-add counts as two. Matrix products: 2 a parameter, the head's included, the embedding's look-up not.
    Convolution: 2 K I. Scan: 9 N a channel (dt A, exp, dt u B: two, state: two, C h: two, and the softplus and skip
    spread over N), plus 6 a channel for gate and activation. A pure-Mamba model costs the same at every `length`; the
    argument says for which length a caller asks, nothing depends on it.
    """
    c, p = letters(config), parameters(config)
    products = sum(p[part] for part in ("in_proj", "x_proj", "dt_proj", "out_proj", "feed-forward"))
    layers = 2 * products + c["layers"] * c["I"] * (2 * c["K"] + 9 * c["N"] + 6)
    forward = layers + 2 * c["V"] * c["H"]
    selective = 2 * p["dt_proj"] + c["layers"] * c["I"] * 2 * c["K"]
    again = {"none": 0, "selective": selective, "full": layers}[checkpointing]
    again = again * min(often or c["layers"], c["layers"]) // c["layers"]
    return {"forward": forward, "training": 3 * forward, "recompute": again}


def memory(config: Mapping[str, Any], recipe: Recipe) -> dict[str, int]:
    """Bytes by kind at the peak of a training step on a device of the recipe's class; the kinds add up to the peak."""
    return max(phases(config, recipe, _overhead(recipe)).values(), key=lambda kinds: sum(kinds.values()))


def _overhead(recipe: Recipe) -> int:
    gpu = GPUS.get(recipe.hardware.gpu or "")
    return gpu.context if gpu else int(0.5 * GIB)


def capacity(recipe: Recipe) -> int | None:
    """Bytes of one device: the recipe's, else the class's, else for a CPU this machine's; None when nothing says."""
    if recipe.hardware.memory_gb is not None:
        return int(recipe.hardware.memory_gb * 1e9)
    if recipe.hardware.gpu in GPUS:
        return GPUS[recipe.hardware.gpu].memory
    if recipe.hardware.gpu == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe. Bytes and counts are exact integers; `rows` puts them into words."""

    recipe: str
    device: str
    devices: int
    parameters: dict[str, int]
    flops: dict[str, int]
    precision: str
    memory: dict[str, int]
    phase: str
    capacity: int | None
    batch: dict[str, int]
    steps: int | None
    tokens: int | None
    state_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes in use at the peak of a step."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak leaves 5 % of one device free; None when its memory isn't known."""
        return None if self.capacity is None else self.peak <= USABLE * self.capacity

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every number of the plan, in bytes, FLOPs and counts."""
        return {**self.__dict__, "peak": self.peak, "fits": self.fits}

    def rows(self) -> list[tuple[str, str, str]]:
        """(group, name, value) lines to look at; a group is named on its first line."""
        lines = [("parameters", part, f"{n:,}") for part, n in self.parameters.items()]
        lines += [
            ("FLOPs a token", kind, f"{n / 1e9:,.2f} G" if n >= 1e8 else f"{n / 1e6:,.2f} M")
            for kind, n in self.flops.items()
        ]
        lines += [(f"memory, {self.precision}", kind, _gib(n)) for kind, n in self.memory.items()]
        lines.append((f"memory, {self.precision}", f"peak (in the {self.phase})", _gib(self.peak)))
        if self.capacity is not None:
            lines.append(
                (
                    f"memory, {self.precision}",
                    f"{self.device} has",
                    f"{_gib(self.capacity)}: {'fits' if self.fits else 'DOES NOT FIT'}",
                )
            )
        b = self.batch
        size = f"{b['rows']} rows x {b['accumulation']} micro-batches x {self.devices} device{'s' * (self.devices > 1)}"
        lines.append(("run", "a step", f"{size} x {b['length']} tokens = {b['tokens']:,} tokens"))
        lines.append(("run", "steps", f"{self.steps:,}" if self.steps else "known when the data has been counted"))
        if self.tokens is not None:
            lines.append(
                ("run", "tokens", f"{self.tokens:,} ({self.tokens / self.parameters['total']:.1f} a parameter)")
            )
            lines.append(("run", "FLOPs", f"{self.tokens * (self.flops['training'] + self.flops['recompute']):.3g}"))
        lines.append(("run", "state a sequence", f"{_gib(self.state_bytes)}, at any length"))
        lines += [("note", "", note) for note in self.notes]
        groups = [group for group, _, _ in lines]
        return [(group if group not in groups[:n] else "", name, value) for n, (group, name, value) in enumerate(lines)]


def vocabulary(tokenizer: str | None) -> int | None:
    """Rows that a tokenizer needs of an embedding (its largest id + 1), read from its tokenizer.json; None when there
    is none to read."""
    if tokenizer is None:
        return None
    try:
        folder = tokenizer_folder(tokenizer) or Path(tokenizer)
        parsed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = [entry["id"] for entry in parsed.get("added_tokens", [])]
        words = parsed["model"]["vocab"]
        ids += words.values() if isinstance(words, dict) else [len(words) - 1]
        return max(ids) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # The run itself says what is wrong with a tokenizer; a plan only does without.
        return None


def numbers(recipe: Recipe) -> dict[str, Any]:
    """The model's numbers as a run chooses them: the tokenizer fixes the vocabulary where the recipe does not."""
    size = vocabulary(recipe.tokenizer) if recipe.model.vocab_size is None else None
    return {**recipe.model.numbers(), **({"vocab_size": size} if size else {})}


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe. RecipeError for an effective batch that its micro-batches don't divide."""
    config = numbers(recipe)
    t, length, count = recipe.train, recipe.data.max_length, recipe.hardware.count
    accumulation = recipe.accumulation(count)
    step_tokens = t.batch_size * accumulation * count * length
    found = phases(config, recipe, _overhead(recipe))
    phase = max(found, key=lambda name: sum(found[name].values()))
    gpu = recipe.hardware.gpu
    c, b = letters(config), element_bytes(config, resolved_precision(recipe))
    notes = []
    if recipe.data.train is None:
        notes.append(f"data.train is not set: moai train --recipe {recipe.name} data.train=PATH")
    if recipe.tokenizer is None:
        notes.append(
            f"tokenizer is not set: a tokenizer of at most {config['vocab_size']:,} entries is needed, tokenizer=PATH"
        )
    if gpu != "cpu":
        notes.append("memory is that of moai's CUDA kernels; `moai doctor` says which scan a machine runs")
    return Plan(
        recipe=recipe.name,
        device=GPUS[gpu].label if gpu in GPUS else {"cpu": "this machine"}.get(gpu or "", "a device"),
        devices=count,
        parameters=parameters(config),
        flops=flops_per_token(config, length, checkpointing=t.checkpointing, often=t.checkpointing_layers),
        precision=resolved_precision(recipe),
        memory=found[phase],
        phase=phase,
        capacity=capacity(recipe),
        batch={"rows": t.batch_size, "accumulation": accumulation, "length": length, "tokens": step_tokens},
        steps=t.steps,
        tokens=t.steps * step_tokens if t.steps else None,
        state_bytes=c["layers"] * c["I"] * (4 * c["N"] + b.a * (c["K"] - 1)),
        notes=notes,
    )


def _gib(n: float) -> str:
    if n >= GIB / 10:
        return f"{n / GIB:.2f} GiB"
    return f"{n / (1 << 20):.1f} MiB" if n >= (1 << 20) / 10 or not n else f"{n / 1024:.1f} KiB"
