"""Choosing the next token: settings, the filtered distribution, and the draw.

What: `Settings` holds and checks what a user may set for a row; `Sampler` turns one row of logits into one token.
The filters are those of transformers' `LogitsProcessor`s, applied in its order (repetition penalty over prompt and
answer, temperature, top-k, top-p, min-p), so a setting means here what it means there.
Why not transformers' own: they work on a whole batch with one setting and draw from one generator, so a row would
get other tokens in another batch. Here each row has its own settings and its own stream of random numbers: draw n of
seed s is a pure function of (s, n) (Philox, a counter-based generator), which also lets a saved session continue
exactly.
Left out: beam search, contrastive search, logit bias, grammars.

Sources: temperature and top-k (Fan et al. 2018, arXiv 1805.04833), top-p (Holtzman et al. 2020, arXiv 1904.09751),
min-p (Nguyen et al. 2024, arXiv 2407.01082), repetition penalty (Keskar et al. 2019, arXiv 1909.05858), Philox
(Salmon et al. 2011).

Shapes: V vocabulary, S tokens that survive the filters.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moai_core.errors import NonFiniteError, UsageError

MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_STOP_LENGTH = 1000


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _is_stop(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) <= MAX_STOPS
        and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in value)
    )


# Each setting: is the value right, and what would be.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: _is_int(v) and v >= 1, "a whole number >= 1"),
    "temperature": (lambda v: _is_number(v) and v >= 0, "a number >= 0 (0 takes the likeliest token)"),
    "top_k": (lambda v: _is_int(v) and v >= 0, "a whole number >= 0 (0 switches it off)"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number > 0 and <= 1 (1 switches it off)"),
    "min_p": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1 (0 switches it off)"),
    "repetition_penalty": (lambda v: _is_number(v) and v > 0, "a number > 0 (1 switches it off)"),
    "seed": (lambda v: v is None or (_is_int(v) and 0 <= v < 2**64), "a whole number from 0 to 2**64 - 1"),
    "stop": (_is_stop, f"a text or a list of up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters"),
    "logprobs": (
        lambda v: v is None or (_is_int(v) and 0 <= v <= MAX_LOGPROBS),
        f"a whole number from 0 to {MAX_LOGPROBS}",
    ),
}


@dataclass(frozen=True)
class Settings:
    """How one row is generated. Raises UsageError for a value that makes no sense.

    max_new_tokens: at most so many tokens.  temperature: 0 is greedy.  top_k, top_p, min_p, repetition_penalty: as
    in transformers. seed: of the row's random numbers; None picks one, which the `Completion` names.  stop: texts
    that end the answer; not part of it. logprobs: None, or how many alternatives to report beside each token (0: the
    token alone); natural logarithms of the model's own distribution, before penalty, temperature and filters.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_settings({name: getattr(self, name) for name in SETTINGS})
        object.__setattr__(self, "stop", tuple(self.stop))


SETTINGS = tuple(field.name for field in fields(Settings))


def check_settings(values: Mapping[str, Any], label: Callable[[str], str] = str) -> None:
    """Raise UsageError for the first of `values` (setting -> value) that is wrong; `label` says how the user wrote a
    setting's name (a flag, or file:line and key)."""
    for name, value in values.items():
        right, would_be = _RULES[name]
        if name == "stop" and isinstance(value, str):
            value = [value]
        if not right(value):
            raise UsageError(f"{label(name)} must be {would_be} (got {_shown(value)})")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def new_seed() -> int:
    """A fresh seed, short enough to be typed again."""
    return secrets.randbelow(2**32)


def uniform(seed: int, n: int) -> float:
    """Number n of the stream `seed`, in [0, 1) with 53 random bits: a pure function of both."""
    raw = np.random.Philox(key=seed, counter=n).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def distribution(logits: Tensor, settings: Settings, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens that survive the filters and their probabilities.

    logits (V,) of any float type; seen (V,) bool, True where a token occurred in prompt or answer (needed for
    repetition_penalty != 1). Returns ids (S,) int64 and probabilities (S,) float64 that sum to 1. Temperature 0
    leaves the likeliest token alone.
    Raises NonFiniteError when the logits hold NaN or +inf.
    """
    scores = logits.detach().to(torch.float64)
    if settings.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs to know the tokens seen"
        penalty = settings.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    best, winner = scores.max(dim=0)
    if not torch.isfinite(best):
        raise NonFiniteError(
            f"the model's logits are not finite (largest: {best.item()})",
            hint="the weights are damaged or the precision is too low: verify the checkpoint, or try another --dtype",
        )
    if settings.temperature == 0:
        return winner[None], torch.ones(1, dtype=torch.float64, device=scores.device)
    # Relative to the best score nothing overflows, however low the temperature.
    scores = (scores - best) / settings.temperature
    ids = torch.arange(scores.numel(), device=scores.device)
    if 0 < settings.top_k < scores.numel():
        kept = scores >= scores.topk(settings.top_k).values[-1]
        ids, scores = ids[kept], scores[kept]
    probs = scores.exp()
    probs /= probs.sum()
    if settings.top_p < 1:
        ids, probs = _nucleus(ids, probs, settings.top_p)
    if settings.min_p > 0:
        kept = probs >= settings.min_p * probs.max()
        ids, probs = ids[kept], probs[kept]
    return ids, probs / probs.sum()


def _nucleus(ids: Tensor, probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens up to the one with which their mass reaches top_p (Holtzman et al. 2020)."""
    order = torch.empty(0)
    # A peaked distribution needs few tokens: sorting a whole vocabulary of 128k costs more than a small model's step.
    for count in (1024, probs.numel()):
        count = min(count, probs.numel())
        top, order = probs.topk(count)
        before = top.cumsum(0) - top
        if count == probs.numel() or before[-1] >= top_p:
            break
    kept = before < top_p
    return ids[order[kept]], top[kept]


class Sampler:
    """One row's choice of tokens: settings, the tokens seen, and how many random numbers it has drawn."""

    def __init__(
        self, settings: Settings, vocab_size: int, prompt: Iterable[int] = (), *, draws: int = 0, device: Any = "cpu"
    ):
        self.settings = settings
        self.seed = new_seed() if settings.seed is None else settings.seed
        self.draws = draws
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.as_tensor(list(prompt), dtype=torch.int64, device=device)] = True

    def pick(self, logits: Tensor) -> int:
        """The next token for logits (V,); counts as seen from now on. Raises NonFiniteError."""
        ids, probs = distribution(logits, self.settings, self.seen)
        token = int(ids[0])
        if ids.numel() > 1:
            total = probs.cumsum(0)
            at = torch.searchsorted(total, uniform(self.seed, self.draws) * float(total[-1]), right=True)
            token = int(ids[min(int(at), ids.numel() - 1)])
        self.count(token)
        return token

    def count(self, token: int) -> None:
        """A token is chosen, here or by a kernel with these settings: it is seen, and a number is drawn."""
        if self.settings.temperature > 0:
            self.draws += 1
        if self.seen is not None:
            self.seen[token] = True


def log_probabilities(logits: Tensor, token: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """log p(token) under logits (V,) as the model gave them, and the likeliest `alternatives` as (token, log p),
    best first."""
    logp = torch.log_softmax(logits.detach().to(torch.float64), dim=0)
    top = logp.topk(min(alternatives, logp.numel()))
    return float(logp[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
