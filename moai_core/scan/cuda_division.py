"""How the scan's kernels (`moai_core.scan.cuda`) divide a call among the GPU's blocks and warps: from the shape and the
GPU alone, so that the same call has the same bits."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Division(NamedTuple):
    """warps that share the states of 32 channels, a team; teams of a block, which take its tiles in turn; steps of a
    tile, which is also the distance of the kept states; tiles of a segment of time, and segments of a row; bytes of
    shared memory a block; whether a segment waits for its neighbour's result instead of finding it in a pass of its
    own."""

    warps: int
    teams: int
    tile: int
    span: int
    segments: int
    shared: int
    chained: bool

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps * self.teams


@lru_cache(maxsize=1024)
def divide(
    index: int, direction: str, size: int, states_size: int, batch: int, length: int, channels: int, states: int
) -> Division:
    """How much of a call a block, a warp and a thread do; from the shape and the GPU alone, so that the same call has
    the same bits. Raises LookupError where no block fits the GPU's shared memory.

    A row's 32 channels are one block's. Rows enough: a block is a team of two warps, each with half of the states, and
    a multiprocessor holds several. Where there are more backward blocks than the GPU holds, segments of a row follow
    one another as blocks of their own, so that no multiprocessor is left over with a whole row. Fewer rows: a block has
    several teams. Fewer still: time is cut into segments, too, which costs a pass of its own (`scan_summary`).
    """
    properties = torch.cuda.get_device_properties(index)
    limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    processors: int = properties.multi_processor_count
    tile = tile_of(states)
    tiles, blocks = -(-length // tile), batch * blocks_of(channels)
    warps = _warps(direction, states)

    def shared(teams: int) -> int:
        return shared_bytes(direction, warps, tile, size, states_size, states, teams)

    if (reason := too_large(index, direction, size, states_size, states)) is not None:
        raise LookupError(reason)
    # Teams that a multiprocessor holds: by registers, fewer where shared memory ends.
    places = max(1, min(16 // warps if direction == "forward" else 4, limit // (shared(1) + 1024)))
    if direction == "backward" and blocks > places * processors:
        teams, chained = 1, True
        held = places * processors
        segments = min(range(1, max(1, min(6, tiles // 8)) + 1), key=lambda n: -(-blocks * n // held) / n + n / 100)
    else:
        sizes = [n for n in (1, 2, 4, 8) if n <= min(places, tiles) and shared(n) <= limit]
        teams, segments = _fill(processors, places, warps, blocks, tiles, sizes, _COSTS[direction])
        chained = False
    span = -(-tiles // segments)
    if segments > 1:
        span += span % 2  # scan_summary's tiles are twice as long
    segments = -(-tiles // span)
    return Division(warps, teams, tile, span, segments, shared(teams), chained and segments > 1)


class _Costs(NamedTuple):
    """By measurement on an H100: how much faster a scheduler is with twice the warps, where it isn't full yet (a power
    of 2: 0 for not at all, 1 for twice as fast); what passing states from team to team multiplies the time by, and what
    a pass before does (docs/LOG.md)."""

    gain: float
    relay: float
    summary: float


_COSTS = {"forward": _Costs(0.2, 1.15, 1.5), "backward": _Costs(0.5, 1.02, 1.2)}
_SCHEDULERS = 4  # of a multiprocessor


def _fill(
    processors: int, places: int, warps: int, blocks: int, tiles: int, sizes: list[int], costs: _Costs
) -> tuple[int, int]:
    """(teams of a block, segments of a row) that take the least time by a rough count."""

    def time(count: int, teams: int) -> float:
        """Of a multiprocessor with so many blocks: that of its fullest scheduler, for a tile of each of its warps."""
        most = -(-count * teams * warps // _SCHEDULERS)
        return most * (places * warps / _SCHEDULERS / most) ** costs.gain if most else 0.0

    def cost(teams: int, segments: int) -> float:
        room = max(1, places // teams)  # blocks of a multiprocessor
        rounds, rest = divmod(blocks * segments, room * processors)
        found = (rounds * time(room, teams) + time(-(-rest // processors), teams)) / (teams * segments)
        return found * (costs.relay if teams > 1 else 1.0) * (costs.summary if segments > 1 else 1.0)

    def cuts(teams: int) -> int:
        return max(1, min(8 * processors // (blocks * teams), tiles // max(4, teams)))

    return min(((n, k) for n in sizes for k in {1, cuts(n)}), key=lambda both: (cost(*both), both))


def too_large(index: int, direction: str, size: int, states_size: int, states: int) -> str | None:
    """Why not even a block of one team fits the GPU, or None. Plain arithmetic: `torch.compile` looks into it."""
    limit = torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]
    need = shared_bytes(direction, _warps(direction, states), tile_of(states), size, states_size, states)
    return f"it needs {need} bytes of shared memory a block, and this GPU has {limit}" if need > limit else None


def _warps(direction: str, states: int) -> int:
    """Of a team; as few as leave a thread no more states than its registers hold."""
    return 4 if direction == "forward" and states > 64 else 2


def tile_of(states: int) -> int:
    """Steps of a tile: fewer where a tile of many states would fill the shared memory."""
    return 16 if states <= 32 else 8


def shared_bytes(
    direction: str, warps: int, tile: int, size: int, states_size: int, states: int, teams: int = 1
) -> int:
    """Shared memory of a block of scan_forward.cu, scan_summary.cu or scan_backward.cu, which check that it is
    enough."""
    wide, narrow, marks = 32 * tile * 4, 32 * tile * size, tile * 4 + 16
    if direction == "summary":
        group = min(states, 8)
        return 2 * (3 * narrow + tile * group * states_size + marks) + group * tile * 4
    both = tile * (2 * states + 16 // states_size) * states_size  # B and C of a tile
    relay = teams * states * 256 if teams > 1 else 256
    if direction == "forward":
        pool = 2 * (3 * narrow + both + marks) + (2 + warps) * wide + 2 * states * (tile + 4) * 4
        return teams * pool + relay + (states if teams > 1 else 1) * 128
    slot = 4 * narrow + both + states * 32 * (4 if size == 4 else 2) + marks
    groups = min(states // warps, 8) * tile * 64  # sums over lanes on their way
    slopes = 2 * wide if size == 2 else 16
    pool = 2 * slot + 3 * wide + slopes + warps * max(3 * wide, groups) + 2 * states * (tile + 4) * 4 + states * 128
    carry, rates = 1 if teams > 1 else states, states if states <= 32 else 1
    return teams * pool + relay + (carry + rates) * 128 + 16


def blocks_of(channels: int) -> int:
    """Blocks that share a row's channels, 32 each."""
    return -(-channels // 32)
