"""The benchmark of prompts by format reports what ran, and what the models that it makes compute is sane. Not timed."""

from __future__ import annotations

import pytest
import torch

from moai_core.bench import prefill, quantized
from moai_core.errors import UsageError
from moai_core.quant.linear import quantized as layers_of

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(quantized, "_SMALL", TINY)


def test_a_report_names_what_ran_and_compares_with_none():
    events = []
    found = prefill.run(
        lengths="9,5", formats="none,int8,fp8", device="cpu", repeats=2, chunk=4, on_event=events.append
    )
    rows = found["results"]
    assert [(r["format"], r["length"]) for r in rows] == [(f, n) for n in (9, 5) for f in ("none", "int8", "fp8")]
    assert [r["kernel"] for r in rows[:3]] == ["torch", "cpu", "dequantize"]
    for row in rows:
        plain = next(r for r in rows if r["format"] == "none" and r["length"] == row["length"])
        assert row["tokens_per_s"] == pytest.approx(row["length"] / row["prefill"]["median_ms"] * 1e3)
        want = plain["prefill"]["median_ms"] / row["prefill"]["median_ms"]
        assert row["times_plain"] == pytest.approx(want)
    one = quantized.model(prefill.sizes.fields(None, **TINY), "none", torch.float32, torch.device("cpu"))
    assert rows[0]["weight_bytes"] == sum(p.numel() * p.element_size() for p in one.parameters())
    assert rows[2]["weight_bytes"] < rows[0]["weight_bytes"]
    assert events[-1]["done"] == events[-1]["total"] == 9
    (table,) = prefill.tables(found)
    assert len(table.rows) == 6 and all(len(row) == len(table.columns) for row in table.rows)


@pytest.mark.parametrize("form", [name for name, values in quantized.FORMATS.items() if values is not None])
def test_random_models_are_quantized_and_finite(form):
    one = quantized.model(prefill.sizes.fields(None, **TINY), form, torch.bfloat16, torch.device("cpu"))
    assert {layer.spec.format for name, layer in layers_of(one).items() if "proj" in name} == {form}
    hidden = one.model(torch.zeros(1, 3, dtype=torch.int64)).last_hidden_state
    assert torch.isfinite(hidden).all()
    for name, layer in layers_of(one).items():
        spread = float(layer.weight_values().std()) * layer.in_features**0.5
        assert 0.4 < spread < (5 if "lm_head" in name else 1.6), (name, spread)


def test_wrong_words():
    for flags, words in (
        ({"preset": "3b"}, "--preset"), ({"formats": "fp9"}, "--format"), ({"lengths": "1"}, "--length"),
        ({"chunk": 0}, "--chunk"), ({"repeats": 0}, "--repeats"), ({"layers": 0}, "--layers"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            prefill.run(device="cpu", **flags)
