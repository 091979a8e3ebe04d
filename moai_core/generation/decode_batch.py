"""Which engine decodes, and the batch of the fast one: `decode.Decoder` behind the face of `engine.Batch`.

The GPU is one step ahead: while it makes the next token of every row, the host looks at the last one (text, stop
strings, end of the answer). A row that turns out to be done has then made one token too many, which nobody sees; its
state is the one before that token, for the decoder still has it.

Engines: `graph`, where `decode.why_not` doesn't refuse the model, and `plain`, the model itself (engine.Batch). A row
that wants log-probabilities needs its logits on the host and goes the plain way, beside the others. Stop strings, text
streaming and Ctrl-C are the host's and work with both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moai_core.errors import NonFiniteError, UsageError
from moai_core.generation import decode, engine
from moai_core.model.state import MoaiState

ENGINES = ("auto", "graph", "plain")


def pick(model: Any, wanted: str = "auto") -> str:
    """`graph` or `plain`. Raises UsageError for an unknown name and where `graph` was named but can't run."""
    if wanted not in ENGINES:
        raise UsageError(f"unknown engine {wanted!r}", hint=f"choose one of: {', '.join(ENGINES)}")
    if wanted == "plain":
        return "plain"
    why = decode.why_not(model)
    if why is not None and wanted == "graph":
        raise UsageError(f"engine 'graph' can't be used here: {why}", hint="--engine auto lets moai choose")
    return "graph" if why is None else "plain"


def describe(model: Any, wanted: str = "auto") -> str:
    """Which engine runs, and why not the other, in one line."""
    if pick(model, wanted) == "graph":
        return "graph: fused kernels, a CUDA graph a step, sampling on the GPU"
    return "plain: " + ("named" if wanted == "plain" else f"graph can't be used here, {decode.why_not(model)}")


def make(model: Any, vocabulary_size: int, wanted: str = "auto", *, rows: int = 1) -> engine.Batch | Batch:
    """An empty batch of the engine wanted, for about so many rows."""
    if pick(model, wanted) == "plain":
        return engine.Batch(model)
    return Batch(model, decode.decoder(model, vocabulary_size), rows)


class Batch:
    """As `engine.Batch`. Rows stand in the decoder's first places, without gaps when a step begins."""

    def __init__(self, model: Any, decoder: decode.Decoder, rows: int = 1) -> None:
        self.decoder = decoder
        decoder.reserve(min(rows, decoder.most))
        self.most = decoder.most
        self._plain = engine.Batch(model)
        self._rows: list[engine.Row] = []
        # Of each row: how many tokens its state at `decoder.turn` has read.
        self._read: dict[int, int] = {}
        self._flying: tuple[list[engine.Row], int, Callable[[], object]] | None = None

    def __len__(self) -> int:
        return sum(not row.done for row in self._rows) + len(self._plain)

    @torch.inference_mode()
    def add(self, row: engine.Row, logits: Tensor, state: MoaiState) -> None:
        """A row whose prompt is read: logits (V,) after it, and its state."""
        if row.answer.logprobs is not None:
            self._plain.add(row, logits, state)
            return
        row.start_decoding()
        row.take(logits)
        row.state = state
        if row.done:
            return
        if len(self._rows) >= self.most:
            self._close_gaps()
        place = len(self._rows)
        assert place < self.most, f"at most {self.most} rows at a time"
        self.decoder.reserve(place + 1)
        sampler = row.sampler
        self.decoder.put(place, state, row.answer.tokens[-1], row.settings, sampler.seed, sampler.draws)
        if sampler.seen is not None:
            self.decoder.mark(place, sampler.seen)
        self._rows.append(row)
        self._read[id(row)] = int(state.seen[0])

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row. Raises NonFiniteError."""
        if len(self._plain):
            self._plain.step()
        if self._flying is None and not self._launch():
            return
        ahead, self._flying = self._flying, None
        assert ahead is not None
        self._launch(ahead[0])
        self._look(*ahead)

    def _launch(self, before: list[engine.Row] | None = None) -> bool:
        """Start a step for the rows there are, if any needs it. before: rows whose last token nobody has seen yet."""
        unseen = set() if before is None else {id(row) for row in before}
        # A row that ends by its length with a token that is already on its way needs no more.
        wanted = [
            row
            for row in self._rows
            if not row.done and len(row.answer.tokens) + (id(row) in unseen) < row.settings.max_new_tokens
        ]
        if not wanted:
            return False
        self._close_gaps()
        turn = self.decoder.step(len(self._rows))
        self._flying = (list(self._rows), turn, _mark(self.decoder.device))
        return True

    def _close_gaps(self) -> None:
        """Rows that are done leave; the last ones take their places."""
        rows = self._rows
        place = 0
        while place < len(rows):
            if not rows[place].done:
                place += 1
                continue
            self._read.pop(id(rows[place]), None)
            last = rows.pop()
            if place < len(rows):
                if not last.done:
                    self.decoder.move(len(rows), place)
                rows[place] = last

    def _look(self, rows: list[engine.Row], turn: int, wait: Callable[[], object]) -> None:
        """The tokens that a step has chosen for the rows it was started with."""
        wait()
        tokens = self.decoder.host[turn, : len(rows)].tolist()
        for row, token in zip(rows, tokens, strict=True):
            if row.done:
                continue
            if token < 0:
                raise NonFiniteError(
                    "the model's logits are not finite",
                    hint="the weights are damaged or the precision is too low: verify the checkpoint, or try another "
                    "--dtype",
                )
            self._read[id(row)] += 1
            row.sampler.count(token)
            row.accept(token)
            if row.done:
                self._keep_state(row, self._rows, 1 - turn)

    def _keep_state(self, row: engine.Row, places: list[engine.Row], turn: int) -> None:
        row.state = self.decoder.state(places.index(row), self._read[id(row)], turn)

    @torch.inference_mode()
    def close(self, reason: str = "interrupted") -> None:
        """End every row that is still being decoded; its last token was not read by the model, as for any row."""
        self._plain.close(reason)
        started, turn = ([], 0) if self._flying is None else self._flying[:2]
        for row in self._rows:
            if row.done:
                continue
            # What a step under way writes belongs to tokens that nobody has seen; it leaves alone what it reads.
            if row in started:
                self._keep_state(row, started, turn)
            else:
                self._keep_state(row, self._rows, self.decoder.turn)
            row.finish(reason)
        self._rows, self._flying = [], None


def _mark(device: torch.device) -> Callable[[], object]:
    """A function that waits until all that was started on the GPU so far is done."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
