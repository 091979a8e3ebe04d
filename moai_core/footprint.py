"""What a model weighs: its exact parameters, and the bytes of a training step by kind and phase. Plain arithmetic, no
torch.

Memory is counted, not guessed: the tensors that autograd keeps are listed term by term from moai_core/model and
moai_core/scan, and the peak is taken over the phases of a step, which don't need their working memory at the same
time. On a GPU it stands for moai's own kernels; the reference scan keeps every step and needs far more. Not counted:
several devices (states are not sharded yet).

Letters as in the model: H hidden, I inner, N state, K convolution, R time-step rank, V vocabulary, F feed-forward
width; T tokens a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moai_core.recipe import Recipe

KINDS = ("weights", "gradients", "optimizer", "activations", "scan states", "logits", "overhead")

# Logits that exist at once (moai_core/model/loss.py: on a GPU counted as if they had 16 bits) and elements that
# adamw_bf16 updates at once on a CPU (moai_core/training/optim.py).
LOSS_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 30}
LOSS_SMALL = 1 << 29
LOSS_FEW = 4
BF16_CHUNK = 1 << 24
# Elements from which on a parameter is updated by itself in the backward pass (moai_core/training/in_backward.py).
# Bytes of gradients that may wait there for their updates on a GPU.
UPDATED_ALONE = 1 << 20
UPDATES_WAITING = 1 << 28
# Channels whose gradients of B and C are one partial sum of the scan (W of moai_core/cpu/tiles.py; scan/cuda.py).
SCAN_WIDTH = {"cpu": 128, "cuda": 32}
# Parts of a layer that autocast copies. On a GPU it keeps those of modules that are called until it ends; the others go
# into products (moai_core/model/products.py) whose backward pass has them, or makes them again with its layer.
_MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj", "feed-forward")
_CALLED = ("dt_proj", "out_proj")


def letters(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a model by their letter; F is 0 without feed-forward."""
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


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Exact parameter counts by part and in `total`; `config` holds the model's numbers (moai_core.config.fields)."""
    c = letters(config)
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


@dataclass(frozen=True)
class Bytes:
    """Bytes an element: w weights, a products under this precision, r residual stream, g gradients; `cast` copies
    made by autocast (0 or 2)."""

    w: int
    a: int
    r: int
    cast: int


def element_bytes(config: Mapping[str, Any], precision: str) -> Bytes:
    """How wide weights, activations and gradients are under a precision."""
    if precision == "bf16":
        return Bytes(w=2, a=2, r=4 if config["residual_in_fp32"] else 2, cast=0)
    if precision == "bf16-mixed":
        return Bytes(w=4, a=2, r=4, cast=2)
    return Bytes(w=4, a=4, r=4, cast=0)


def weights_gradients_optimizer(config: Mapping[str, Any], recipe: Recipe, precision: str) -> dict[str, int]:
    """Bytes of what stays over a whole step: A_log, D and dt_bias are fp32 under any precision, and so are their
    gradients and moments."""
    p, b = parameters(config), element_bytes(config, precision)
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
    for size, count in tensors(config):
        total += count * (8 * size if size < 4096 else 2 * (size + 4 * -(-size // 256)))
    return total


def tensors(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(elements, how many) of every parameter tensor."""
    c = letters(config)
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
    c, b = letters(config), element_bytes(config, precision)
    H, I, N, R, F = c["H"], c["I"], c["N"], c["R"], c["F"]
    if checkpointing == "full":
        return {"activations": float(b.r * H), "scan states": 0.0}
    on_cpu, keep = device == "cpu", checkpointing == "none"
    # A norm keeps the stream and its scale. On a CPU it works on an fp32 copy, if the stream isn't fp32, and keeps the
    # scaled stream too; the stream itself stays where the norm is made again.
    norm = b.r * H + 4
    if on_cpu:
        norm = (4 + 4 + (b.r if b.r < 4 and not keep else 0)) * H + 4
    # Its result is kept by the matrix products after it; autocast makes a copy for each of them on a CPU.
    copies = 2 if b.cast and on_cpu else 1
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
    tile = 16 if on_cpu or N <= 32 else 8  # tokens between two states that the scan keeps
    states = (4 if on_cpu else b.a) * I * N / tile
    return {"activations": float(mixer + feed), "scan states": states}


def _flight_per_token(config: Mapping[str, Any], precision: str, device: str, checkpointing: str) -> float:
    """Bytes a token in the backward pass of one layer beyond what the forward pass kept: what is made again, and the
    gradients on their way through the wider of feed-forward and scan."""
    c, b = letters(config), element_bytes(config, precision)
    I, N, F = c["I"], c["N"], c["F"]
    feed = 3 * b.a * F  # gradients of SwiGLU's product, gate and up
    scan: float = 4 * b.a * I  # gradients of y, u, dt and z
    scan += (4 if device == "cpu" else b.a) * 2 * N * I / SCAN_WIDTH[device]  # parts of those of B and C
    scan += 2 * b.a * I if checkpointing == "selective" else 0  # u and dt
    scan -= 2 * b.a * F  # the feed-forward's gate and up are gone by then
    layer = saved_per_token(config, precision, device)
    again = sum(layer.values()) if checkpointing == "full" else 0
    return again + max(feed, scan) + (4 + b.r) * c["H"]


def resolved_precision(recipe: Recipe) -> str:
    """What `auto` means on the recipe's class of device."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "fp32" if recipe.hardware.gpu == "cpu" else "bf16-mixed"


def phases(config: Mapping[str, Any], recipe: Recipe, overhead: int = 0) -> dict[str, dict[str, int]]:
    """Bytes by kind in the phases of a training step on one device of the recipe's class: the loss (all stored
    activations, logits in chunks, the head's gradient), the backward pass of the last layer (stored activations, what
    is computed again, gradients in flight), and the optimizer's update. overhead: what a device's runtime takes.
    """
    c, t = letters(config), recipe.train
    device = "cpu" if recipe.hardware.gpu == "cpu" else "cuda"
    precision = resolved_precision(recipe)
    b = element_bytes(config, precision)
    T, H, V = t.batch_size * recipe.data.max_length, c["H"], c["V"]
    held = weights_gradients_optimizer(config, recipe, precision)
    pieces = _stash(config, recipe, precision, device)
    many = recipe.accumulation(recipe.hardware.count) > 1 and not recipe.optim.in_backward
    # fp32 values of a part of one tensor at a time; on a GPU one kernel updates all of them.
    step = 5 * 4 * min(BF16_CHUNK, V * H) if device == "cpu" and (recipe.optim.name == "adamw_bf16" or b.w == 2) else 0
    base: dict[str, float] = {"weights": held["weights"], "optimizer": held["optimizer"], "overhead": overhead}
    first = pieces[0]
    copies = first.copies + first.cached + b.cast * V * H
    loss = {"activations": first.kept + copies, "scan states": first.states}
    loss |= {"gradients": held["gradients"] if many else 0, "logits": _loss(T, V, H, b, device)}
    late = _small_gradients(config, b) + V * H * b.w  # the embedding's, which comes last
    found: dict[str, dict[str, float]] = {
        "loss": base | loss,
        "backward": base | _backward(config, recipe, pieces, held["gradients"], step),
        "update": {
            **base,
            "gradients": late if recipe.optim.in_backward else held["gradients"],
            "activations": step,
            "scan states": 0,
            "logits": 0,
        },
    }
    return {name: {kind: int(kinds[kind]) for kind in KINDS} for name, kinds in found.items()}


@dataclass(frozen=True)
class _Held:
    """What waits for the backward pass of `layers` layers: bytes of activations, scan states and autocast's copies of
    matrices, which layers that are computed again don't need; those of the latter that autocast keeps all the same
    until the loss is there; and what the pass through the last layer takes."""

    layers: int
    kept: float
    states: float
    copies: float
    cached: float
    flight: float


def _stash(config: Mapping[str, Any], recipe: Recipe, precision: str, device: str) -> list[_Held]:
    """At the backward pass's begin, where it comes to the layers that checkpointing applies to, and at its end."""
    c, t, b = letters(config), recipe.train, element_bytes(config, precision)
    T, n = t.batch_size * recipe.data.max_length, c["layers"]
    often = 0 if t.checkpointing == "none" else min(n, t.checkpointing_layers or n)
    p = parameters(config)
    copies = b.cast * sum(p[k] for k in _MATRICES) / n
    called = b.cast * sum(p[k] for k in (_CALLED if device == "cuda" else _MATRICES)) / n
    kept = saved_per_token(config, precision, device)
    again = saved_per_token(config, precision, device, t.checkpointing)
    # The final norm keeps its input and, on a CPU, the scaled one; the loss has its result.
    ends = T * c["H"] * ((b.r if device == "cuda" else 4 + 4) + b.w)
    found = []
    for left in dict.fromkeys((n, often or n, 1)):
        some, rest = min(left, often), max(0, left - often)
        bytes_of = {kind: T * (some * again[kind] + rest * kept[kind]) for kind in kept}
        mode = t.checkpointing if left <= often else "none"
        own, cached = (copies * rest, called * some) if t.checkpointing == "full" else (copies * left, 0)
        flight = T * _flight_per_token(config, precision, device, mode)
        activations = bytes_of["activations"] + (ends if left == n else 0)
        found.append(_Held(left, activations, bytes_of["scan states"], own, cached, flight))
    return found


def _backward(
    config: Mapping[str, Any], recipe: Recipe, pieces: list[_Held], gradients: int, step: int
) -> dict[str, float]:
    """The backward pass trades activations for gradients layer by layer: its peak is at one of its ends, or where it
    comes to other layers. Where parameters are updated on the way, only those of one product and the small ones wait.
    """
    c, b = letters(config), element_bytes(config, resolved_precision(recipe))
    T, H, head = recipe.train.batch_size * recipe.data.max_length, c["H"], c["V"] * c["H"] * b.w
    many = recipe.accumulation(recipe.hardware.count) > 1
    tied = bool(config["tie_word_embeddings"])
    moments = []
    for held in pieces:
        begins = held.layers == c["layers"]
        layers = (c["layers"] + 1 - held.layers) / c["layers"] * (gradients - (1 if tied else 2) * head)
        kinds: dict[str, float] = {"gradients": gradients + head * begins if many else head + layers}
        if recipe.optim.in_backward:
            kinds["gradients"] = 2 * H * max(c["F"], c["I"]) * b.w + _small_gradients(config, b) + head * tied
            # Where the backward pass has come some way; at its beginning there is none yet.
            kinds["gradients"] += UPDATES_WAITING if recipe.hardware.gpu != "cpu" and not begins else 0
        kinds |= {"activations": held.kept + held.flight + held.copies, "scan states": held.states}
        moments.append(kinds | {"logits": T * H * b.w * begins})
    if recipe.optim.in_backward:
        at_head = {"gradients": head, "activations": pieces[0].kept + pieces[0].copies + step}
        moments.append(at_head | {"scan states": pieces[0].states, "logits": T * H * b.w})
    return max(moments, key=lambda kinds: sum(kinds.values()))


def _small_gradients(config: Mapping[str, Any], b: Bytes) -> int:
    """Bytes of the gradients that are too small to be updated inside of the backward pass."""
    small = sum(size * count for size, count in tensors(config) if size < UPDATED_ALONE)
    return small * b.w + parameters(config)["scan (A_log, D, dt_bias)"] * (4 - b.w)


def _loss(T: int, V: int, H: int, b: Bytes, device: str) -> int:
    """Bytes of the loss of T tokens: a chunk of logits, the gradients of the head and of the hidden states."""
    if device == "cpu":
        # Logits in the products' dtype and up to three fp32 tensors of their size; the gradient of the head in fp32
        # and a chunk's part of it (once more in fp32 under autocast).
        rows = min(T, max(16, LOSS_CHUNK[device] // V))
        return rows * V * ((b.a if b.a < 4 else 0) + 3 * 4) + V * H * (4 + b.w + b.cast) + T * H * b.w
    # The kernel leaves the gradient in the logits' place. Chunks are of one size, a multiple of 256 rows; a few add
    # their parts of the head's gradient in its own dtype, more of them in fp32. Without autocast the head is a plain
    # matrix to the product that makes its gradient: that adds to what is there, and chunks can be smaller.
    pieces = -(-T // max(256, LOSS_CHUNK[device] * 2 // (b.a * V) // 256 * 256))
    pieces = pieces if pieces == 1 else max(pieces, LOSS_FEW)
    if pieces == 1 and not b.cast:
        pieces = min(LOSS_FEW, -(-T * V * b.a // LOSS_SMALL))
    rows = -(-T // (pieces * 256)) * 256
    total = 0 if pieces == 1 or (pieces <= LOSS_FEW and not b.cast) else b.w if pieces <= LOSS_FEW else 4
    return min(T, rows) * V * b.a + V * H * (b.w + b.cast + total) + T * H * b.w * min(2, pieces)
