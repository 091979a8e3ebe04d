"""The inputs of every matrix product of a model, as its layers are quantized one after the other.

A `Runner` holds the hidden states of all calibration sequences (in memory, or mapped from a file) and moves them
through the model a block at a time: the mixer, then the feed-forward network. So one layer's weights are in memory at a
time, and each sees what the quantized layers before it make. `gather` runs as much of a block as the wanted inputs need
and sums their second moments.

Results are the same in every run: order and batches are fixed, products are fp32 whatever TensorFloat-32 setting is
active, and sums over batches are fp64.
Source: GPTQ, arXiv 2210.17323, section 4 (calibration, quantized inputs of later layers). Left out: several devices.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moai_core.errors import NonFiniteError, UsageError, storage_error
from moai_core.quantize.calibrate import Calibration, OnEvent

if TYPE_CHECKING:
    from moai_core.model.modeling import MoaiMambaLayer

BLOCKS = ("mamba", "feed_forward")


# ---- statistics ----------------------------------------------------------------------------------------------------


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever is set for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Statistics:
    """Of the inputs x (I,) of a matrix product, over `count` tokens: hessian (I, I) fp64, the mean of x x^T; mean_abs
    and max_abs (I,) fp64, of |x|.
    """

    count: int
    hessian: Tensor
    mean_abs: Tensor
    max_abs: Tensor

    def scaled(self, scale: Tensor) -> Statistics:
        """Those of x / scale, scale (I,)."""
        by = 1 / scale.double()
        return Statistics(self.count, self.hessian * by * by[:, None], self.mean_abs * by, self.max_abs * by.abs())

    def blocks(self, group: int) -> Tensor:
        """(I/g, g, g): the second moments of each group of g inputs (0: one group)."""
        size = len(self.mean_abs)
        group = group or size
        return torch.stack([self.hessian[at : at + group, at : at + group] for at in range(0, size, group)])

    def energy(self, weight: Tensor) -> float:
        """The mean of |W x|^2, weight (O, I)."""
        with exact_products():
            return float(((weight @ self.hessian.to(weight.dtype)) * weight).sum(dtype=torch.float64).clamp(min=0))


class _Sums:
    """Statistics under way."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, real: Tensor | None) -> None:
        x = x.detach().reshape(-1, x.shape[-1]) if real is None else x.detach()[real]
        x = x if x.dtype == torch.float64 else x.float()
        size = x.abs()
        second, total, largest = (x.T @ x).double(), size.sum(0, dtype=torch.float64), size.amax(0).double()
        if self.sums:
            second, total = self.sums[0].add_(second), self.sums[1].add_(total)
            largest = torch.maximum(self.sums[2], largest)
        self.sums = [second, total, largest]
        self.count += len(x)

    def finish(self, name: str) -> Statistics:
        second, total, largest = self.sums
        if not bool(torch.isfinite(second).all()):
            raise NonFiniteError(
                f"{name}: its inputs hold NaN or infinity on the calibration text",
                hint="quantize a model whose loss is finite; with half precision, try --dtype fp32",
            )
        return Statistics(self.count, second / self.count, total / self.count, largest)


# ---- the runner ----------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """The last input that was wanted has been seen."""


@dataclass
class Runner:
    """The hidden states (S, L, H) of all sequences, before the block that comes next.

    device: where the layers are, and on a GPU the states (S * L * H numbers) if half of its free memory holds them.
    dtype: of the residual stream (None: the embedding's). scratch: a folder for a temporary file that holds the states
    instead of memory. batch_tokens: tokens run at a time.
    Events: {"event": "progress", "task": "calibrate", "source": what is run, "done", "total", "unit": "sequences"}.
    """

    calibration: Calibration
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    scratch: str | Path | None = None
    batch_tokens: int = 16384
    on_event: OnEvent | None = None
    hidden: Tensor = field(init=False, repr=False, default_factory=lambda: torch.empty(0))
    block: int = field(init=False, default=0)

    @torch.no_grad()
    def embed(self, embedding: nn.Module) -> None:
        """Hidden states from ids; the next block is the first layer's mixer. Raises UsageError for ids beyond the
        vocabulary.
        """
        ids, size = self.calibration.ids, int(getattr(embedding, "num_embeddings", 0))
        if size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise UsageError(f"calibration data has the token id {int(ids.max())}, the vocabulary {size} entries")
        self.block, first = 0, True
        for rows in self._batches("embedding"):
            x = embedding(ids[rows].to(self.device))
            x = x.to(self.dtype or x.dtype)
            if first:
                self.hidden, first = self._space((*ids.shape, x.shape[-1]), x.dtype), False
            self.hidden[rows] = x.to(self.hidden.device)

    def gather(self, layer: MoaiMambaLayer, names: Sequence[str]) -> dict[str, Statistics]:
        """The statistics of the inputs of the layer's modules of these names ("mamba.in_proj"), all of the block that
        comes next. Raises NonFiniteError for NaN in them.
        """
        sums = {name: _Sums() for name in names}
        with torch.no_grad(), exact_products(), ExitStack() as stack:
            seen: dict[str, Tensor] = {}

            def note(name: str, args: tuple[Any, ...]) -> None:
                seen[name] = args[0]
                if len(seen) == len(sums):
                    raise _Reached

            for name in names:
                module = layer.get_submodule(name)
                handle = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
                stack.callback(handle.remove)
            for rows in self._batches(" ".join(names)):
                seen.clear()
                with suppress(_Reached):
                    self._run(layer, rows)
                real = self._real(rows)
                for name in names:
                    sums[name].add(seen[name], real)
        return {name: sums[name].finish(name) for name in names}

    def step(self, layer: MoaiMambaLayer) -> None:
        """Move the states through the block that comes next, with the layer's weights as they are now."""
        with torch.no_grad():
            for rows in self._batches(BLOCKS[self.block]):
                self.hidden[rows] = self._run(layer, rows).to(self.hidden)
        self.block = (self.block + 1) % 2 if layer.feed_forward is not None else 0

    def advance(self, layer: MoaiMambaLayer) -> None:
        """Move past the layer, or what is left of it."""
        self.step(layer)
        while self.block:
            self.step(layer)

    def _run(self, layer: MoaiMambaLayer, rows: slice) -> Tensor:
        x, seq_idx = self.hidden[rows].to(self.device), self.calibration.seq_idx
        if BLOCKS[self.block] == "mamba":
            marks = None if seq_idx is None else seq_idx[rows].to(self.device)
            return x + layer.mamba(layer.input_layernorm(x), None, marks, "auto")[0]
        assert layer.pre_ff_layernorm is not None and layer.feed_forward is not None
        return x + layer.feed_forward(layer.pre_ff_layernorm(x))

    def _real(self, rows: slice) -> Tensor | None:
        seq_idx = self.calibration.seq_idx
        return None if seq_idx is None else seq_idx[rows].to(self.device) >= 0

    def _batches(self, source: str) -> Iterator[slice]:
        total, length = self.calibration.ids.shape
        step = max(1, self.batch_tokens // length)
        for at in range(0, total, step):
            yield slice(at, min(at + step, total))
            if self.on_event:
                done = {"done": min(at + step, total), "total": total, "unit": "sequences"}
                self.on_event({"event": "progress", "task": "calibrate", "source": source, **done})

    def _space(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size, where = int(np.prod(shape)), torch.device(self.device)
        if where.type == "cuda" and size * dtype.itemsize <= torch.cuda.mem_get_info(where)[0] // 2:
            return torch.empty(shape, dtype=dtype, device=where)  # each block would move all of them to and fro
        if self.scratch is None:
            return torch.empty(shape, dtype=dtype)
        try:
            # Without a name from the start: nothing is left behind, however this process ends.
            with tempfile.NamedTemporaryFile(dir=self.scratch, prefix="calibration-") as file:
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
                return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
        except (OSError, RuntimeError) as exc:
            raise storage_error(exc if isinstance(exc, OSError) else OSError(str(exc)), self.scratch) from exc
