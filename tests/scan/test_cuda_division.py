"""How the scan's kernels divide a call among a GPU's blocks: every tile once, and never more than the GPU has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from moai_core.scan.cuda_division import blocks_of, divide, too_large

# (multiprocessors, bytes of shared memory a block may have)
GPUS = {"h100": (132, 232448), "rtx-4090": (128, 101376), "small": (16, 101376)}
SHAPES = [(1, 1, 8), (1, 7, 4096), (1, 2048, 4096), (3, 333, 40), (2, 131072, 5120), (8, 2048, 4096), (70, 100, 8192)]


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    processors, memory = GPUS[request.param]
    properties = SimpleNamespace(multi_processor_count=processors, shared_memory_per_block_optin=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return properties


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("states", [8, 16, 32, 64])
def test_every_tile_once_and_no_more_than_the_gpu_has(gpu, direction, size, states):
    for batch, length, channels in SHAPES:
        shape = divide.__wrapped__(0, direction, size, size, batch, length, channels, states)
        tiles = -(-length // shape.tile)
        assert (shape.segments - 1) * shape.span < tiles <= shape.segments * shape.span
        assert shape.segments == 1 or shape.span % 2 == 0, "a summary's tiles are twice as long"
        assert shape.teams <= tiles and shape.shared <= gpu.shared_memory_per_block_optin
        assert shape.threads <= (512 if direction == "forward" else 256), "registers end there"
        assert not shape.chained or (shape.teams == 1 and shape.segments > 1 and direction == "backward")


def test_few_rows_get_teams_and_many_rows_none(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for direction, most in (("forward", 8), ("backward", 4)):
        one, many = (divide.__wrapped__(0, direction, 2, 2, rows, 2048, 4096, 16) for rows in (1, 8))
        assert (one.teams, one.segments, many.teams) == (most, 1, 1)
        half = divide.__wrapped__(0, direction, 2, 2, 4, 2048, 4096, 16)
        assert (half.teams, half.segments) == (1, 1), "more teams or segments were measured to be slower"
        few = divide.__wrapped__(0, direction, 2, 2, 1, 2048, 64, 16)
        assert few.segments > 1 and few.segments * blocks_of(64) * few.teams > 64


def test_teams_where_they_were_measured_to_be_faster(monkeypatch):
    """Forward on an H100: (rows, length, channels) -> the teams of the fastest division (docs/LOG.md)."""
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    fastest = {(2, 2048, 4096): 4, (3, 2048, 4096): 8, (4, 2048, 4096): 1, (6, 2048, 4096): 1, (8, 2048, 4096): 1}
    fastest |= {(5, 2048, 4096): 8, (4, 2048, 1536): 4, (2, 2048, 8192): 1, (1, 32768, 4096): 8}  # 5 rows: 4 is as fast
    found = {shape: divide.__wrapped__(0, "forward", 2, 2, *shape, 16) for shape in fastest}
    assert {shape: division.teams for shape, division in found.items()} == fastest
    assert {division.segments for division in found.values()} == {1}
    assert divide.__wrapped__(0, "forward", 2, 2, 1, 32768, 5120, 16).segments > 1


def test_states_that_do_not_fit_are_refused(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=80, shared_memory_per_block_optin=16 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    with pytest.raises(LookupError, match="bytes of shared memory a block, and this GPU has 16384"):
        divide.__wrapped__(0, "backward", 4, 4, 1, 32, 32, 128)


def test_torch_compile_looks_into_the_refusal(monkeypatch):
    """`scan` asks it in the middle of what is compiled."""

    class Properties(NamedTuple):
        shared_memory_per_block_optin: int = 232448

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())

    def double(x):
        return x * 2 if too_large(0, "backward", 2, 4, 16) is None else x

    x = torch.ones(3)
    assert torch.equal(torch.compile(double, fullgraph=True, backend="eager")(x), 2 * x)
