"""How long a piece of work takes on a device, and what a sample of such times says; every benchmark measures with it.

On a GPU the times are CUDA's: an event before and one after the call. While the host still launches the call, the GPU
reads a buffer larger than its L2: so the host's time doesn't show in the figure (it is kept apart, as `host`), and no
call finds what the one before it left in the cache. On a CPU the time is the wall's. Whatever is compared takes turns
in one process, so that clocks and other programs fall on all alike.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from moai_core import device as devices

Work = Callable[[], object]

# A GPU waits at most so long for the host (seconds): a loop of thousands of launches never gets ahead of it anyway.
_MAX_LEAD = 0.02
# What the inputs of a CPU's calls are rotated through: more than a core's share of the last cache.
_CPU_CACHE = 1 << 25
# Measured calls fill about so many seconds a piece of work; slow work gets the fewest calls that have quartiles.
SHARE, _FEWEST, _MOST = 1.0, 3, 50


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of the seconds that a call took, over `repeats` calls; `host`: until it had been launched
    (a GPU's only)."""

    median: float
    low: float
    high: float
    repeats: int
    host: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, in milliseconds."""
        found = {"median_ms": self.median * 1e3, "low_ms": self.low * 1e3, "high_ms": self.high * 1e3}
        return {**found, "repeats": self.repeats, **({} if self.host is None else {"host_ms": self.host * 1e3})}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third), by linear interpolation between the sorted values; one value is all three."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Clock:
    """Measures single calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.cache = _CPU_CACHE
        if self.cuda:
            self.cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._filling = torch.zeros(2 * self.cache // 4, device=device)
            self._filler = 0.0
            times = [self(lambda: self._filling.amax())[0] for _ in range(5)]
            self._filler = statistics.median(times)

    def __call__(self, work: Work, lead: float = 0.0) -> tuple[float, float]:
        """(seconds on the device, seconds until the call returned to the host). lead: seconds for which a GPU is kept
        busy before the work, so that it finds all its launches waiting."""
        if not self.cuda:
            begin = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - begin
            del result  # what a call makes is freed outside of the measurement
            return seconds, seconds
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        for _ in range(1 + int(min(lead, _MAX_LEAD) / self._filler) if self._filler else 1):
            self._filling.amax()
        first.record()
        begin = time.perf_counter()
        result = work()
        host = time.perf_counter() - begin
        last.record()
        last.synchronize()
        del result
        return first.elapsed_time(last) / 1e3, host


def take_turns(
    works: Mapping[str, Work],
    clock: Clock,
    *,
    repeats: int | None = None,
    warmup: Mapping[str, int] | None = None,
    share: float = SHARE,
    on_call: Callable[[str], None] = lambda name: None,
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, host seconds) of every measured call of each, after unmeasured calls. Each takes a turn in every round,
    in an order drawn anew, so that none always follows the same other.

    repeats: measured calls of each; None lets the time of the first call decide (`enough`). warmup: unmeasured calls,
    by name; else two on a GPU and one on a CPU. Work that a GPU has no memory for gives an empty list.
    """
    idle = {name: (warmup or {}).get(name, 2 if clock.cuda else 1) for name in works}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    wanted = dict.fromkeys(works, repeats or 1)
    lead, order = dict.fromkeys(works, 0.0), random.Random(0)
    with steady():
        for turn in itertools.count():
            due = [name for name in works if turn < idle[name] + wanted[name]]
            if not due:
                return found
            order.shuffle(due)
            for name in due:
                gc.collect()
                on_call(name)
                try:
                    seconds, host = clock(works[name], lead[name])
                except torch.OutOfMemoryError:
                    found[name], wanted[name], idle[name] = [], 0, 0
                    torch.cuda.empty_cache()
                    continue
                lead[name] = 1.5 * host
                if turn >= idle[name]:
                    found[name].append((seconds, host))
                if repeats is None and turn == max(0, idle[name] - 1):
                    wanted[name] = enough(seconds, share)
    raise AssertionError


def enough(seconds: float, share: float = SHARE) -> int:
    """How many calls of such a length are measured: what fits into `share` seconds, within limits."""
    return int(min(_MOST, max(_FEWEST, share / max(seconds, 1e-9))))


def calls(seconds: float, repeats: int | None, share: float = SHARE) -> int:
    """How many calls of such a length are made, unmeasured ones included: a call longer than a second needs none to
    warm up."""
    return (repeats or enough(seconds, share)) + (seconds <= 1)


@contextmanager
def steady() -> Iterator[None]:
    """Inside, garbage is collected by hand only, and quickly: what is alive now is left alone."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def summary(calls: Sequence[tuple[float, float]], clock: Clock) -> Timing:
    """The timing of calls as `take_turns` gives them."""
    low, median, high = quartiles([seconds for seconds, _ in calls])
    host = statistics.median(host for _, host in calls) if clock.cuda else None
    return Timing(median, low, high, len(calls), host)


@dataclass(frozen=True)
class Case:
    """One of several things to compare at a length L.

    make(L) prepares its inputs and returns the call to measure. order: its time grows at most as L to this power.
    memory: bytes a token that it needs at once, 0 when not known.
    """

    name: str
    make: Callable[[int], Work]
    order: float = 1.0
    memory: float = 0.0


@dataclass
class Compared:
    """What `compare` found: name -> timing, or the sentence why that case was left out."""

    timings: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def compare(
    cases: Sequence[Case],
    length: int,
    clock: Clock,
    *,
    limit: float,
    repeats: int | None = None,
    share: float = SHARE,
    known: Mapping[str, float] | None = None,
    on_call: Callable[[str], None] = lambda name: None,
) -> Compared:
    """Measures all cases at one length, taking turns.

    limit: seconds that all calls of one case may take together; what would take longer, or wouldn't fit into memory,
    is left out with the reason. known: seconds that a call should take, by name; else a call at a fraction of the
    length tells. share: seconds that the measured calls of one case fill, if that is more than a few calls.
    """
    result = Compared()
    works: dict[str, Work] = {}
    warmup: dict[str, int] = {}
    for case in cases:
        why = too_large(case, length, clock.device)
        try:
            if why is None:
                on_call(case.name)
                seconds = (known or {}).get(case.name) or estimate(case, length, clock, limit)
                count = calls(seconds, repeats, share)
                if count * seconds > limit:
                    why = f"a call would take about {words(seconds)} ({count} calls, limit {limit:.0f} s)"
                elif seconds > 1:
                    warmup[case.name] = 0
            if why is None:
                works[case.name] = case.make(length)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            why = "out of memory"
        if why is not None:
            result.left_out[case.name] = why
    taken = take_turns(works, clock, repeats=repeats, warmup=warmup, share=share, on_call=on_call)
    for name, measured in taken.items():
        if measured:
            result.timings[name] = summary(measured, clock)
        else:
            result.left_out[name] = "out of memory"
    return result


def too_large(case: Case, length: int, device: torch.device) -> str | None:
    """Why a case doesn't fit into a CPU's free memory, where the system kills what asks for more."""
    need, free = case.memory * length, devices.memory()[1]
    if device.type == "cpu" and free and need > 0.7 * free:
        return f"would need about {need / 1e9:.1f} GB of memory ({free / 1e9:.1f} GB are free)"
    return None


def estimate(case: Case, length: int, clock: Clock, limit: float) -> float:
    """Seconds that a call at this length would take at most, judged by shorter ones; 0 for a short length.

    A sixteenth of the length tells enough where the time it foretells is far from `limit`; else a quarter is asked.
    """
    seconds = 0.0
    for part in (length // 16, length // 4):
        if part < 16 or 4 * seconds * 4**-case.order > limit:
            break
        work = case.make(part)
        clock(work)  # compiles what is compiled at first use
        seconds = min(clock(work)[0] for _ in range(2)) * (length / part) ** case.order
        if seconds < limit / 20:
            break
    return seconds


def words(seconds: float) -> str:
    """0.012 -> 12 ms; 75 -> 75 s; 600 -> 10 min."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 180 else f"{seconds / 60:.3g} min"


def sets_of(size: int, clock: Clock, *, most: int = 8) -> int:
    """How many sets of inputs of `size` bytes are rotated through, so that none is still in the cache when its turn
    comes again."""
    return max(1, min(most, -(-2 * clock.cache // max(1, size))))


class Rotation:
    """Sets of inputs, of which every call takes the next, whoever calls: two that are compared never read the same
    set one after the other, which would give the second a warm cache."""

    def __init__(self, sets: Sequence[Any]) -> None:
        self.sets = sets
        self._following = itertools.cycle(sets)

    def calls(self, function: Callable[[Any], object]) -> Work:
        """The call of `function` on the next set."""
        return lambda: function(next(self._following))
