"""Training on a GPU: each optimizer and precision learns, resumes, and keeps the weights in the recipe's type."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from moai_core import checkpoint
from moai_core.errors import Interrupted
from moai_core.training import StopFlag, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name,precision,stored", [
    ("adamw", "fp32", torch.float32), ("adamw", "bf16-mixed", torch.float32), ("adamw", "bf16", torch.bfloat16),
    ("adamw_bf16", "bf16", torch.bfloat16), ("adamw", "auto", torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_learns_and_resumes(tiny, tmp_path, name, precision, stored, checkpointing):
    recipe = tiny(
        "hardware.gpu=null", f"optim.name={name}", f"train.precision={precision}", "train.accumulation=2",
        f"train.checkpointing={checkpointing}", "train.steps=12", "train.sample_every=6",
    )  # fmt: skip
    events = []
    whole = train(recipe, output=tmp_path / "whole", on_event=events.append)
    start = next(e for e in events if e["event"] == "start")
    assert start["device"] == torch.cuda.get_device_name()
    assert start["precision"] == ("bf16-mixed" if precision == "auto" else precision)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0] - 1 and rows[0]["memory_mb"] > 0
    if precision != "fp32" and "H100" in start["device"]:
        assert 0 < rows[0]["mfu"] < 1
    weights = checkpoint.load_model(whole.checkpoint).state_dict()
    assert weights["model.layers.0.mamba.in_proj.weight"].dtype == stored
    assert weights["model.layers.0.mamba.A_log"].dtype == torch.float32

    flag = StopFlag()

    def stop(event):
        if event["event"] == "step" and event["step"] == 5:
            flag.request(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(recipe, output=tmp_path / "cut", stop=flag, on_event=stop)
    resumed = train(recipe, output=tmp_path / "cut")
    assert resumed.resumed_from == 5
    again = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    after = [row["loss"] for row in again if row["kind"] == "train"]
    # Reductions on a GPU need not repeat bit for bit.
    assert after == pytest.approx(losses, rel=2e-2 if stored == torch.bfloat16 else 5e-3)
