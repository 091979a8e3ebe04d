"""The optimizer inside of the backward pass: a parameter is updated as soon as its gradient is complete, and the
gradient is freed at once (the fused update of LOMO, arXiv 2306.09782).

The gradients of a model then never exist together, and one may still be in the GPU's cache when AdamW reads it. The
bits are those of an ordinary step: an update depends on its own gradient alone, and noise on (seed, update, name). That
holds as long as nothing needs all gradients first: no clipping by their common norm, no sum over micro-batches or ranks
(`begin`). A step whose gradient turns out to be not finite can't be skipped as a whole: what of it was not finite has
changed nothing, the rest is done. Small parameters keep their gradients to the end and are updated together.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moai_core.footprint import UPDATED_ALONE, UPDATES_WAITING
from moai_core.recipe import Recipe
from moai_core.training import optim


def begin(
    recipe: Recipe, optimizer: torch.optim.Optimizer, *, accumulation: int, ranks: int, stack: ExitStack
) -> InBackward | None:
    """The hooks, until the stack is closed, if the recipe asks for them (optim.in_backward). RecipeError where they
    can't be had: with more than one micro-batch a step or process, or another optimizer than moai's own.
    """
    if not recipe.optim.in_backward:
        return None
    key = "optim.in_backward"
    if ranks > 1:
        raise recipe.error(key, f"updates from the gradients of one process (there are {ranks})", hint=f"{key}=false")
    if accumulation > 1:
        why = f"updates from the gradients of one micro-batch (a step has {accumulation})"
        raise recipe.error(key, why, hint=f"{key}=false")
    if not isinstance(optimizer, optim.AdamWBF16):
        why = f"needs bf16 weights or optim.name=adamw_bf16 (got {recipe.optim.name} on fp32 weights)"
        raise recipe.error(key, why, hint="optim.name=adamw_bf16, or train.precision=bf16")
    found = InBackward(optimizer)
    stack.callback(found.close)
    return found


class InBackward:
    """Hooks that update the large parameters of an optimizer during `backward()`; `optimizer.step()` does the rest.

    On a GPU the updates run on a stream of their own, beside what is left of the backward pass: one waits for memory
    while the other computes. `join` is what comes after them.
    """

    def __init__(self, optimizer: optim.AdamWBF16) -> None:
        self._optimizer, self._handles = optimizer, list[Any]()
        self._waiting: deque[tuple[Any, Tensor]] = deque()
        self._bytes = 0
        named = [
            (index, name, parameter)
            for index, group in enumerate(optimizer.param_groups)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.numel() >= UPDATED_ALONE
        ]
        sizes = [optim.blocks(parameter) for _, _, parameter in named]
        device = named[0][2].device if named else torch.device("cpu")
        self._squares = torch.zeros(sum(sizes), device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for (index, name, parameter), squares in zip(named, self._squares.split(sizes), strict=True):
            hook = partial(self._update, index, name, squares)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def close(self) -> None:
        """Takes the hooks away."""
        self.join()
        for handle in self._handles:
            handle.remove()

    def join(self) -> None:
        """The updates begun are over for whatever comes next on the current stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._waiting.clear()
            self._bytes = 0

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Euclidean norm of all gradients of this step, those still there and those used up; to be asked for once."""
        self.join()
        squares = self._squares.sum()
        self._squares.zero_()
        if any(parameter.grad is not None for parameter in parameters):
            squares = squares + optim.grad_norm(parameters).square()
        return squares.sqrt()

    def _update(self, index: int, name: str, squares: Tensor, parameter: Tensor) -> None:
        group = self._optimizer.param_groups[index]
        if self._stream is None:
            self._optimizer.step_one(group, name, parameter, squares)
            parameter.grad = None
            return
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._optimizer.step_one(group, name, parameter, squares)
            done = self._stream.record_event()
        # The gradient's memory goes back on the stream that it came from, behind its update.
        assert parameter.grad is not None
        self._waiting.append((done, parameter.grad))
        self._bytes += parameter.grad.nbytes
        parameter.grad = None
        while self._bytes > UPDATES_WAITING:
            event, gradient = self._waiting.popleft()
            here.wait_event(event)
            self._bytes -= gradient.nbytes
