"""Models that run, for the comparison at a conversion's end: moai's own, and transformers' in their own classes.

Both in fp32 on the CPU, whatever is stored. A runtime gives logits of whole sequences only: transformers' Mamba,
FalconMamba and Jamba restart from a zero state when they get several tokens with a cache.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moai_core import weights
from moai_core.convert.source import Unavailable
from moai_core.quant.linear import set_kernel


class MoaiRuntime:
    """moai's model of a folder."""

    name = "moai"

    def __init__(self, path: Path) -> None:
        self.model: Any = weights.read(path, dtype=torch.float32)
        # Of a quantized model the exact product: other kernels round the activations.
        set_kernel(self.model, "dequantize")

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """See source.Runtime."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].float()

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int, vocab: int) -> list[int]:
        """The `count` tokens below `vocab` that follow `ids`, the likeliest each time, a token a step."""
        out = self.model(torch.tensor([ids]), use_cache=True)
        made: list[int] = []
        while True:
            made.append(int(out.logits[0, -1, :vocab].argmax()))
            if len(made) == count:
                return made
            out = self.model(torch.tensor([made[-1:]]), state=out.state, use_cache=True)

    def close(self) -> None:
        """See source.Runtime."""
        self.model = None
        gc.collect()


class TransformersRuntime:
    """A class of transformers on a folder, or on a model that was made by hand."""

    def __init__(self, path: Path, name: str, model: Any = None) -> None:
        """Raises Unavailable where this transformers has no such class or refuses the folder."""
        import transformers

        self.name = f"transformers {transformers.__version__}"
        if model is None:
            cls = getattr(transformers, name, None)
            if cls is None:
                raise Unavailable(f"{self.name} has no {name}")
            with quiet():
                model = cls.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        self.model: Any = model.eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """See source.Runtime."""
        with quiet():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].float()

    def close(self) -> None:
        """See source.Runtime."""
        self.model = None
        gc.collect()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and its list of the kernels that it misses."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
