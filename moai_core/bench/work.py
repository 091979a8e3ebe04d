"""The pieces of work that the benchmarks of operators compare: shapes, random inputs, and one call of each operation.

Letters: B batch, L tokens, I channels, N states a channel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import scan as kernels
from moai_core.bench import timing
from moai_core.bench.timing import Case, Clock, Rotation, Work
from moai_core.model.mamba import dt_bias_init
from moai_core.scan import reference

DIRECTIONS = ("forward", "forward+backward")
CONV_WIDTH = 4
# Mean length of packed documents.
DOCUMENT = 512
# Tokens compared with the reference.
_CHECKED = 64
_TENSORS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


@dataclass(frozen=True)
class Shape:
    """B x L x I with N states; `str` gives it as tables show it."""

    batch: int
    length: int
    dim: int
    state: int = 16

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} x {self.dim}" + (f", N {self.state}" if self.state != 16 else "")

    @property
    def millions(self) -> float:
        """Millions of (batch, token, channel) triples."""
        return self.batch * self.length * self.dim / 1e6


def recorded() -> dict[str, Any]:
    """Figures of mamba_ssm on one GPU model, with source and date, and the goals set against them."""
    return json.loads(Path(__file__).with_name("h100.json").read_text(encoding="utf-8"))


@dataclass
class Inputs:
    """Random inputs of one shape, made once a length and shared by all that read the same layout; `draw` makes them.

    Values as a trained model has them: unit-normal projections, time steps as the model starts with, A = -1 … -N.
    """

    shape: Shape
    dtype: torch.dtype
    clock: Clock
    _kept: dict[tuple[str, int], Rotation] = field(default_factory=dict)

    def draw(self, *shape: int) -> Tensor:
        """Unit-normal numbers of a shape."""
        return torch.randn(*shape, device=self.clock.device, dtype=self.dtype)

    def scan(self, length: int) -> Rotation:
        """Sets of u, dt, A, B, C, D, z, dt_bias, with gradients wanted, and dy."""
        return self._sets("scan", length, self._scan)

    def channel_first(self, operation: str, length: int) -> Rotation:
        """The same values as of `scan` or `conv`, (B, I, L) and (B, N, L)."""

        def turn(name: str, t: Tensor) -> Tensor:
            if t.dim() < 3 or name == "weight":
                return t
            other = t.detach().transpose(1, 2).contiguous()
            return other if name == "dy" else other.requires_grad_()

        key = (f"{operation}, channel first", length)
        if key not in self._kept:
            sets = self.scan(length) if operation == "scan" else self.conv(length)
            turned = [{name: turn(name, t) for name, t in one.items()} for one in sets.sets]
            self._kept[key] = Rotation(turned)
        return self._kept[key]

    def conv(self, length: int) -> Rotation:
        """Sets of u, weight, bias and dy."""
        return self._sets("conv", length, self._conv)

    def attention(self, length: int) -> Rotation:
        """Sets of q, k, v and dy: (B, heads, L, size)."""
        return self._sets("attention", length, self._attention)

    def _sets(self, kind: str, length: int, make: Callable[[int], dict[str, Tensor]]) -> Rotation:
        if (kind, length) not in self._kept:
            first = make(length)
            count = timing.sets_of(sum(t.numel() * t.element_size() for t in first.values()), self.clock)
            self._kept[kind, length] = Rotation([first, *(make(length) for _ in range(count - 1))])
        return self._kept[kind, length]

    def _scan(self, length: int) -> dict[str, Tensor]:
        batch, dim, state, device = self.shape.batch, self.shape.dim, self.shape.state, self.clock.device
        A = -torch.arange(1, state + 1, device=device, dtype=torch.float32).repeat(dim, 1)
        wide = {"A": A, "D": torch.ones(dim, device=device), "dt_bias": dt_bias_init(dim, device)}
        tokens = {name: self.draw(batch, length, dim) for name in ("u", "dt", "z", "dy")}
        tokens |= {name: self.draw(batch, length, state) for name in ("B", "C")}
        return _wanting({**wide, **tokens})

    def _conv(self, length: int) -> dict[str, Tensor]:
        batch, dim = self.shape.batch, self.shape.dim
        found = {"u": self.draw(batch, length, dim), "dy": self.draw(batch, length, dim)}
        return _wanting({**found, "weight": self.draw(dim, 1, CONV_WIDTH), "bias": self.draw(dim)})

    def _attention(self, length: int) -> dict[str, Tensor]:
        heads, size = heads_of(self.shape.dim // 2)
        shape = (self.shape.batch, length, heads, size)
        return _wanting({name: self.draw(*shape).transpose(1, 2) for name in ("q", "k", "v", "dy")})


def documents(batch: int, length: int, device: torch.device) -> Tensor:
    """seq_idx (B, L) int32 of packed documents of exponentially distributed length, 512 tokens in the mean."""
    lengths = torch.empty(batch, length).exponential_(1 / DOCUMENT).ceil().clamp(min=1)
    tokens = torch.arange(length).float().repeat(batch, 1)
    return torch.searchsorted(lengths.cumsum(1), tokens, right=True).to(device, torch.int32)


def _wanting(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if name == "dy" else t.requires_grad_() for name, t in tensors.items()}


def heads_of(width: int) -> tuple[int, int]:
    """(heads, size of a head): 128 where it divides the width, else the largest multiple of 4 below that does."""
    size = next((size for size in range(min(128, width), 3, -1) if width % size == 0 and size % 4 == 0), width)
    return width // size, size


def both_ways(function: Callable[[dict[str, Tensor]], Tensor], direction: str) -> Callable[[dict[str, Tensor]], object]:
    """One call forward without gradients, or forward and backward to every input."""

    def forward(one: dict[str, Tensor]) -> object:
        with torch.no_grad():
            return function(one)

    def backward(one: dict[str, Tensor]) -> object:
        y = function(one)
        return torch.autograd.grad(y, [t for name, t in one.items() if name != "dy"], one["dy"])

    return forward if direction == "forward" else backward


def attend(one: dict[str, Tensor]) -> Tensor:
    """Causal attention, by the kernel that torch itself chooses; see `Inputs.attention`."""
    return F.scaled_dot_product_attention(one["q"], one["k"], one["v"], is_causal=True)


def _selective_scan(one: dict[str, Tensor]) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, A, B, C, D, z, dt_bias = (one[name] for name in _TENSORS)
    return selective_scan_fn(u, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True)


def _causal_conv1d(one: dict[str, Tensor]) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(one["u"], one["weight"][:, 0], one["bias"], activation="silu")


def cases(
    inputs: Inputs, operation: str, direction: str, *, backend: str, against: Sequence[str], resets: bool
) -> list[Case]:
    """What is compared for one operation and direction; the first is moai's."""
    shape, back = inputs.shape, direction != "forward"
    row = 4.0 * shape.batch * shape.dim  # bytes of a token's channels in fp32
    op = getattr(kernels, operation)
    names = _TENSORS if operation == "scan" else ("u", "weight", "bias")
    own = inputs.scan if operation == "scan" else inputs.conv
    looping = kernels.BACKENDS.get(picked(inputs, operation, backend, False)) is reference
    loop_order = 2.0 if back and operation == "scan" else 1.0  # each token's gradient is as large as the sequence
    loop_memory = row * (8 + (5 * shape.state if back else 0))
    usual = row * (12 + shape.state / 4 if back else 5)

    def case(name: str, backend: str, packed: bool = False) -> Case:
        def make(length: int) -> Work:
            seq_idx = documents(shape.batch, length, inputs.clock.device) if packed else None

            def call(one: dict[str, Tensor]) -> Tensor:
                return op(*(one[name] for name in names), seq_idx=seq_idx, backend=backend)[0]

            return own(length).calls(both_ways(call, direction))

        loops = backend == "reference" or (backend == "auto" and looping)
        return Case(name, make, loop_order if loops else 1.0, loop_memory if loops else usual)

    def turned(function: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[int], Work]:
        return lambda length: inputs.channel_first(operation, length).calls(both_ways(function, direction))

    found = [case("moai", backend)]
    if resets:
        found.append(case("packed", backend, packed=True))
    if "mamba_ssm" in against and operation == "scan":
        found.append(Case("mamba_ssm", turned(_selective_scan)))
    if "mamba_ssm" in against and operation == "conv" and _conv1d(inputs) is None:
        found.append(Case("mamba_ssm", turned(_causal_conv1d)))
    if operation == "scan" and "attention" in against:
        attention = both_ways(attend, direction)
        found.append(Case("attention", lambda n: inputs.attention(n).calls(attention), 2.0, 4 * row))
    if operation == "scan" and "reference" in against:
        found.append(case("reference", "reference"))
    return found


def _conv1d(inputs: Inputs) -> str | None:
    """Why causal_conv1d, which stands for mamba_ssm's convolution, can't run; None if it can."""
    return dict(kernels.explain(inputs.clock.device, inputs.dtype, op="conv", K=CONV_WIDTH))["mamba_ssm"]


def picked(inputs: Inputs, operation: str, backend: str, packed: bool) -> str:
    """The name of the backend that runs such a call."""
    chosen = kernels.pick(
        inputs.clock.device, inputs.dtype, backend=backend, op=operation, N=inputs.shape.state, K=CONV_WIDTH,
        seq_idx=packed,
    )  # fmt: skip
    return next(name for name, module in kernels.BACKENDS.items() if module is chosen)


def agreement(inputs: Inputs, operation: str, backend: str) -> float:
    """Relative norm error of the first tokens of a row against the loop that defines the operation, in float64."""
    names = _TENSORS if operation == "scan" else ("u", "weight", "bias")
    one = (inputs.scan if operation == "scan" else inputs.conv)(inputs.shape.length).sets[0]
    few = min(_CHECKED, inputs.shape.length)

    def part(t: Tensor, name: str) -> Tensor:
        return t[:1, :few].double() if t.dim() == 3 and name != "weight" else t.double()

    with torch.no_grad():
        # The whole length, as it is timed: a kernel that cuts time into segments is right from its first token on.
        y = getattr(kernels, operation)(*(one[name] for name in names), backend=backend)[0][:1, :few].double()
        want = getattr(reference, operation)(*(part(one[name], name) for name in names))[0]
        return float((y - want).norm() / want.norm())
