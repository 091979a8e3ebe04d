"""Mamba against attention over the length: what is compared, and what is left out when time runs out."""

from __future__ import annotations

import json

import pytest
import torch

from moai_core.bench import lengths, timing
from moai_core.bench.timing import Case
from moai_core.errors import StorageError, UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("last", "found"),
    [(16, [16]), (256, [256]), (300, [150, 300]), (1000, [250, 500, 1000]), (2048, [256, 512, 1024, 2048])],
)
def test_lengths_double(last, found):
    assert lengths.lengths_up_to(last) == found
    assert len(lengths.lengths_up_to(1 << 20)) <= 10 and lengths.lengths_up_to(1 << 20)[-1] == 1 << 20


@pytest.mark.parametrize("name", ["mamba block", "attention block"])
def test_blocks_are_layers_with_gradients_for_every_weight(name):
    torch.manual_seed(0)
    blocks = lengths.Blocks(16, timing.Clock(CPU), torch.float32, "reference")
    forward, both = (blocks.case(name, direction, 1.0).make(9)() for direction in ("forward", "forward+backward"))
    assert forward.shape == (1, 9, 16) and bool(forward.isfinite().all())
    x, *weights = both
    assert x.shape == (1, 9, 16) and len(weights) == len(blocks.weights[name])
    assert all(float(g.abs().sum()) > 0 for g in both)


def test_both_blocks_are_causal_and_as_wide():
    torch.manual_seed(0)
    blocks = lengths.Blocks(32, timing.Clock(CPU), torch.float32, "reference")
    x = torch.randn(1, 12, 32)
    for name, layer in blocks.layers.items():
        with torch.no_grad():
            whole = layer(inputs_embeds=x, use_cache=False).last_hidden_state
            part = layer(inputs_embeds=x[:, :7], use_cache=False).last_hidden_state
        assert (whole[:, :7] - part).norm() < 1e-5 * part.norm(), name
    ffn = {name: sum(p.numel() for p in w if 88 in p.shape) for name, w in blocks.weights.items()}
    assert ffn["mamba block"] == ffn["attention block"] == 3 * 32 * 88


def test_ours_keep_their_time_and_the_slow_are_left_out():
    here = [Case("scan", lambda n: None), Case("attention", lambda n: None, 2.0)]
    before = {"scan": (1024, 0.1), "attention": (1024, 2.0)}
    chosen, why = lengths.affordable(here, 2048, before, 30.0, 0.0, 3, 1.0)
    assert [case.name for case in chosen] == ["scan", "attention"] and not why
    chosen, why = lengths.affordable(here, 2048, before, 30.0, 10.0, 3, 1.0)
    assert [case.name for case in chosen] == ["scan"]
    assert why == {"attention": "a call would take about 8 s (3 calls, 19 s of the time limit left)"}
    chosen, why = lengths.affordable(here, 1024, before, 30.0, 1000.0, 3, 1.0)
    assert [case.name for case in chosen] == ["scan", "attention"], "half of the time is there for all"
    chosen, why = lengths.affordable(here, 2048, {}, 0.0, 0.0, 3, 1.0)
    assert not chosen and set(why) == {"scan", "attention"}
    assert lengths.expected(here[1], 4096, before) == 32.0 and lengths.expected(here[0], 4096, before) == 0.4


def test_omissions_are_one_line_a_name():
    rows = [
        {"length": n, "direction": "forward", "left_out": {"attention": f"why {n}"} if n > 1 else {}}
        for n in (1, 1024, 2048)
    ]
    assert lengths.omissions(rows) == ["attention, forward, left out at 1,024 and 2,048 tokens: why 2048"]


def test_the_report_and_the_picture(tmp_path):
    events = []
    found = lengths.run(length=64, hidden=16, repeats=1, device="cpu", plot=tmp_path / "b.png", on_event=events.append)
    found = json.loads(json.dumps(found))
    assert found["plot"] == str(tmp_path / "b.png") and (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert [(r["length"], r["direction"]) for r in found["results"]] == [(64, "forward"), (64, "forward+backward")]
    for row in found["results"]:
        times = row["timings"]
        assert tuple(times) == lengths.NAMES and not row["left_out"]
        assert row["ratios"]["attention"] == pytest.approx(times["attention"]["median_ms"] / times["scan"]["median_ms"])
        block = times["attention block"]["median_ms"] / times["mamba block"]["median_ms"]
        assert row["ratios"]["attention block"] == pytest.approx(block)
    assert [len(table.rows) for table in lengths.tables(found)] == [1, 1]
    assert events[-1]["done"] == events[-1]["total"] == 2


def test_wrong_values():
    for flags, words in (
        ({"length": 3}, "--seq-len must be at least 16"),
        ({"hidden": 12}, "--hidden must be a multiple of 8"),
        ({"limit": 0.0}, "--limit"),
        ({"backend": "nope"}, "unknown scan backend"),
    ):
        with pytest.raises(UsageError, match=words):
            lengths.run(device="cpu", **{"length": 64, "hidden": 16, **flags})


def test_nothing_is_measured_for_a_picture_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "measure", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(StorageError, match="no such folder"):
        lengths.run(plot=tmp_path / "none" / "b.png", device="cpu")


def test_the_front_without_typer(capsys):
    assert lengths.main(["--seq-len", "64", "--hidden", "16", "--repeats", "1", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| tokens | scan | attention | mamba block | attention block |" in out and "forward+backward" in out
