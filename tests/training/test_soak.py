"""A long run (MOAI_SOAK_STEPS): file descriptors stay flat, memory grows by at most 1 MB a thousand steps."""

from __future__ import annotations

import os

import pytest

from moai_core.training import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")]


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_descriptors_and_memory_stay_flat(tiny, tmp_path):
    steps = int(os.environ.get("MOAI_SOAK_STEPS", "4000"))
    seen = []

    def watch(event):
        if event["event"] == "checkpoint":
            seen.append((event["step"], len(os.listdir("/proc/self/fd")), resident()))

    recipe = tiny(f"train.steps={steps}", "train.save_every=10", "train.eval_every=100", "train.sample_every=500")
    train(recipe, output=tmp_path / "run", on_event=watch)
    warm = [row for row in seen if row[0] >= steps // 4]
    assert len(seen) == steps // 10
    assert max(fds for _, fds, _ in warm) - min(fds for _, fds, _ in warm) <= 1
    half = len(warm) // 2
    first, second = (sorted(size for _, _, size in part)[half // 2] for part in (warm[:half], warm[half:]))
    grown = (second - first) / (1 << 20) / ((warm[-1][0] - warm[0][0]) / 2 / 1000)
    assert grown <= 1.0, f"{grown:.2f} MB a thousand steps"
