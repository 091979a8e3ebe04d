"""Rows for new tokens: a model whose embedding and head grow with its tokenizer.

A new token starts as the mean of its old pieces' rows, in the embedding and in a head of its own: it means about what
they meant, and is as likely as they were. Rows that only pad the vocabulary are used first; if they don't suffice, the
vocabulary grows to the next multiple of the power of two (at most 128) that divided it, and what pads it then is the
mean of all old rows. Everything else stays, bit for bit. Left out: quantized embeddings, optimizer states.
Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021), for the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moai_core import storage, weights
from moai_core.checkpoint import load_model
from moai_core.data.tokenize import check_tokenizer, load_tokenizer
from moai_core.errors import UsageError, shell

_MULTIPLE = 128


class Grown:
    """A model that waits for its new rows. Raises CheckpointError, UsageError where it doesn't go with the tokenizer
    whose tokenizer.json is `state`, or is quantized.
    """

    def __init__(self, folder: Path, state: dict[str, Any], *, on_event: Callable[..., None] | None = None) -> None:
        self.folder = folder
        self.model: Any = load_model(folder, on_event=on_event)
        if getattr(self.model.config, "quantization", None):
            raise UsageError(
                f"{folder}: the model is quantized, and rows of codes have no mean",
                hint="extend the model it was made of, then quantize again",
            )
        from moai_core.tokenizer.extend import ids_of

        self.rows = self.model.config.vocab_size
        highest = max(ids_of(state).values())
        if highest >= self.rows:
            raise UsageError(
                f"{folder}: its embedding has {self.rows} rows, the tokenizer has ids up to {highest}",
                hint="extend the tokenizer that the model was trained with",
            )
        own = _own(folder)
        if own is not None and ids_of(own) != ids_of(state):
            raise UsageError(
                f"{folder}: the model's own tokenizer has other tokens than the one to extend",
                hint=f"name the model's folder as the tokenizer, too: extend {shell(folder)} … --model {shell(folder)}",
            )

    def write(
        self, out: Path, pieces: dict[int, list[int]], files: dict[str, bytes], *, force: bool = False
    ) -> dict[str, Any]:
        """Fills the rows of `pieces` (new id -> old ids), writes model and tokenizer as one whole folder `out`, and
        returns `{"rows_before", "rows", "tied"}`. Raises StorageError, CheckpointError.
        """
        model, rows = self.model, padded(max(pieces) + 1, self.rows)
        old = [self._matrix(layer).clone() for layer in self._layers()]
        if rows > self.rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        for layer, before in zip(self._layers(), old, strict=True):
            fill(self._matrix(layer), before, pieces)
        with storage.new_folder(out, replace=force) as writer:
            weights.write(writer, model)
            for name, raw in files.items():
                writer.write(name, raw)
            check_tokenizer(load_tokenizer(writer.path), rows)
        return {"rows_before": self.rows, "rows": rows, "tied": bool(model.config.tie_word_embeddings)}

    def _layers(self) -> list[torch.nn.Module]:
        """The embedding, and the head unless it has the embedding's rows."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return [embedding] if self.model.config.tie_word_embeddings else [embedding, head]

    @staticmethod
    def _matrix(layer: torch.nn.Module) -> torch.Tensor:
        weight: Any = layer.weight
        return weight.data


def _own(folder: Path) -> dict[str, Any] | None:
    from moai_core.tokenizer.evaluate import open_tokenizer

    holds = storage.tokenizer_folder(folder)
    return open_tokenizer(str(holds))[1] if holds is not None and (holds / "tokenizer.json").is_file() else None


def padded(needed: int, rows: int) -> int:
    """How many rows a vocabulary of `rows` gets that needs `needed`."""
    multiple = 1
    while multiple < _MULTIPLE and rows % (2 * multiple) == 0:
        multiple *= 2
    return rows if needed <= rows else -(-needed // multiple) * multiple


def fill(matrix: torch.Tensor, old: torch.Tensor, pieces: dict[int, list[int]]) -> None:
    """Sets the rows of `matrix` (V, H): those of `old` (V_old <= V, H), then the mean of its pieces for each new token
    (fp32 sums), and the mean of all old rows for what was appended beyond them.
    """
    matrix[: len(old)] = old
    if len(matrix) > len(old):
        matrix[len(old) :] = old.float().mean(0).to(matrix.dtype)
    for index, side in pieces.items():
        matrix[index] = old[side].float().mean(0).to(matrix.dtype)
