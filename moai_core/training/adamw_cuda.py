"""AdamWBF16 (optim.py) on a CUDA GPU: one launch updates all parameters of a group and type (moai_core/cuda/adamw.cu).

Element by element the torch path reads and writes fp32 copies of everything, some twenty passes over the memory; here
weights, gradients and moments pass once. What is computed is the same, the rounding noise is another stream of random
numbers. Leaves out parameters that are spread over ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moai_core import cuda

THREADS, CHUNK = 256, 8192  # as in the kernel


@dataclass(frozen=True)
class Entry:
    """One parameter of an update: all tensors have its shape, `weight` is the fp32 master or the parameter itself, and
    `key` (63 bits) seeds the noise."""

    key: int
    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor


class Table:
    """What the kernel knows of a list of parameters, on the GPU; made anew when a tensor has moved."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self.blocks = 0
        self.rows: Tensor | None = None

    def fill(self, entries: list[Entry]) -> Tensor:
        """(parameters, 8) int64: first block, elements, four addresses, key, whether all of them are aligned."""
        tensors = [t for e in entries for t in (e.parameter, e.exp_avg, e.exp_avg_sq, e.weight)]
        addresses = [t.data_ptr() for t in tensors]
        if self.rows is None or addresses != self._addresses:
            rows, self.blocks = [], 0
            for i, entry in enumerate(entries):
                assert all(t.is_contiguous() for t in tensors[4 * i : 4 * i + 4])
                four = addresses[4 * i : 4 * i + 4]
                size = entry.parameter.numel()
                rows.append([self.blocks, size, *four, entry.key, int(all(a % 16 == 0 for a in four))])
                self.blocks += -(-size // CHUNK)
            self._addresses, self.rows = addresses, torch.tensor(rows).to(entries[0].parameter.device)
        return self.rows


def update(
    table: Table,
    entries: list[Entry],
    *,
    count: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
    squares: Tensor | None = None,
) -> None:
    """Update number `count` (from 1) of parameters of one type, in place, from their `.grad`; scale: what gradients are
    multiplied by, a number in fp32 on the device, or None. squares (table.blocks,): receives sums of their squares.
    What of a gradient is not finite changes nothing. All of it may still be under way on return.
    """
    (beta1, beta2), parameters = betas, [entry.parameter for entry in entries]
    device, dtype, state = parameters[0].device, parameters[0].dtype, entries[0].exp_avg.dtype
    assert all(p.grad is not None and p.grad.dtype == dtype for p in parameters)
    assert scale is None or (scale.dtype, scale.numel()) == (torch.float32, 1)
    rows = table.fill(entries)
    gradients = [p.grad.contiguous() for p in parameters if p.grad is not None]
    addresses = only = None
    if len(gradients) == 1:
        only = gradients[0]
    else:
        addresses = torch.tensor([g.data_ptr() for g in gradients]).to(device, non_blocking=True)
    kernel = cuda.kernel("adamw.cu", "adamw", device, P=cuda.TYPES[dtype], S=cuda.TYPES[state])
    if table.blocks:
        numbers = (1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay)
        step, over_root = lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
        scalars = (float(x) for x in (*numbers, step, over_root, eps))
        kernel(table.blocks, THREADS, rows, addresses, only, scale, squares, len(entries), count, *scalars)
    # The kernel wrote behind autograd's back.
    torch.autograd.graph.increment_version(parameters)
