"""The planner against the real thing: parameters of the meta-device model, bytes that torch holds, tensors that
autograd keeps, FLOPs it counts."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, config, device, footprint, paths, plan
from moai_core import recipe as recipes
from moai_core.errors import RecipeError, UsageError
from moai_core.training.optim import make_optimizer

SHAPES = [
    {},
    {"ffn": "none"},
    {"dt_bc_norm": False},
    {"tie_word_embeddings": True},
    {"expand_factor": 3, "state_size": 8, "conv_kernel_size": 3, "time_step_rank": 5},
]
TINY = {"vocab_size": 389, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
PARTS = {
    "embeddings": ["embed_tokens"],
    "in_proj": ["in_proj"],
    "conv1d": ["conv1d"],
    "x_proj": ["x_proj"],
    "dt_proj": ["dt_proj"],
    "scan (A_log, D, dt_bias)": ["A_log", ".D", "dt_bias"],
    "out_proj": ["out_proj"],
    "feed-forward": ["feed_forward"],
    "norms": ["layernorm"],
    "head": ["lm_head"],
}


def recipe_of(model: dict, **sections: dict) -> recipes.Recipe:
    """A recipe for a CPU with this model and other sections."""
    train = {"steps": 5, **sections.pop("train", {})}
    return recipes.Recipe.from_dict(
        {"model": model, "tokenizer": None, "train": train, "hardware": {"gpu": "cpu"}, **sections}
    )


@pytest.mark.parametrize(
    "fields", [*({"preset": size} for size in config.PRESETS), *({**TINY, **s} for s in SHAPES)], ids=str
)
def test_parameters_are_the_models(fields):
    numbers = config.fields(fields.get("preset"), **{k: v for k, v in fields.items() if k != "preset"})
    counts = plan.parameters(numbers)
    with torch.device("meta"):
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers))
    model.tie_weights()
    names = dict(model.named_parameters())
    assert counts["total"] == sum(p.numel() for p in names.values())
    for part, words in PARTS.items():
        assert counts[part] == sum(p.numel() for n, p in names.items() if any(w in n for w in words)), part
    assert sum(n * k for n, k in footprint.tensors(numbers)) == counts["total"]


@pytest.mark.parametrize(("size", "billions"), [("2b", 1.989), ("8b", 8.218), ("16b", 16.375)])
def test_presets_have_the_sizes_that_are_quoted(size, billions):
    assert plan.parameters(config.fields(size))["total"] / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_flops_are_what_torch_counts(fields):
    """torch's counter sees the matrix products; convolution and scan are counted by hand on both sides."""
    numbers = config.fields(None, **{**TINY, **fields})
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers)).eval()
    batch, length = 2, 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 389, (batch, length)))
    c = footprint.letters(numbers)
    by_hand = c["layers"] * c["I"] * (2 * c["K"] + 9 * c["N"] + 6)
    ours = plan.flops_per_token(numbers, length)
    assert ours["forward"] - by_hand == counter.get_total_flops() / (batch * length)
    assert ours["training"] == 3 * ours["forward"] and ours["recompute"] == 0
    again = plan.flops_per_token(numbers, length, checkpointing="full")["recompute"]
    assert again == ours["forward"] - 2 * c["V"] * c["H"]


def _small(fields: dict, precision: str) -> tuple[MoaiMambaForCausalLM, dict]:
    numbers = config.fields(None, **{**TINY, **fields})
    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers)).train()
    return model.to(torch.bfloat16 if precision == "bf16" else torch.float32), numbers


def _step(model: MoaiMambaForCausalLM, precision: str, batch: int, length: int) -> torch.Tensor:
    ids = torch.randint(0, 389, (batch, length))
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    with mixed:
        return model(ids, labels=ids, seq_idx=torch.zeros(batch, length, dtype=torch.int32)).loss


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adamw_8bit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer_are_exact(optimizer, precision):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
        if precision == "bf16":
            pytest.skip("refused by the training loop")
    model, numbers = _small({}, precision)
    recipe = recipe_of(TINY, optim={"name": optimizer})
    optim = make_optimizer(model, recipe.optim, lr=1e-4, seed=0)
    _step(model, precision, 1, 32).backward()
    optim.step()
    held = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimizer": sum(
            value.nbytes
            for state in optim.state.values()
            for key, value in state.items()
            if torch.is_tensor(value) and key != "step" and not key.startswith("qmap")
        ),
    }
    assert footprint.weights_gradients_optimizer(numbers, recipe, precision) == held


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("fields", SHAPES[:3] + SHAPES[4:], ids=str)
def test_activations_are_what_autograd_keeps(fields, precision):
    """All that a forward pass with loss saves for the backward pass, but weights, logits and head: within 10 %."""
    model, numbers = _small({**fields, "hidden_size": 128, "intermediate_size": 352}, precision)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        where = tensor.untyped_storage().data_ptr()
        if where not in weights and numbers["vocab_size"] not in tensor.shape:
            saved[where] = tensor
        return tensor

    batch, length = 4, 256
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _step(model, precision, batch, length)
    measured = sum(t.untyped_storage().nbytes() for t in saved.values())
    recipe = recipe_of(TINY, train={"batch_size": batch, "precision": precision}, data={"max_length": length})
    phase = footprint.phases(numbers, recipe)["loss"]
    planned = phase["activations"] + phase["scan states"]
    assert planned == pytest.approx(measured, rel=0.1)


def test_kinds_add_up_and_checkpointing_trades_memory_for_flops():
    ways = [
        recipes.load("a100-2b", ["train.batch_size=2", f"train.checkpointing={way}"])
        for way in ("full", "selective", "none")
    ]
    full, some, none = (plan.plan(recipe) for recipe in ways)
    for p, recipe in zip((full, some, none), ways, strict=True):
        assert set(p.memory) == set(footprint.KINDS)
        assert p.peak == sum(p.memory.values()) == sum(plan.memory(plan.numbers(recipe), recipe).values())
    assert full.memory["activations"] < some.memory["activations"] / 2 < none.memory["activations"] / 2
    assert full.flops["recompute"] > 20 * some.flops["recompute"] > 0 == none.flops["recompute"]
    assert some.memory["scan states"] == none.memory["scan states"] > 0


def test_the_2b_step_meets_its_memory():
    """bf16 weights and moments, one micro-batch of 2048 tokens a row, without the CUDA context: 30 and 40 GB."""
    for rows, most in ((4, 30e9), (8, 40e9)):
        batch = [f"train.batch_size={rows}", f"train.effective_batch={rows}", "train.checkpointing=selective"]
        p = plan.plan(recipes.load("h100-2b", [*batch, "train.precision=bf16", "optim.name=adamw_bf16"]))
        assert p.peak - p.memory["overhead"] <= most


def test_layers_that_keep_everything_stand_between():
    def planned(mode, layers=None):
        some = [] if layers is None else [f"train.checkpointing_layers={layers}"]
        return plan.plan(recipes.load("h100-2b", [*FOUR_ROWS, f"train.checkpointing={mode}", *some]))

    for mode in ("selective", "full"):
        every, none = planned(mode), planned("none")
        peaks = [planned(mode, layers).peak for layers in (24, 16, 8, 1)]
        assert peaks[0] == every.peak and peaks == sorted(peaks) and peaks[-1] < none.peak
        again = planned(mode, 16).flops["recompute"]
        assert again == pytest.approx(every.flops["recompute"] * 2 / 3) and again > 0
    with pytest.raises(
        RecipeError, match=r"train\.checkpointing_layers can't be more than the model's 24 layers \(got 25\)"
    ):
        planned("selective", 25)
    with pytest.raises(
        RecipeError,
        match=r"^override 'train\.checkpointing_layers=3': train\.checkpointing_layers changes nothing with "
        r"train\.checkpointing=none$",
    ):
        planned("none", 3)
    kept = (planned("none").peak - planned("selective").peak) / 24
    assert planned("selective", 16).peak == pytest.approx(planned("selective").peak + 8 * kept, rel=1e-3)


def test_updates_inside_of_the_backward_pass_take_the_gradients_away():
    """Of a small batch they are a quarter of all; of a large one the activations at the loss are the peak."""
    one = ["train.batch_size=1", "train.effective_batch=1", "train.checkpointing=full"]
    one += ["train.precision=bf16", "optim.name=adamw_bf16", "optim.clip=null"]
    plain, inside = (plan.plan(recipes.load("h100-2b", [*one, f"optim.in_backward={on}"])) for on in ("false", "true"))
    gradients = footprint.weights_gradients_optimizer(
        plan.numbers(plain_recipe := recipes.load("h100-2b", one)), plain_recipe, "bf16"
    )["gradients"]
    assert plain.phase == "update" and inside.phase == "loss"
    assert 0.6 * gradients < plain.peak - inside.peak < gradients


# (recipe, overrides, torch.cuda.max_memory_allocated of a step in GiB on an H100 80GB; docs/LOG.md says how). With
# checkpointing, so that little of it was the stand-ins' for scan and convolution; tests/gpu/test_memory.py measures all.
FOUR_ROWS = ["train.batch_size=4", "train.effective_batch=4", "train.precision=bf16", "optim.name=adamw_bf16"]
MEASURED = [
    ("h100-2b", [], 63.52),
    ("a100-2b", [], 41.82),
    ("a40-2b", [], 37.41),
    ("rtx4090-2b", [], 16.68),
    ("h100-2b", [*FOUR_ROWS, "train.checkpointing=none"], 30.53),
    ("h100-2b", [*FOUR_ROWS, "train.checkpointing=selective"], 23.97),
    ("h100-2b", [*FOUR_ROWS, "train.checkpointing=full"], 15.31),
]


@pytest.mark.parametrize(("name", "overrides", "gib"), MEASURED, ids=str)
def test_the_peak_is_within_10_percent_of_the_measured_one(name, overrides, gib):
    p = plan.plan(recipes.load(name, overrides))
    assert (p.peak - p.memory["overhead"]) / plan.GIB == pytest.approx(gib, rel=0.1)


def test_every_packaged_recipe_fits_its_device():
    for name in recipes.names():
        assert plan.plan(recipes.load(name)).fits is True, name
    assert plan.plan(recipes.load("a100-2b", ["model.preset=16b"])).fits is False
    assert plan.plan(recipes.load("rtx4090-2b", ["optim.name=adamw", "train.precision=bf16-mixed"])).fits is False
    assert plan.plan(recipes.load("a100-2b", ["hardware.gpu=null"])).fits is None
    assert plan.plan(recipes.load("a100-2b", ["hardware.memory_gb=40"])).fits is False


def test_readme_has_the_planned_peaks():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|.* \| ([\d.]+) GiB \|$", text, re.MULTILINE)
    peaks = {name: float(gib) for cell, gib in rows for name in re.findall(r"`([\w-]+)`", cell)}
    assert set(peaks) == set(recipes.names())
    for cell, gib in rows:
        largest = max(plan.plan(recipes.load(name)).peak for name in re.findall(r"`([\w-]+)`", cell))
        assert float(gib) == pytest.approx(largest / plan.GIB, abs=0.06), cell


def test_steps_tokens_and_words():
    p = plan.plan(recipes.load("a100-2b", ["train.steps=10", "hardware.count=4"]))
    assert p.batch == {"rows": 16, "accumulation": 4, "length": 2048, "tokens": 256 * 2048}
    assert p.tokens == 10 * 256 * 2048
    text = "\n".join(" ".join(row) for row in p.rows())
    for words in (
        "1,989,416,704",
        "NVIDIA A100 (80 GB) has 79.10 GiB: fits",
        "steps 10",
        "data.train is not set",
        "6.6 MiB, at any length",
    ):
        assert words in text
    assert ("", "state a sequence", "44.0 KiB, at any length") in plan.plan(recipes.load("cpu-tiny")).rows()
    assert "DOES NOT FIT" in "\n".join(
        " ".join(row) for row in plan.plan(recipes.load("a100-2b", ["model.preset=16b"])).rows()
    )
    assert plan.plan(recipes.load("a100-2b", ["train.epochs=1"])).steps is None
    import json

    assert json.loads(json.dumps(p.to_dict()))["peak"] == p.peak


def test_the_state_is_the_models(tiny_model):
    model = tiny_model()
    numbers = model.config.numbers()
    state = model(torch.zeros(1, 9, dtype=torch.long)).state
    p = plan.plan(recipe_of({k: v for k, v in numbers.items() if v is not None}))
    assert p.state_bytes == sum(conv.nbytes + ssm.nbytes for conv, ssm in state.layers)


def test_the_vocabulary_is_the_tokenizers(tmp_path):
    from moai_core.data.tokenize import load_tokenizer

    size = max(load_tokenizer("moai_tiny").get_vocab().values()) + 1
    assert plan.vocabulary("moai_tiny") == size
    assert plan.numbers(recipes.load("cpu-tiny"))["vocab_size"] == size
    assert plan.numbers(recipes.load("cpu-tiny", ["model.vocab_size=9000"]))["vocab_size"] == 9000
    shutil.copytree(paths.TOKENIZERS / "moai_tiny", tmp_path / "run" / "step-7")
    assert plan.vocabulary(str(tmp_path / "run")) == size
    (tmp_path / "tokenizer.json").write_text("{}")
    assert plan.vocabulary(str(tmp_path)) is plan.vocabulary(str(tmp_path / "no")) is plan.vocabulary(None) is None


# ---- devices


def fake(monkeypatch, *gpus: tuple[str, float, bool]) -> None:
    found = [
        device.Device(f"cuda:{n}", label, int(gb * 1e9), int(gb * 1e9), bf16, "9.0")
        for n, (label, gb, bf16) in enumerate(gpus)
    ]
    monkeypatch.setattr(device, "gpus", lambda: found)


def test_require_explains_itself_in_one_line(monkeypatch):
    fake(monkeypatch)
    monkeypatch.setattr(device, "memory", lambda: (200 << 30, 200 << 30))
    device.require(recipes.load("cpu-tiny"))
    device.require(recipes.load("a100-2b", ["hardware.gpu=null"]))
    monkeypatch.setattr(device, "memory", lambda: (8 << 30, 8 << 30))
    device.require(recipes.load("cpu-tiny"))
    for name, extra in (("a100-2b", "hardware.gpu=null"), ("cpu-tiny", "train.batch_size=1000000")):
        with pytest.raises(UsageError, match=r"needs [\d.]+ GiB by its plan; this machine has 8.0 GiB"):
            device.require(recipes.load(name, [extra]))
    with pytest.raises(UsageError) as caught:
        device.require(recipes.load("a100-2b"))
    assert caught.value.message == "this recipe needs an NVIDIA A100 (80 GB); this machine has no CUDA GPU"
    assert caught.value.hint == "--dry-run shows the plan; cpu-tiny trains here" and caught.value.exit_code == 2
    fake(monkeypatch, ("NVIDIA GeForce RTX 4090", 25.3, True))
    device.require(recipes.load("rtx4090-2b"))
    with pytest.raises(
        UsageError, match=r"needs an NVIDIA A40 \(48 GB\); this machine has NVIDIA GeForce RTX 4090 \(25 GB\)"
    ):
        device.require(recipes.load("a40-2b"))
    fake(monkeypatch, ("NVIDIA H200", 150.1, True))
    device.require(recipes.load("a100-2b"))
    with pytest.raises(UsageError, match=r"needs 2 x NVIDIA A100"):
        device.require(recipes.load("a100-2b", ["hardware.count=2"]))
    fake(monkeypatch, ("Quadro RTX 8000", 51.0, False))
    with pytest.raises(UsageError, match="Quadro RTX 8000"):
        device.require(recipes.load("rtx4090-2b"))


@pytest.mark.parametrize(
    ("gpus", "kind"),
    [
        ([], "cpu"),
        ([("NVIDIA A100-SXM4-80GB", 85.1, True)], "a100"),
        ([("NVIDIA A100-SXM4-40GB", 42.4, True)], "rtx4090"),
        ([("NVIDIA H100 80GB HBM3", 85.0, True)], "h100"),
        ([("NVIDIA A40", 47.8, True)], "a40"),
        ([("NVIDIA GeForce RTX 4090", 25.3, True)], "rtx4090"),
        ([("NVIDIA H200", 150.1, True)], "h100"),
        ([("NVIDIA L4", 23.6, True)], "cpu"),
        ([("Tesla V100", 34.1, False)], "cpu"),
    ],
)
def test_the_class_of_a_gpu(monkeypatch, gpus, kind):
    fake(monkeypatch, *gpus)
    assert device.nearest_class() == kind


def test_this_machine():
    cpu = device.cpu()
    assert cpu.name == "cpu" and 0 < cpu.free <= cpu.memory and device.cores() >= 1 and cpu.to_dict()["label"]
