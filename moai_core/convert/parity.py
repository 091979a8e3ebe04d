"""The check at a conversion's end: the same token ids through the source's runtime and the target's, in fp32.

The prompt is random ids (fixed seed); 64 greedy tokens of the one follow it, and both read the whole. So every logit is
compared, and the other's next token at each of the 64 steps, also after the two would have parted. One model is in
memory at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moai_core import device
from moai_core.convert.source import OnEvent, Options, Parity, Runtime, Source, Unavailable
from moai_core.errors import CheckpointError

PROMPT, GREEDY = 32, 64
# fp32 pairs with transformers; times the logits' largest magnitude where that is above 1, for fp32 is relative.
TOLERANCE = 1e-4
# Of the positions, this part must keep its likeliest token when weights were rounded to 16 bits.
ROUNDED_ARGMAX = 0.75
# Of a model in fp32: what a runtime needs while it loads and runs, beside the weights.
_FACTOR, _REST = 1.2, 1 << 30

Open = Callable[[], Runtime]


def compare(first: Open, second: Open, *, vocab: int) -> Parity:
    """Runs both on ids below `vocab` (the vocabulary that both have). Raises Unavailable, and whatever they raise."""
    generator = torch.Generator().manual_seed(20)
    ids = torch.randint(vocab, (min(PROMPT, 4 * vocab),), generator=generator).tolist()
    one = first()
    try:
        ids = ids + _greedy(one, ids, vocab)
        left, name = one.logits(ids)[:, :vocab], one.name
    finally:
        one.close()
    two = second()
    try:
        right, other = two.logits(ids)[:, :vocab], two.name
    finally:
        two.close()
    if left.shape != right.shape:
        raise CheckpointError(f"{name} gives logits of shape {tuple(left.shape)}, {other} {tuple(right.shape)}")
    # NaN on either side is a failure, never an agreement
    delta = torch.nan_to_num((left - right).abs(), nan=torch.inf).max()
    same = left.argmax(-1) == right.argmax(-1)
    return Parity(
        runtimes=(name, other),
        positions=len(ids),
        max_delta=float(delta),
        spread=float(left.std()),
        largest=float(left.abs().max()),
        argmax=int(same.sum()),
        greedy=int(same[-GREEDY - 1 : -1].sum()),
        tokens=GREEDY,
    )


def _greedy(runtime: Any, ids: list[int], vocab: int) -> list[int]:
    if hasattr(runtime, "greedy"):
        return runtime.greedy(ids, GREEDY, vocab)
    made: list[int] = []
    for _ in range(GREEDY):
        made.append(int(runtime.logits(ids + made)[-1, :vocab].argmax()))
    return made


def judge(parity: Parity, options: Options) -> str | None:
    """Why this comparison fails, or None. Rounded weights (outtype f16, bf16) are judged by the likeliest tokens."""
    if options.outtype is not None:
        if parity.argmax < ROUNDED_ARGMAX * parity.positions:
            return f"only {parity.argmax} of {parity.positions} likeliest tokens agree"
        return None
    limit = TOLERANCE * max(1.0, parity.largest)
    if not parity.max_delta <= limit:
        return f"logits differ by {parity.max_delta:.2e}, at most {limit:.1e} is allowed"
    return None


def _hint(options: Options) -> str:
    if options.outtype in (None, "f32"):
        return "please report it; --no-check converts without comparing"
    return f"{options.outtype} rounds more than this model bears: take a wider --outtype, or keep it with --no-check"


def _not_finite(source: Source) -> str | None:
    """The first tensor that isn't, where the model's numbers aren't: a difference from nothing says nothing."""
    return next((name for name, lazy in source.tensors.items() if not torch.isfinite(lazy.load().float()).all()), None)


def fits(source: Source) -> str | None:
    """Why a model of this size can't run here in fp32, or None."""
    numbers = sum(torch.Size(lazy.shape).numel() for lazy in source.tensors.values())
    need, free = int(numbers * 4 * _FACTOR) + _REST, device.memory()[1]
    if need > free:
        return f"it needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
    return None


def check(
    source: Source,
    target: Path,
    ends: Sequence[Open],
    judge: Callable[[Parity, Options], str | None],
    options: Options,
    *,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """The comparison of the two `ends` as a report: the numbers of `Parity`, or `{"skipped": why}`.

    Raises CheckpointError where it fails: what was written must not be kept then.
    """
    if why := fits(source):
        return {"skipped": why}
    if on_event is not None:
        on_event({"event": "check"})
    begun = time.perf_counter()
    try:
        parity = compare(*ends, vocab=source.config["vocab_size"])
    except Unavailable as exc:
        return {"skipped": str(exc)}
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as exc:
        # Other people's code on other people's files: what it raises is its verdict.
        raise CheckpointError(
            f"{target}: the check failed, nothing was kept: {type(exc).__name__}: {' '.join(str(exc).split())[:200]}",
            hint="--no-check converts without comparing",
        ) from exc
    if math.isnan(parity.largest) and (broken := _not_finite(source)):
        raise CheckpointError(
            f"{source.path}: {broken} holds NaN or infinity, so nothing can be compared",
            hint="mend the model, or convert it as it is with --no-check",
        )
    if why := judge(parity, options):
        raise CheckpointError(
            f"{target}: the check failed, nothing was kept: {why} ({' and '.join(parity.runtimes)})",
            hint=_hint(options),
        )
    report = {**asdict(parity), "seconds": round(time.perf_counter() - begun, 2)}
    if on_event is not None:
        on_event({"event": "compared", **report})
    return report
