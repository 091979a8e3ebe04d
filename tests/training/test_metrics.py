"""metrics.jsonl cut back and read after a crash; the picture."""

from __future__ import annotations

import json
import math
import struct

import pytest

from moai_core.errors import StorageError
from moai_core.training import metrics


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_whole_and_json(tmp_path):
    out = metrics.Lines(tmp_path / "m.jsonl")
    out.write({"step": 1, "loss": math.nan, "text": "한국어\n"})
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "text": "한국어\n"}]  # without a flush
    out.write({"step": 2, "loss": 0.1 + 0.2})
    out.sync()
    assert lines(tmp_path / "m.jsonl")[1]["loss"] == 0.1 + 0.2
    out.close()


def test_truncate_keeps_what_the_checkpoint_knows_and_drops_what_is_broken(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [{"kind": "train", "step": s} for s in (1, 2, 3, 4)] + [{"kind": "valid", "step": 2}]
    rows += [{"kind": "sample", "step": 2, "text": t} for t in "ab"]
    path.write_bytes(
        "\n".join(map(json.dumps, rows)).encode() + b"\n[1]\n{}\n\xff\xfe\n" + b'{"kind": "train", "step": 3'
    )
    metrics.truncate(path, {"train": 3, "valid": 2, "sample": 2})
    kept = lines(path)
    assert [r["step"] for r in kept if r["kind"] == "train"] == [1, 2, 3]
    assert [r for r in kept if r["kind"] != "train"] == rows[4:]
    metrics.truncate(path, {"train": 3, "valid": 1, "sample": 0})  # stopped before the validation at step 2 was saved
    assert {r["kind"] for r in lines(path)} == {"train"}
    metrics.truncate(path, {"train": 0})
    assert lines(path) == []
    metrics.truncate(tmp_path / "none.jsonl", {"train": 3})
    assert not (tmp_path / "none.jsonl").exists()


def test_truncate_copies_for_a_branch(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')
    metrics.truncate(tmp_path / "b.jsonl", {"train": 1}, source=tmp_path / "a.jsonl")
    assert lines(tmp_path / "b.jsonl") == [{"kind": "train", "step": 1}] and len(lines(tmp_path / "a.jsonl")) == 2


def test_smooth_is_the_mean_of_a_window():
    values = [3.0, 1.0, math.nan, 5.0, 7.0, 9.0]
    for window in (1, 2, 3, 10):
        for i, got in enumerate(metrics.smooth(values, window)):
            seen = [v for v in values[max(0, i + 1 - window) : i + 1] if not math.isnan(v)]
            expected = sum(seen) / len(seen) if seen else math.nan
            assert got == pytest.approx(expected, nan_ok=True), (window, i)


@pytest.mark.parametrize("title", ["cpu-tiny", "한국어 레시피"])
def test_the_picture_is_a_png(tmp_path, title, recwarn):
    assert metrics.plot(tmp_path, title=title) is None
    out = metrics.Lines(tmp_path / "metrics.jsonl")
    for step in range(1, 30):
        out.write({"kind": "train", "step": step, "loss": math.nan if step == 7 else 5 / step, "lr": 1e-3})
    out.write({"kind": "valid", "step": 29, "valid_loss": 0.4})
    out.close()
    path = metrics.plot(tmp_path, title=title)
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG") and struct.unpack(">II", raw[16:24]) == (900, 500)
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_folder_that_can_t_be_written(tmp_path):
    with pytest.raises(StorageError, match=r"metrics.jsonl"):
        metrics.Lines(tmp_path / "none" / "metrics.jsonl")
