"""One answer in the making: its settings, random numbers, text and stop strings, which no other answer has a part in.

A row knows no model and no engine: it is handed logits or tokens, one after the other, and says when it is done.
Shapes: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moai_core.generation.sampling import Sampler, Settings, log_probabilities
from moai_core.generation.text import Detokenizer, StopStrings, Vocabulary
from moai_core.model.state import MoaiState


@dataclass
class Completion:
    """One row's answer.

    text: without the stop string and without special tokens.  tokens: the ids chosen, with the one that ended the
    answer. finish_reason: `eos` (an end-of-text or end-of-turn token), `stop` (a stop string), `length`, or
    `interrupted`. seed: of the random numbers; the same seed and settings give the same answer.
    logprobs: if asked for, one {"token", "text", "logprob", "top": [...]} a token.
    prefill_seconds: reading the prompt; decode_seconds: from then to the last token, in whatever company.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    prompt_tokens: int = 0
    seed: int = 0
    logprobs: list[dict[str, Any]] | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def summary(self) -> str:
        """Counts, speed, how the answer ended and its seed, in one line."""
        speed = f"{len(self.tokens) / self.decode_seconds:.0f} tokens/s, " if self.decode_seconds else ""
        counts = f"{self.prompt_tokens} + {len(self.tokens)} tokens"
        return f"{counts}, {speed}ended by {self.finish_reason}, seed {self.seed}"


class Row:
    """One answer in the making."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: Settings,
        context: Sequence[int],
        *,
        draws: int = 0,
        device: Any = "cpu",
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """context: every token that the model has read or will read before the answer; draws: random numbers already
        used of this seed."""
        self.vocabulary = vocabulary
        self.settings = settings
        self.sampler = Sampler(settings, vocabulary.size, context, draws=draws, device=device)
        self.answer = Completion(
            seed=self.sampler.seed, prompt_tokens=len(context), logprobs=None if settings.logprobs is None else []
        )
        self.state: MoaiState | None = None
        self.done = False
        self._detokenizer = Detokenizer(vocabulary, context)
        # A stop string that names a special token never shows up in the text.
        self._stop_ids = {vocabulary.special[stop] for stop in settings.stop if stop in vocabulary.special}
        self._stops = StopStrings([stop for stop in settings.stop if stop not in vocabulary.special])
        self._on_text = on_text
        self._started = time.perf_counter()

    def start_decoding(self) -> None:
        """The prompt is read."""
        self.answer.prefill_seconds = time.perf_counter() - self._started
        self._started = time.perf_counter()

    def take(self, logits: Tensor) -> None:
        """Choose the next token from logits (V,) and see whether the answer is complete. Raises NonFiniteError."""
        # Ids that the tokenizer doesn't have (a vocabulary padded to a round number) mean nothing.
        logits = logits[: self.vocabulary.size]
        token = self.sampler.pick(logits)
        if self.answer.logprobs is not None:
            self.answer.logprobs.append(self._report(logits, token))
        self.accept(token)

    def accept(self, token: int) -> None:
        """The next token is chosen: see whether the answer is complete."""
        answer = self.answer
        answer.tokens.append(token)
        if token in self.vocabulary.eos:
            self.finish("eos")
        elif token in self._stop_ids:
            self.finish("stop")
        else:
            self._show(self._stops.add(self._detokenizer.add(token)))
            if self._stops.found is not None:
                self.finish("stop")
            elif len(answer.tokens) >= self.settings.max_new_tokens:
                self.finish("length")

    def finish(self, reason: str) -> None:
        """End the answer; text kept back for a stop string that never came is shown."""
        if self._stops.found is None:
            self._show(self._stops.rest())
        self.answer.finish_reason = reason
        self.answer.decode_seconds = time.perf_counter() - self._started if self.answer.tokens else 0.0
        self.done = True

    def _show(self, text: str) -> None:
        if text:
            self.answer.text += text
            if self._on_text is not None:
                self._on_text(text)

    def _report(self, logits: Tensor, token: int) -> dict[str, Any]:
        logprob, top = log_probabilities(logits, token, self.settings.logprobs or 0)

        def entry(id: int, value: float) -> dict[str, Any]:
            return {"token": id, "text": self.vocabulary.tokenizer.decode([id]), "logprob": value}

        return {**entry(token, logprob), "top": [entry(*pair) for pair in top]}
