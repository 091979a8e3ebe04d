"""What a recipe costs before it runs: exact parameters, FLOPs a token, memory by kind on one device, steps and
tokens. Plain arithmetic, no torch.

Memory is counted, not guessed: the tensors that autograd keeps are listed term by term from moai_core/model and
moai_core/scan, and the peak is taken over the phases of a step, which don't need their working memory at the same
time. On a GPU it stands for moai's own kernels; the reference scan keeps every step and needs far more. Not counted:
several devices (states are not sharded yet), and time, which needs a measured throughput.

Letters as in the model: H hidden, I inner, N state, K convolution, R time-step rank, V vocabulary, F feed-forward
width; T tokens a micro-batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moai_core import paths
from moai_core.recipe import Recipe

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

# Logits that exist at once (moai_core/model/loss.py: on a GPU counted as if they had 16 bits) and elements that
# adamw_bf16 updates at once on a CPU (moai_core/training/optim.py).
LOSS_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 30}
LOSS_FEW = 4
BF16_CHUNK = 1 << 24
# Tokens between two states that the scan keeps for its backward pass, and channels whose gradients of B and C are one
# partial sum (moai_core/scan/cuda.py, cpu_kernels.py).
SCAN_TILE = {"cpu": 16, "cuda": 16}
SCAN_WIDTH = {"cpu": 128, "cuda": 32}

# Share of a device that a plan may fill: the rest goes to gaps between blocks (torch reserved 5 to 10 % more than it
# used, measured on an H100).
USABLE = 0.95

KINDS = ("weights", "gradients", "optimizer", "activations", "scan states", "logits", "overhead")


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Exact parameter counts by part and in `total`; `config` holds the model's numbers (moai_core.config.fields)."""
    c = _letters(config)
    H, I, N, R = c["H"], c["I"], c["N"], c["R"]
    norms = H * (2 if c["F"] else 1) + (R + 2 * N if config["dt_bc_norm"] else 0)
    layer = {
        "in_proj": H * 2 * I,
        "conv1d": I * c["K"] + I,
        "x_proj": I * (R + 2 * N),
        "dt_proj": R * I,
        "scan (A_log, D, dt_bias)": I * N + 2 * I,
        "out_proj": I * H,
        "feed-forward": 3 * H * c["F"],
        "norms": norms,
    }
    counts = {"embeddings": c["V"] * H, **{part: c["layers"] * n for part, n in layer.items()}}
    counts["norms"] += H
    counts["head"] = 0 if config["tie_word_embeddings"] else c["V"] * H
    return {**counts, "total": sum(counts.values())}


def flops_per_token(config: Mapping[str, Any], length: int = 1, *, checkpointing: str = "none") -> dict[str, int]:
    """FLOPs a token: `forward`, `training` (forward and backward: three times forward, what MFU counts), and
    `recompute`, which checkpointing adds (selective: the convolution and dt_proj).

    A multiply-add counts as two. Matrix products: 2 a parameter, the head's included, the embedding's look-up not.
    Convolution: 2 K I. Scan: 9 N a channel (dt A, exp, dt u B: two, state: two, C h: two, and the softplus and skip
    spread over N), plus 6 a channel for gate and activation. A pure-Mamba model costs the same at every `length`; the
    argument says for which length a caller asks, nothing depends on it.
    """
    c, p = _letters(config), parameters(config)
    products = sum(p[part] for part in ("in_proj", "x_proj", "dt_proj", "out_proj", "feed-forward"))
    layers = 2 * products + c["layers"] * c["I"] * (2 * c["K"] + 9 * c["N"] + 6)
    forward = layers + 2 * c["V"] * c["H"]
    selective = 2 * p["dt_proj"] + c["layers"] * c["I"] * 2 * c["K"]
    again = {"none": 0, "selective": selective, "full": layers}[checkpointing]
    return {"forward": forward, "training": 3 * forward, "recompute": again}


@dataclass(frozen=True)
class _Bytes:
    """Bytes an element: w weights, a products under this precision, r residual stream, g gradients; `cast` copies
    made by autocast (0 or 2)."""

    w: int
    a: int
    r: int
    cast: int


def _bytes(config: Mapping[str, Any], precision: str) -> _Bytes:
    if precision == "bf16":
        return _Bytes(w=2, a=2, r=4 if config["residual_in_fp32"] else 2, cast=0)
    if precision == "bf16-mixed":
        return _Bytes(w=4, a=2, r=4, cast=2)
    return _Bytes(w=4, a=4, r=4, cast=0)


def weights_gradients_optimizer(config: Mapping[str, Any], recipe: Recipe, precision: str) -> dict[str, int]:
    """Bytes of what stays over a whole step: A_log, D and dt_bias are fp32 under any precision, and so are their
    gradients and moments."""
    p, b = parameters(config), _bytes(config, precision)
    fp32 = p["scan (A_log, D, dt_bias)"]
    rest = p["total"] - fp32
    weights = rest * b.w + fp32 * 4
    if recipe.optim.name == "adamw_8bit":
        moments = _moments_8bit(config)
    elif recipe.optim.name == "adamw" and precision == "bf16":
        moments = 12 * rest + 8 * fp32  # fp32 masters and two fp32 moments; what is fp32 already needs no master
    else:
        moments = 2 * weights  # two moments in the parameter's own dtype
    return {"weights": weights, "gradients": weights, "optimizer": moments}


def _moments_8bit(config: Mapping[str, Any]) -> int:
    """bitsandbytes' AdamW8bit: two one-byte moments with an fp32 scale a block of 256; tensors under 4096 elements
    keep fp32 moments."""
    total = 0
    for size, count in _tensors(config):
        total += count * (8 * size if size < 4096 else 2 * (size + 4 * -(-size // 256)))
    return total


def _tensors(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(elements, how many) of every parameter tensor."""
    c = _letters(config)
    H, I, N, R, F, n = c["H"], c["I"], c["N"], c["R"], c["F"], c["layers"]
    layer = [H, 2 * H * I, I * c["K"], I, I * (R + 2 * N), R * I, I * N, I, I, I * H]
    layer += [R, N, N] if config["dt_bc_norm"] else []
    layer += [H, H * F, H * F, F * H] if F else []
    ends = [c["V"] * H, H] + ([] if config["tie_word_embeddings"] else [c["V"] * H])
    return [(size, n) for size in layer] + [(size, 1) for size in ends]


def saved_per_token(
    config: Mapping[str, Any], precision: str, device: str = "cuda", checkpointing: str = "none"
) -> dict[str, float]:
    """Bytes a token that one layer keeps for its backward pass: `activations` and, apart from them, `scan states`.

    device "cuda" stands for moai's kernels, which keep their inputs and a number a row; "cpu" for norms and SwiGLU of
    single operations, which keep a product each. checkpointing "selective" leaves out what moai_core/model/recompute.py
    makes again, "full" all but the layer's input.
    """
    c, b = _letters(config), _bytes(config, precision)
    H, I, N, R, F = c["H"], c["I"], c["N"], c["R"], c["F"]
    if checkpointing == "full":
        return {"activations": float(b.r * H), "scan states": 0.0}
    on_cpu, keep = device == "cpu", checkpointing == "none"
    # A norm keeps the stream and its scale. On a CPU it works on an fp32 copy, if the stream isn't fp32, and keeps the
    # scaled stream too; the stream itself stays where the norm is made again.
    norm = b.r * H + 4
    if on_cpu:
        norm = (4 + 4 + (b.r if b.r < 4 and not keep else 0)) * H + 4
    # Its result is kept by the matrix products after it; autocast makes a copy for each of them.
    copies = 2 if b.cast else 1
    mixer: float = norm + (b.a * H if keep else 0)
    mixer += b.a * 2 * I  # in_proj's result: the convolution's input u and the gate z
    mixer += (2 * b.a * I) if keep else 0  # the convolution's result and dt
    mixer += b.a * I  # the gated y: input of out_proj
    if config["dt_bc_norm"]:
        wide = 4 if on_cpu else b.a
        mixer += wide * (R + 2 * N) + 12 + (4 * (R + 2 * N) if on_cpu else 0)  # three norms
        mixer += b.a * R + b.w * 2 * N  # input of dt_proj; B and C
        mixer += b.w * R if b.cast and not keep else 0  # what dt_proj's input was before autocast
    else:
        mixer += b.a * (R + 2 * N)
    feed: float = 0
    if F:
        feed = norm + 2 * b.a * F + (b.a * F if on_cpu else 0)  # gate, up; on a CPU silu(gate)
        feed += (copies * b.a * H + b.a * F) if keep else 0  # input of gate and up, input of down_proj
    states = (4 if on_cpu or b.a == 4 else 2) * I * N / SCAN_TILE[device]
    return {"activations": float(mixer + feed), "scan states": states}


def _flight_per_token(config: Mapping[str, Any], precision: str, device: str, checkpointing: str) -> float:
    """Bytes a token in the backward pass of one layer beyond what the forward pass kept: what is made again, and the
    gradients on their way through the wider of feed-forward and scan."""
    c, b = _letters(config), _bytes(config, precision)
    I, N, F = c["I"], c["N"], c["F"]
    feed = 3 * b.a * F  # gradients of SwiGLU's product, gate and up
    scan = 4 * b.a * I + 8 * N * I / SCAN_WIDTH[device]  # gradients of y, u, dt and z; parts of those of B and C
    scan += 2 * b.a * I if checkpointing == "selective" else 0  # u and dt
    scan -= 2 * b.a * F  # the feed-forward's gate and up are gone by then
    layer = saved_per_token(config, precision, device)
    again = sum(layer.values()) if checkpointing == "full" else 0
    return again + max(feed, scan) + (4 + b.r) * c["H"]


def memory(config: Mapping[str, Any], recipe: Recipe) -> dict[str, int]:
    """Bytes by kind at the peak of a training step on one device of the recipe's class; the kinds add up to the peak.

    The phases of a step: the loss (all stored activations, logits in chunks, the head's gradient), the backward pass
    of the last layer (stored activations, with checkpointing one layer's recomputed ones, gradients in flight), and
    the optimizer's update.
    """
    return max(_phases(config, recipe).values(), key=lambda kinds: sum(kinds.values()))


def _phases(config: Mapping[str, Any], recipe: Recipe) -> dict[str, dict[str, int]]:
    c, t = _letters(config), recipe.train
    device = "cpu" if recipe.hardware.gpu == "cpu" else "cuda"
    precision = resolved_precision(recipe)
    b, p = _bytes(config, precision), parameters(config)
    T, H, V = t.batch_size * recipe.data.max_length, c["H"], c["V"]
    held = weights_gradients_optimizer(config, recipe, precision)
    layer = saved_per_token(config, precision, device, t.checkpointing)
    # The final norm keeps its input and, on a CPU, the scaled one; the loss has its result.
    ends = T * H * ((b.r if device == "cuda" else 4 + 4) + b.w)
    stash = T * c["layers"] * layer["activations"] + ends
    states = T * c["layers"] * layer["scan states"]
    # Autocast keeps a bf16 copy of every matrix it met until the forward pass, loss included, is over; the backward
    # pass needs those of layers that aren't computed again.
    copies = b.cast * sum(p[k] for k in ("in_proj", "x_proj", "dt_proj", "out_proj", "feed-forward"))

    flight = T * _flight_per_token(config, precision, device, t.checkpointing)
    many = recipe.accumulation(recipe.hardware.count) > 1
    head = V * H * b.w
    # fp32 values of a part of one tensor at a time; on a GPU one kernel updates all of them.
    step = 5 * 4 * min(BF16_CHUNK, V * H) if device == "cpu" and (recipe.optim.name == "adamw_bf16" or b.w == 2) else 0
    base: dict[str, float] = {"weights": held["weights"], "optimizer": held["optimizer"], "overhead": _overhead(recipe)}
    grads = held["gradients"] if many else 0
    phases: dict[str, dict[str, float]] = {
        "loss": {
            **base,
            "gradients": grads,
            "activations": stash + copies + b.cast * V * H,
            "scan states": states,
            "logits": _loss(T, V, H, b, device),
        },
        "backward": {
            **base,
            "gradients": grads + head,
            "activations": stash + flight + (copies if t.checkpointing != "full" else 0),
            "scan states": states,
            "logits": T * H * b.w,
        },
        "update": {**base, "gradients": held["gradients"], "activations": step, "scan states": 0, "logits": 0},
    }
    return {name: {kind: int(kinds[kind]) for kind in KINDS} for name, kinds in phases.items()}


def _loss(T: int, V: int, H: int, b: _Bytes, device: str) -> int:
    """Bytes of the loss of T tokens: a chunk of logits, the gradients of the head and of the hidden states."""
    if device == "cpu":
        # Logits in the products' dtype and up to three fp32 tensors of their size; the gradient of the head in fp32
        # and a chunk's part of it (once more in fp32 under autocast).
        rows = min(T, max(16, LOSS_CHUNK[device] // V))
        return rows * V * ((b.a if b.a < 4 else 0) + 3 * 4) + V * H * (4 + b.w + b.cast) + T * H * b.w
    # The kernel leaves the gradient in the logits' place. Chunks are of one size, a multiple of 256 rows; a few add
    # their parts of the head's gradient in its own dtype, more of them in fp32.
    pieces = -(-T // max(256, LOSS_CHUNK[device] * 2 // (b.a * V) // 256 * 256))
    rows = -(-T // (pieces * 256)) * 256
    total = 0 if pieces == 1 else b.w if pieces <= LOSS_FEW else 4
    return min(T, rows) * V * b.a + V * H * (b.w + b.cast + total) + T * H * b.w * min(2, pieces)


def resolved_precision(recipe: Recipe) -> str:
    """What `auto` means on the recipe's class of device."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "fp32" if recipe.hardware.gpu == "cpu" else "bf16-mixed"


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
        lines.append(("run", "state a sequence", f"{self.state_bytes / 1e6:.1f} MB, at any length"))
        lines += [("note", "", note) for note in self.notes]
        groups = [group for group, _, _ in lines]
        return [(group if group not in groups[:n] else "", name, value) for n, (group, name, value) in enumerate(lines)]


def vocabulary(tokenizer: str | None) -> int | None:
    """Rows that a tokenizer needs of an embedding (its largest id + 1), read from its tokenizer.json; None when there
    is none to read."""
    if tokenizer is None:
        return None
    packaged = paths.TOKENIZERS / tokenizer
    try:
        parsed = json.loads(
            ((packaged if packaged.is_dir() else Path(tokenizer)) / "tokenizer.json").read_text(encoding="utf-8")
        )
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
    phases = _phases(config, recipe)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    gpu = recipe.hardware.gpu
    c, b = _letters(config), _bytes(config, resolved_precision(recipe))
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
        flops=flops_per_token(config, length, checkpointing=t.checkpointing),
        precision=resolved_precision(recipe),
        memory=phases[phase],
        phase=phase,
        capacity=capacity(recipe),
        batch={"rows": t.batch_size, "accumulation": accumulation, "length": length, "tokens": step_tokens},
        steps=t.steps,
        tokens=t.steps * step_tokens if t.steps else None,
        state_bytes=c["layers"] * c["I"] * (4 * c["N"] + b.a * (c["K"] - 1)),
        notes=notes,
    )


def _letters(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        "H": config["hidden_size"],
        "I": config["expand_factor"] * config["hidden_size"],
        "N": config["state_size"],
        "K": config["conv_kernel_size"],
        "R": config["time_step_rank"],
        "V": config["vocab_size"],
        "F": config["intermediate_size"] if config["ffn"] == "swiglu" else 0,
        "layers": config["num_hidden_layers"],
    }


def _gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / (1 << 20):.1f} MiB"
