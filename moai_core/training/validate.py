"""Validation while a model is trained: the same batches of held-out text each time, each rank a share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moai_core import evaluate
from moai_core.data.loader import Loader
from moai_core.training.parallel import Ranks
from moai_core.training.stop import StopFlag


def validate(
    model: Any,
    loaders: Mapping[str | None, Loader],
    ranks: Ranks,
    *,
    batches: int,
    stop: StopFlag,
    agree: Callable[[], object],
    on_event: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """`evaluate.summary` (loss in nats a token, perplexity, bits per byte, counts) over all loaders and ranks, with
    `sets`, one a name, where loaders have names.

    batches: of each loader, over all ranks; at most one pass. stop: ends a loader's share early; `agree`, called after
    each loader on every rank, then raises on all of them.
    """
    sums: dict[str | None, list[float]] = {}
    for name, loader in loaders.items():
        share = loader.once(-(-batches // ranks.world))
        found = evaluate.evaluate(
            model, _until(stop, share), device=ranks.device, autocast=ranks.autocast, on_event=on_event
        )
        agree()
        sums[name] = ranks.sum(found["nats"], found["tokens"], found["bytes"])
    nats, tokens, size = (sum(part) for part in zip(*sums.values(), strict=True))
    valid = evaluate.summary(nats, int(tokens), int(size))
    if any(name is not None for name in sums):
        valid["sets"] = {name or "": evaluate.summary(n, int(t), int(b)) for name, (n, t, b) in sums.items()}
    return valid


def _until(stop: StopFlag, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches, fewer once `stop` was asked for."""
    for batch in batches:
        if stop:
            return
        yield batch
