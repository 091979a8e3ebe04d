"""The training benchmark does real steps, and says what they took. Nothing here is timed."""

from __future__ import annotations

import itertools
import json
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moai_core import config, plan
from moai_core import recipe as recipes
from moai_core.bench import models, steps, timing, train
from moai_core.errors import MoaiError, UsageError
from moai_core.training import in_backward, optim

CPU = torch.device("cpu")
TINY = [
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.vocab_size=50",
    "tokenizer=null",
    "model.scan=reference",
]


@pytest.fixture
def recipe():
    return recipes.load("cpu-tiny", [*TINY, "model.num_hidden_layers=1"])


@pytest.fixture
def numbers(recipe):
    return plan.numbers(recipe)


def tokens():
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_models_own(recipe, numbers):
    torch.manual_seed(0)
    model = models.moai(numbers, recipe, CPU, None)
    logits = model.module(tokens()).logits[:, :-1].flatten(0, 1)
    assert model.loss(tokens(), None).item() == pytest.approx(F.cross_entropy(logits, tokens()[:, 1:].flatten()).item())
    chunked = models.moai(numbers, recipe, CPU, 4)
    chunked.module.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        whole, parts = model.hidden(tokens()), chunked.hidden(tokens())
    assert whole.shape == (2, 9, 16) and parts.shape == (2, 1, 16)
    assert (whole[:, -1:] - parts).norm() < 1e-5 * parts.norm(), "chunks carry the state along"


def test_packed_documents_are_trained_apart(recipe, numbers):
    model = models.moai(numbers, recipe, CPU, None)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 9], dtype=torch.int32)
    assert model.loss(tokens(), seq_idx).item() != model.loss(tokens(), None).item()


def test_llama_has_the_same_width_depth_and_feed_forward(numbers):
    model = models.llama(numbers, torch.float32, False, CPU)
    c = model.module.config
    assert (c.hidden_size, c.num_hidden_layers, c.intermediate_size, c.vocab_size) == (16, 1, 24, 50)
    assert c._attn_implementation == "sdpa" and c.num_key_value_heads == c.num_attention_heads
    logits = model.module(tokens()).logits[:, :-1].flatten(0, 1)
    assert model.loss(tokens(), None).item() == pytest.approx(F.cross_entropy(logits, tokens()[:, 1:].flatten()).item())
    assert model.hidden(tokens()).shape == (2, 9, 16)


def test_mamba_ssm_gets_the_same_sizes(numbers, monkeypatch):
    """Its classes are played here: sizes and loss are checked, not its numbers."""
    seen = {}

    def configuration(**fields):
        seen.update(fields)
        return types.SimpleNamespace(**fields)

    class Head(nn.Module):
        def __init__(self, config, device=None, dtype=None):
            super().__init__()
            self.backbone = nn.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype)
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device=device, dtype=dtype)

        def forward(self, ids):
            return types.SimpleNamespace(logits=self.lm_head(self.backbone(ids)))

    for name in ("mamba_ssm", "mamba_ssm.models", "mamba_ssm.models.config_mamba", "mamba_ssm.models.mixer_seq_simple"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mamba_ssm.models.config_mamba"].MambaConfig = configuration
    sys.modules["mamba_ssm.models.mixer_seq_simple"].MambaLMHeadModel = Head
    model = models.mamba_ssm(numbers, torch.float32, False, CPU)
    assert (seen["d_model"], seen["n_layer"], seen["d_intermediate"], seen["vocab_size"]) == (16, 1, 24, 50)
    assert seen["ssm_cfg"] == {"layer": "Mamba1", "d_state": 8, "d_conv": 4, "expand": 2, "dt_rank": 1}
    logits = model.module(tokens()).logits[:, :-1].flatten(0, 1)
    assert model.loss(tokens(), None).item() == pytest.approx(F.cross_entropy(logits, tokens()[:, 1:].flatten()).item())


def test_steps_change_the_weights_as_plain_training_does(recipe, numbers):
    torch.manual_seed(0)
    model, twin = (models.moai(numbers, recipe, CPU, None) for _ in range(2))
    twin.module.load_state_dict(model.module.state_dict())
    batches = [(torch.randint(50, (2, 9)), None) for _ in range(4)]
    found = steps.train(
        model, steps.make_optimizer(model, recipe, "recipe"), itertools.cycle(batches), steps=2, clip=0.5, device=CPU,
        on_step=lambda number: None,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        optim.parameter_groups(twin.module, recipe.optim.weight_decay), lr=recipe.optim.lr, betas=recipe.optim.betas
    )
    for ids, _ in itertools.islice(itertools.cycle(batches), steps.WARMUP + 2):
        optimizer.zero_grad()
        loss = twin.loss(ids, None)
        loss.backward()
        nn.utils.clip_grad_norm_(twin.module.parameters(), 0.5)
        optimizer.step()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for (name, a), b in zip(model.module.named_parameters(), twin.module.parameters(), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name
    assert set(found["phases_ms"]) == set(steps.PHASES) and found["step"]["repeats"] == 2
    assert found["peak_bytes"] > 10e6 and all(p.grad is None for p in model.parameters)


def test_phases_and_step_agree(monkeypatch, recipe, numbers):
    """With a clock of the test's: forward 1, backward 2, optimizer 4 seconds."""
    ticks = itertools.chain([0.0], itertools.accumulate(itertools.cycle([1.0, 2.0, 4.0])))
    first = iter(range(3 * steps.WARMUP))
    monkeypatch.setattr(steps.time, "perf_counter", lambda: 0.0 if next(first, None) is not None else next(ticks))
    model = models.moai(numbers, recipe, CPU, None)
    found = steps.train(
        model, steps.make_optimizer(model, recipe, "torch"), itertools.repeat((tokens(), None)), steps=3, clip=None,
        device=CPU, on_step=lambda number: None,
    )  # fmt: skip
    assert found["phases_ms"] == {"forward": 1e3, "backward": 2e3, "optimizer": 4e3}
    assert found["step"] == {"median_ms": 7e3, "low_ms": 7e3, "high_ms": 7e3, "repeats": 3}


def test_the_report(capsys):
    events = []
    found = train.run(
        device="cpu", recipe="cpu-tiny", overrides=TINY, layers=1, batches=["1,2"], lengths=["8"], steps=2, packed=True,
        checkpointing=["none,full"], against=["transformers"], prefill=["16"], chunk=5, repeats=1, clip=0.0,
        on_event=events.append,
    )  # fmt: skip
    found = json.loads(json.dumps(found))
    rows = [(r["model"], r["checkpointing"], r["batch"]) for r in found["results"]]
    assert rows == [
        ("moai", "none", 1), ("moai", "none", 2), ("moai", "full", 1), ("moai", "full", 2), ("transformers", "none", 1), ("transformers", "none", 2),
    ]  # fmt: skip
    numbers = plan.numbers(recipes.load("cpu-tiny", [*TINY, "model.num_hidden_layers=1"]))
    for row in found["results"]:
        speed = row["batch"] * row["length"] / row["step"]["median_ms"] * 1e3
        assert row["tokens_per_s"] == pytest.approx(speed) and row["loss"] == pytest.approx(3.9, abs=0.5)
        if row["model"] == "moai":
            flops = plan.flops_per_token(numbers)["training"]
            assert row["mfu"] == pytest.approx(flops * speed / found["product"]["flops_per_s"])
        else:
            assert row["mfu"] is None, "the planner doesn't count attention"
    assert [(r["model"], r["length"], r["chunk"]) for r in found["prefill"]] == [
        ("moai", 16, 5),
        ("transformers", 16, 5),
    ]
    assert found["clip"] is None and found["packed"] and found["backend"] == "reference" and not found["notes"]
    assert found["parameters"] == plan.parameters(numbers)["total"] and found["recorded"] is None
    assert [e["done"] for e in events[:-1]] == list(range(events[0]["total"]))
    tables = train.tables(found)
    assert [len(t.rows) for t in tables] == [6, 2]
    assert all(len(row) == len(t.columns) for t in tables for row in t.rows)


def test_updates_inside_of_the_backward_pass_and_some_layers(monkeypatch):
    monkeypatch.setattr(in_backward, "UPDATED_ALONE", 200)
    made = []
    monkeypatch.setattr(in_backward, "InBackward", lambda *a, f=in_backward.InBackward: made.append(f(*a)) or made[-1])
    found = train.run(
        device="cpu", recipe="cpu-tiny", overrides=[*TINY, "train.checkpointing_layers=1"], layers=2, batches=["1"],
        lengths=["8"], steps=1, checkpointing=["none,selective"], precision="bf16", optimizer="adamw_bf16", clip=0.0,
        in_backward=True,
    )  # fmt: skip
    assert found["in_backward"] and len(made) == 2, "once a row"
    assert [(r["checkpointing"], r["layers"]) for r in found["results"]] == [("none", None), ("selective", 1)]
    table = train.tables(found)[0]
    assert "updated inside of the backward pass" in table.title
    assert [row[1] for row in table.rows] == ["none", "selective of 1"]


def test_out_of_memory_is_a_row(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(train, "train", full)
    found = train.run(device="cpu", overrides=TINY, layers=1, batches=["1"], lengths=["8"], steps=1)
    assert found["results"][0]["out_of_memory"] is True
    (table,) = train.tables(found)
    assert "out of memory" in table.rows[0] and len(table.rows[0]) == len(table.columns)


def test_recorded_figures_stand_beside_the_rows_they_belong_to():
    results = [{"model": "moai", "batch": b, "length": n, "checkpointing": "none", "out_of_memory": True} for b, n in ((4, 2048), (8, 2048), (4, 4096))]  # fmt: skip
    reading = [{"model": "moai", "length": 32768, "chunk": None, "out_of_memory": True}]
    steps.attach(results, reading)
    assert (
        results[0]["recorded"]["mamba_ssm"]["tokens_per_s"] == 31205
        and results[0]["recorded"]["goal"]["tokens_per_s"] == 47000
    )
    assert results[1]["recorded"]["mamba_ssm"] == {"out_of_memory": True} and results[2]["recorded"] is None
    assert reading[0]["recorded"]["goal"]["ms"] == 190
    assert steps.is_preset(config.fields("2b"), "2b") and not steps.is_preset(
        config.fields("2b", num_hidden_layers=2), "2b"
    )
    found = {"product": {"n": 1, "dtype": "bf16", "flops_per_s": 1.0}, "clip": None, "model": "2b", "parameters": 1}
    found |= {"precision": "bf16", "optimizer": "x", "packed": False, "backend": "x", "environment": {}}
    tables = train.tables({**found, "results": results, "prefill": reading})
    assert tables[0].rows[0][-2:] == ("31,205, 45.46 GB", "47,000, 30.00 GB") and tables[0].rows[2][-2:] == ("", "")
    assert tables[1].rows[0][-2:] == ("246.4", "190.0")


def test_presets_measure_bf16_with_torchs_optimizer_and_recipes_their_own():
    gpu = torch.device("cuda")
    asked = train.options(gpu, preset="2b")
    assert asked.recipe.train.precision == "bf16" and asked.optimizer == "torch" and asked.batches == [4]
    assert asked.lengths == [2048] and asked.recipe.model.preset == "2b" and asked.recipe.hardware.gpu is None
    assert train.options(gpu).preset == "2b"
    asked, own = (
        train.options(gpu, recipe="h100-2b", checkpointing=["none,selective,full"]),
        recipes.load("h100-2b").train,
    )
    assert asked.recipe.train.precision == own.precision and asked.optimizer == "recipe"
    assert asked.batches == [own.batch_size]
    assert asked.checkpointing == {"none": None, "selective": None, "full": None}
    assert train.options(gpu, recipe="h100-2b").checkpointing == {own.checkpointing: None}
    some = train.options(gpu, preset="2b", checkpointing=["none,full"], overrides=["train.checkpointing_layers=5"])
    assert some.checkpointing == {"none": None, "full": 5} and some.recipe.train.checkpointing == "none"
    asked = train.options(
        gpu, preset="8b", optimizer="adamw_bf16", precision="bf16", layers=3, clip=0.0, backend="reference"
    )
    assert (
        asked.recipe.optim.name == "adamw_bf16"
        and asked.recipe.optim.clip is None
        and asked.recipe.model.scan == "reference"
    )
    assert asked.recipe.model.numbers()["num_hidden_layers"] == 3
    assert (
        train.options(CPU).recipe.name == "cpu-tiny"
        and train.options(CPU, preset="2b").recipe.train.precision == "fp32"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"recipe": "cpu-tiny", "preset": "2b"}, "--recipe and --preset"),
        ({"preset": "3b"}, "--preset: unknown size '3b'"),
        ({"recipe": "nope"}, "no recipe 'nope'"),
        ({"checkpointing": ["half"]}, "train.checkpointing must be one of"),
        ({"optimizer": "sgd"}, "--optimizer"),
        ({"precision": "int8"}, "train.precision"),
        ({"steps": -1}, "--steps must be at least 0"),
        ({"steps": 0}, "leaves nothing to measure"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"batches": ["0"]}, "--batch"),
        ({"prefill": ["x"]}, "--prefill"),
        ({"against": ["mamba_ssm"]}, "--against mamba_ssm: it runs on CUDA only"),
        ({"against": ["tea"]}, "--against: unknown name"),
        ({"overrides": ["optim.lrr=1"]}, "optim.lrr"),
        ({"preset": "16b", "batches": ["64"]}, "GiB by its plan; this machine has"),
        ({"backend": "nope"}, "nope"),
        ({"in_backward": True}, "which optim.clip needs"),
        ({"in_backward": True, "clip": 0.0}, "needs bf16 weights or optim.name=adamw_bf16"),
        ({"in_backward": True, "clip": 0.0, "preset": "2b"}, "--in-backward needs moai's own optimizer"),
    ],
)
def test_refusals(flags, words):
    with pytest.raises(MoaiError, match=words):
        train.run(device="cpu", **flags)


def test_a_product_is_measured_in_flops_a_second(monkeypatch):
    monkeypatch.setitem(steps._PRODUCT, "cpu", 8)
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count().__next__)
    assert steps.product_rate(timing.Clock(CPU), torch.float32) == {"n": 8, "dtype": "fp32", "flops_per_s": 1024.0}


def test_the_front_without_typer(capsys, monkeypatch):
    monkeypatch.setitem(steps._PRODUCT, "cpu", 64)
    tiny = ["--recipe", "cpu-tiny", *TINY, "--layers", "1", "--batch", "1", "--seq-len", "8", "--steps", "1"]
    assert train.main([*tiny, "--prefill", "8"]) == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out and "prefill: hidden states" in out and "MFU" in out
    assert train.main([*tiny, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["environment"]["command"].startswith(
        "python -m moai_core.bench.train --recipe"
    )
    assert train.main([*tiny, "--checkpointing", "half"]) == 2
    assert "checkpointing" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_one_line(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(models, "moai", full)
    with pytest.raises(UsageError, match="the weights alone"):
        train.run(device="cpu", overrides=TINY, layers=1, steps=1)
