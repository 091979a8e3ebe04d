"""The part of `moai doctor` that computes: devices, scan backends, a numeric self-test against float64. Each finding
is a plain dict.

The self-test takes fresh random inputs, an odd length, packed documents, padding and a state to continue, and
compares every backend that doesn't refuse with the reference in float64: results, states and all gradients. What it
leaves out is speed, which the benchmarks measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moai_core import cuda, device, scan
from moai_core.scan import reference

# Relative norm error allowed against float64: the dtype's own rounding, grown by a recurrence of some dozens of steps.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
Finding = dict[str, Any]


def devices() -> list[Finding]:
    """This machine's CPU and CUDA GPUs."""
    return [one.to_dict() for one in (device.cpu(), *device.gpus())]


def backends(name: str) -> Iterator[Finding]:
    """Every backend on a device, in the order of preference: whether training on packed rows picks it, or why not; and
    which engine generates (a model may have reasons of its own: decode.why_not)."""
    where = torch.device(name)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    for op in ("scan", "conv"):
        picked = False
        for backend, reason in scan.explain(where, dtype, op=op, seq_idx=True):
            chosen = reason is None and not picked
            picked = picked or chosen
            why = None if chosen else reason or "one before it is picked"
            slow = chosen and scan.BACKENDS[backend] is reference
            yield {"device": name, "operation": op, "backend": backend, "picked": chosen, "why_not": why, "slow": slow}
    why = cuda.why_not(where)
    for engine, chosen in (("graph", why is None), ("plain", why is not None)):
        reason = None if chosen else why or "one before it is picked"
        found = {"operation": "decode", "backend": engine, "picked": chosen, "why_not": reason, "slow": False}
        yield {"device": name, **found}


def fallback(name: str) -> str | None:
    """One line where moai's kernels refuse a CUDA device."""
    return scan.fallback(name, torch.bfloat16)


def self_tests(name: str, seed: int) -> Iterator[Finding]:
    """Each backend that runs on a device, in fp32 and on a GPU in bf16: relative norm errors `forward` (results,
    states) and `backward` (gradients)."""
    where = torch.device(name)
    for dtype in (torch.float32, torch.bfloat16) if where.type == "cuda" else (torch.float32,):
        for backend in scan.BACKENDS:
            for op in ("scan", "conv"):
                needs = _possible(backend, where, dtype, op)
                if needs is not None:
                    yield _self_test(op, backend, where, dtype, seed, needs)


def _possible(backend: str, where: torch.device, dtype: torch.dtype, op: str) -> dict[str, bool] | None:
    """The most that a backend takes of a given state and packed documents; None when it doesn't run at all."""
    for state, seq_idx in ((True, True), (False, True), (True, False), (False, False)):
        if dict(scan.explain(where, dtype, op=op, state=state, seq_idx=seq_idx))[backend] is None:
            return {"state": state, "seq_idx": seq_idx}
    return None


def _self_test(
    op: str, backend: str, where: torch.device, dtype: torch.dtype, seed: int, needs: dict[str, bool]
) -> Finding:
    worst = {"forward": 0.0, "backward": 0.0}
    why = None
    try:
        for kind, got, want in _compare(op, backend, where, dtype, seed, **needs):
            error = float((got.detach().double().cpu() - want.detach()).norm() / want.detach().norm().clamp(min=1e-30))
            worst[kind] = max(worst[kind], error if error == error else math.inf)  # a NaN is no number to compare
    except Exception as exc:
        # A backend that can't even run is what this command is there to find.
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
    ok = why is None and all(error <= TOLERANCE[dtype] for error in worst.values())
    found = {
        "device": str(where),
        "backend": backend,
        "operation": op,
        "dtype": str(dtype).removeprefix("torch."),
        **needs,
        "seed": seed,
    }
    return {**found, **worst, "tolerance": TOLERANCE[dtype], "ok": ok, "why": why}


def _compare(
    op: str, backend: str, where: torch.device, dtype: torch.dtype, seed: int, *, state: bool, seq_idx: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(forward or backward, this backend's tensor, the float64 one) for every result and every gradient."""
    batch, length, channels, states, width = 2, 67, 48, 16, 4
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, wide: bool = False) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(torch.float32 if wide else dtype)

    number = torch.zeros(batch, length, dtype=torch.int32)
    number[0, 20:], number[1, 5:], number[1, 41:], number[1, -6:] = 1, 1, 2, -1
    u = draw(batch, length, channels)
    if op == "scan":
        A = -torch.exp(draw(channels, states, wide=True) / 2)
        B, C, D, bias = (
            draw(batch, length, states),
            draw(batch, length, states),
            draw(channels, wide=True),
            draw(channels, wide=True),
        )
        tensors = [u, draw(batch, length, channels), A, B, C, D, draw(batch, length, channels), bias]
        before = draw(batch, channels, states, wide=True)
    else:
        tensors = [u, draw(channels, 1, width), draw(channels)]
        before = draw(batch, channels, width - 1)
    weights = [draw(batch, length, channels).double(), draw(*before.shape).double()]

    def run(function: Any, device: torch.device, wide: bool, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [
            t.to(device, torch.float64 if wide else t.dtype).requires_grad_()
            for t in [*tensors, *([before] if state else [])]
        ]
        options |= {"state": inputs[len(tensors)]} if state else {}
        options |= {"seq_idx": number.to(device)} if seq_idx else {}
        results = function(*inputs[: len(tensors)], **options)
        loss = torch.stack([(r.double() * w.to(device)).sum() for r, w in zip(results, weights, strict=True)]).sum()
        return list(results), list(torch.autograd.grad(loss, inputs))

    want = run(getattr(reference, op), torch.device("cpu"), True)
    got = run(getattr(scan, op), where, False, backend=backend)
    for kind, ours, theirs in zip(("forward", "backward"), got, want, strict=True):
        yield from ((kind, a, b) for a, b in zip(ours, theirs, strict=True))
