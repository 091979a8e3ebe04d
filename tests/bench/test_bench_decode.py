"""The benchmark of generation counts and reports what it ran. Nothing here is timed."""

from __future__ import annotations

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM
from moai_core.bench import decode, quantized, timing
from moai_core.errors import UsageError

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(quantized, "_SMALL", TINY)
    monkeypatch.setattr(decode, "copy_rate", lambda clock: 1e10)


def test_a_report_names_what_ran_and_what_did_not():
    events = []
    formats = ["none", "int8"]
    found = decode.run(batches="1,3", formats=formats, device="cpu", repeats=1, on_event=events.append)
    assert [(r["format"], r["engine"], r["batch"]) for r in found["results"]] == [
        (form, "plain", batch) for form in formats for batch in (1, 3)
    ]
    assert all("it runs on CUDA GPUs only" in note for note in found["notes"]) and len(found["notes"]) == 2
    for row in found["results"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step"]["median_ms"] * 1e3)
        assert row["of_copy"] == pytest.approx(row["bytes_per_s"] / 1e10)
    assert events[-1]["done"] == events[-1]["total"] == 8
    (table,) = decode.tables(found)
    assert len(table.rows) == 4 and all(len(row) == len(table.columns) for row in table.rows)


def test_bytes_are_those_of_weights_and_states():
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**{**TINY, "ffn": "none", "num_hidden_layers": 1}))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert decode.weight_bytes(model) == parameters - 64 * 32 * 4
    state = model(torch.zeros(1, 3, dtype=torch.int64), use_cache=True).state
    conv, ssm = state.layers[0]
    assert decode.state_bytes(model) == 2 * 4 * (conv.numel() + ssm.numel())
    tied = MoaiMambaForCausalLM(MoaiMambaConfig(**{**TINY, "tie_word_embeddings": True}))
    assert decode.weight_bytes(tied) == sum(p.numel() * p.element_size() for p in tied.parameters())


def test_a_plain_step_goes_on_from_its_own_token():
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**TINY)).eval()
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    work = decode.plain_work(model, 2)
    work(), work()
    hook.remove()
    assert [tuple(ids.shape) for ids in seen] == [(2, 2), (2, 1), (2, 1)]
    assert timing.Clock(torch.device("cpu"))(work)[0] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"preset": "3b"}, "--preset: unknown size '3b'"),
        ({"formats": ["int3"]}, "--format: unknown name 'int3'"),
        ({"engines": ["fast"]}, "--engine: unknown name 'fast'"),
        ({"batches": "0"}, "--batch must be whole numbers >= 1"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
    ],
)
def test_wrong_words_are_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        decode.run(device="cpu", **flags)
