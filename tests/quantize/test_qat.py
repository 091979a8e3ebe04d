"""`moai qat`: what is trained is what is stored; resuming is exact; distillation is what the formula says."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from moai_core import checkpoint
from moai_core import recipe as recipes
from moai_core.errors import UsageError
from moai_core.model.loss import shift_labels
from moai_core.quant import fake, linear, lora
from moai_core.quantize import qat
from moai_core.quantize.plan import Settings
from moai_core.training import in_backward, optim, train

SETTINGS = Settings("int4", group_size=32)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(recipe of the tests, a trained parent): made once."""
    folder = tmp_path_factory.mktemp("qat")
    words = ["the", "quick", "brown", "오늘은", "날씨가", "今日は", "天气"]
    lines = [json.dumps({"text": " ".join(words[(i * 5 + j * j) % 7] for j in range(4 + i % 30))}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")

    def recipe(*overrides):
        base = [
            "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2", "model.state_size=4",
            f"data.train={folder / 'text.jsonl'}", "~data.valid", "data.valid_fraction=0.2", "data.max_length=32",
            f"data.cache={folder / 'cache'}", "optim.lr=1e-2", "optim.finetune_lr=1e-3", "optim.warmup_steps=1", "optim.schedule=constant", "train.steps=6", "train.batch_size=2",
            "train.save_every=3", "train.eval_every=6", "train.eval_batches=2", "train.sample_every=0", "train.threads=1",
        ]  # fmt: skip
        return recipes.load("cpu-tiny", [*base, *overrides])

    parent = folder / "부모 run"
    train(recipe("train.steps=12"), output=parent)
    return recipe, parent


def weights(folder):
    return {name: tensor for name, tensor in checkpoint.load_model(folder).state_dict().items()}


@pytest.mark.parametrize("mode", ["full", "scales", "qlora"])
def test_trains_under_autocast(start, tmp_path, mode):
    recipe, parent = start
    options = qat.Options(mode, SETTINGS, rank=4, teacher=parent)
    exact, mixed = (
        qat.qat(recipe("train.steps=3", f"train.precision={name}"), options, model_path=parent, output=tmp_path / name)
        for name in ("fp32", "bf16-mixed")
    )
    assert mixed.loss == pytest.approx(exact.loss, rel=0.02) and mixed.valid["loss"] == pytest.approx(
        exact.valid["loss"], rel=0.02
    )


@pytest.mark.parametrize("mode", ["full", "scales", "qlora"])
def test_trains_and_resumes_exactly(start, tmp_path, mode):
    recipe, parent = start
    options = qat.Options(mode, SETTINGS, rank=4)
    straight = qat.qat(recipe(), options, model_path=parent, output=tmp_path / "a")
    qat.qat(recipe("train.steps=3"), options, model_path=parent, output=tmp_path / "b")
    resumed = qat.qat(recipe(), options, model_path=parent, output=tmp_path / "b")
    assert resumed.resumed_from == 3 and resumed.step == straight.step == 6
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    first = checkpoint.load_training(tmp_path / "a" / "step-6")[0]
    second = checkpoint.load_training(tmp_path / "b" / "step-6")[0]
    for name, tensor in first.get("parameters", {}).items():
        assert torch.equal(tensor, second["parameters"][name])
    assert ("parameters" in first) == (mode != "qlora")
    # Every step is the quantized model itself, in its format.
    loaded = checkpoint.load_model(tmp_path / "a")
    assert linear.quantized(loaded) and lora.adapted(loaded) == (mode == "qlora")
    assert (
        all(isinstance(p, torch.nn.Parameter) and "lora" in n for n, p in loaded.named_parameters() if p.requires_grad)
        or mode != "qlora"
    )


@pytest.mark.parametrize("mode", ["full", "scales"])
def test_the_model_in_training_gives_the_bits_of_the_stored_one(start, tmp_path, mode):
    recipe, parent = start
    seen = {}
    plain = qat._ready

    def keep(model, *rest):
        seen["model"] = model
        return plain(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat, "_ready", keep)
        qat.qat(recipe(), qat.Options(mode, SETTINGS), model_path=parent, output=tmp_path / "run")
    model = seen["model"].eval()
    assert any(isinstance(m, (fake.FakeQuantLinear, fake.ScaledQuantLinear)) for m in model.modules())
    stored = checkpoint.load_model(tmp_path / "run")
    linear.set_kernel(stored, "dequantize")
    ids = torch.randint(0, 500, (2, 40))
    assert torch.equal(model(ids).logits, stored(ids).logits)


def test_from_scratch_from_a_quantized_one_and_refusals(start, tmp_path):
    recipe, _ = start
    qat.qat(recipe("train.steps=2"), qat.Options("full", SETTINGS), output=tmp_path / "scratch")
    # A start that is quantized already, as the specification has it.
    again = qat.qat(
        recipe("train.steps=2"), qat.Options("scales"), model_path=tmp_path / "scratch", output=tmp_path / "again"
    )
    assert again.step == 2
    with pytest.raises(UsageError, match="--model is missing"):
        qat.qat(recipe(), qat.Options("qlora", SETTINGS), output=tmp_path / "none")
    with pytest.raises(UsageError, match="was trained as qat full"):
        qat.qat(recipe(), qat.Options("scales", SETTINGS), output=tmp_path / "scratch")
    with pytest.raises(UsageError, match="was trained as qat full"):
        train(recipe(), output=tmp_path / "scratch")
    for wrong in (
        {"mode": "half"},
        {"weight": 2.0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"settings": Settings("fp8")},
    ):
        with pytest.raises(UsageError):
            qat.Options(**wrong).check()


def test_learning_rates():
    """The specification's for its three sizes; what lies below goes on with its slope."""
    assert [qat.learning_rate("full", hidden) for hidden in (2048, 4096, 5120)] == [1e-5, 5e-6, 3e-6]
    assert qat.learning_rate("full", 1024) == pytest.approx(2e-5)
    assert (qat.learning_rate("scales", 2048), qat.learning_rate("qlora", 64)) == (1e-4, 2e-4)


@pytest.mark.parametrize(("weight", "heat"), [(0.5, 1.0), (1.0, 2.0), (0.0, 1.0)])
def test_distillation(start, weight, heat):
    """Loss and gradient against the formula in float64 over whole logits."""
    _, parent = start
    teacher = checkpoint.load_model(parent)
    student = checkpoint.load_model(parent)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    options = qat.Options(teacher=parent, weight=weight, temperature=heat)
    student.objective = qat.Teacher(options).objective(student)
    ids = torch.randint(0, 500, (2, 20))
    labels = ids.clone()
    labels[0, :5] = -100
    loss = student.train()(ids, labels=labels).loss
    loss.backward()
    got = student.model.layers[0].mamba.in_proj.weight.grad.clone()
    student.zero_grad()
    student.objective = None
    logits = student(ids, return_logits=True).logits.double()
    wanted = F.softmax(teacher(ids).logits.double() / heat, -1)
    targets = shift_labels(labels, None)
    keep = targets != -100
    kl = (wanted * (wanted.log() - F.log_softmax(logits / heat, -1))).sum(-1)[keep].mean() * heat**2
    exact = weight * kl + (1 - weight) * F.cross_entropy(logits[keep], targets[keep])
    exact.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    reference = student.model.layers[0].mamba.in_proj.weight.grad
    assert float((got - reference).norm() / reference.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_merged_adapters(start, tmp_path, dtype):
    recipe, parent = start
    qat.qat(recipe(), qat.Options("qlora", SETTINGS, rank=4), model_path=parent, output=tmp_path / "run")
    adapted = checkpoint.load_model(tmp_path / "run")
    linear.set_kernel(adapted, "dequantize")
    merged = checkpoint.load_model(qat.merge(tmp_path / "run", tmp_path / "merged", dtype=dtype))
    assert bool(linear.quantized(merged)) == (dtype is None)
    ids = torch.randint(0, 500, (1, 30))
    before, after = adapted(ids).logits.detach(), merged(ids).logits.detach()
    assert float((before - after).norm() / before.norm()) < (1e-4 if dtype is torch.float32 else 0.3)


@pytest.mark.parametrize("mode", ["full", "scales", "qlora"])
@pytest.mark.parametrize("tied", [False, True])
def test_planned_memory_is_what_a_model_holds(start, tmp_path, mode, tied):
    """Weights, buffers, gradients and moments of a model in training, added up."""
    recipe, parent = start
    wanted = recipe(f"model.tie_word_embeddings={str(tied).lower()}", "train.steps=1", "optim.warmup_steps=0")
    folder = parent
    if tied:
        folder = tmp_path / "tied"
        train(wanted, output=folder)
    seen = {}
    plain = qat._ready

    def keep(model, *rest):
        seen["model"] = model
        return plain(model, *rest)

    options = qat.Options(mode, SETTINGS, rank=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat, "_ready", keep)
        qat.qat(wanted, options, model_path=folder, output=tmp_path / "run")
    model = seen["model"]
    held = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    planned = qat.memory(wanted, options)
    assert planned == {"weights": sum(held.values()), "gradients": trained, "optimizer": 2 * trained}


@pytest.mark.parametrize("mode", ["full", "scales", "qlora"])
@pytest.mark.parametrize("tied", [False, True])
def test_planned_gradients_are_those_there_at_once(start, tmp_path, mode, tied, monkeypatch):
    """With updates inside of the backward pass: added up whenever one is complete. What a tied head gives waits within
    autograd for the embedding's, to be added to it."""
    recipe, _ = start
    for module in (in_backward, qat):
        monkeypatch.setattr(module, "UPDATED_ALONE", 100)
    words = ["model.hidden_size=64", "model.intermediate_size=4096", f"model.tie_word_embeddings={str(tied).lower()}"]
    words += ["train.steps=1", "train.precision=bf16", "optim.name=adamw_bf16", "optim.clip=null"]
    inside = recipe(*words, "optim.in_backward=true")
    train(recipe(*words), output=tmp_path / "parent")
    seen = []
    update = optim.AdamWBF16.step_one

    def watched(self, *rest):
        everything = {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        there = [p.grad for p in everything.values() if p.grad is not None]
        if tied and mode == "full":
            there += [p for n, p in everything.items() if "embed" in n]
        seen.append(sum(g.numel() * g.element_size() for g in there))
        return update(self, *rest)

    monkeypatch.setattr(optim.AdamWBF16, "step_one", watched)
    options = qat.Options(mode, SETTINGS, rank=4)
    qat.qat(inside, options, model_path=tmp_path / "parent", output=tmp_path / "run")
    planned, every = (qat.memory(recipe(*words, f"optim.in_backward={on}"), options) for on in ("true", "false"))
    assert max(seen) <= planned["gradients"] <= 1.1 * max(seen)
    assert planned["gradients"] < 0.8 * every["gradients"]
    assert {**planned, "gradients": 0} == {**every, "gradients": 0}
    on_a_gpu = qat.memory(recipe(*words, "optim.in_backward=true", "hardware.gpu=null"), options)
    assert on_a_gpu == every, "the little that there is may wait there"


@pytest.fixture(scope="module")
def turned(start, tmp_path_factory):
    """The parent, quantized with a rotation and with AWQ's vector after the convolution."""
    from moai_core import storage
    from moai_core.quantize.calibrate import from_tokens
    from moai_core.quantize.disk import quantize_folder

    _, parent = start
    folder = tmp_path_factory.mktemp("turned")
    data = torch.randint(0, 500, (8, 32))
    made = {}
    for name, settings in (
        ("rotated", Settings("gptq", group_size=32, rotate=True)),
        ("awq", Settings("awq", group_size=32)),
    ):
        quantize_folder(parent, folder / name, settings, calibration=lambda: from_tokens(data))
        assert (folder / name / storage.MANIFEST).exists()
        made[name] = folder / name
    return made


@pytest.mark.parametrize("name", ["rotated", "awq"])
@pytest.mark.parametrize("mode", ["full", "scales", "qlora"])
def test_a_rotation_and_a_scale_stay_through_training(start, turned, tmp_path, name, mode):
    recipe, _ = start
    ids = torch.randint(0, 500, (2, 24))
    before = checkpoint.load_model(turned[name])
    linear.set_kernel(before, "dequantize")
    model = qat.prepare(checkpoint.load_model(turned[name]), qat.Options(mode, SETTINGS, rank=4))
    linear.set_kernel(model, "dequantize")
    want = before(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, want, rtol=1e-4, atol=1e-4)
    qat.qat(
        recipe("train.steps=2"), qat.Options(mode, SETTINGS, rank=4), model_path=turned[name], output=tmp_path / "run"
    )
    trained = checkpoint.load_model(tmp_path / "run")
    linear.set_kernel(trained, "dequantize")
    got = trained(ids).logits.detach()
    assert 0 < float((got - want).norm() / want.norm()) < 0.5
    if mode == "qlora":
        for dtype, close in ((torch.float32, 1e-4), (None, 0.3)):
            merged = checkpoint.load_model(qat.merge(tmp_path / "run", tmp_path / f"merged {dtype}", dtype=dtype))
            linear.set_kernel(merged, "dequantize")
            assert float((merged(ids).logits.detach() - got).norm() / got.norm()) < close
