"""A layer quantized matrix after matrix: scaling and rotating change nothing before rounding, what comes out loads and
computes the same, and each matrix sees what the quantized ones before it make.
"""

from __future__ import annotations

import copy

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import linear
from moai_core.quant.formats import Spec
from moai_core.quantize import awq, layerwise, rotate
from moai_core.quantize.calibrate import from_tokens
from moai_core.quantize.layerwise import Options, quantize_layer
from moai_core.quantize.runner import Runner

LARGE = ("mamba.in_proj", "mamba.out_proj", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
WHOLE = {"norms": {}, "no norms": {"dt_bc_norm": False}, "no ffn": {"ffn": "none"}}


def structured(tiny_model, seed=0, **fields):
    """A random model whose channels differ as a trained one's do: a few are loud."""
    model = tiny_model(seed, hidden_size=64, intermediate_size=96, time_step_rank=8, **fields)
    make = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight", "conv1d.bias", "conv1d.weight")):
                loud = torch.exp(1.2 * torch.randn(len(parameter), generator=make))
                parameter.mul_(loud.view(-1, *[1] * (parameter.dim() - 1)))
    return model


def specs_of(model, spec, small=False):
    names = [name for name in LARGE if "feed_forward" not in name or model.config.ffn != "none"]
    specs = dict.fromkeys(names, spec)
    return specs | ({"mamba.x_proj": Spec("int8", 0), "mamba.dt_proj": Spec("int8", 0)} if small else {})


def sequences(count=6, length=48, seed=3):
    return from_tokens(torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(seed)))


def started(model, data=None):
    runner = Runner(data or sequences(), batch_tokens=100)
    runner.embed(model.model.embed_tokens)
    return runner


def quantized(model, method, specs, options=None, data=None):
    """All layers quantized in place; the tensors and reports."""
    runner, tensors, reports = started(model, data), {}, []
    for number, layer in enumerate(model.model.layers):
        done = quantize_layer(layer, f"model.layers.{number}", specs, method=method, runner=runner, options=options)
        tensors |= done.tensors
        reports.append(done.report)
    return tensors, reports


def loaded(model, tensors, specs, **extras):
    """A new quantized model from the original's tensors and those that a method made."""
    entry = {name.rpartition(".")[2]: spec.to_dict() for name, spec in specs.items()}
    values = model.config.to_dict() | {"quantization": {"method": "test", "modules": entry, **extras}}
    fresh = MoaiMambaForCausalLM(MoaiMambaConfig(**values)).eval()
    state = model.state_dict() | tensors
    fresh.load_state_dict({name: state[name] for name in fresh.state_dict()})
    linear.set_kernel(fresh, "dequantize")
    return fresh


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


# ---- exactness before rounding


@pytest.mark.parametrize("fields", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("small", [False, True])
def test_awqs_scales_change_nothing_in_float64(tiny_model, fields, small):
    model = structured(tiny_model, **fields).double()
    ids = torch.randint(0, 97, (2, 33))
    before, specs = logits(model, ids), specs_of(model, Spec("int4", 32, False), small)
    runner = started(model)
    for layer in model.model.layers:
        masters = awq.Masters(layer)
        found = awq.targets(layer, specs, conv_scale=True, rotated=())
        expected = 1 + 1 + small + 2 * (model.config.ffn != "none")
        assert len(found) == expected
        for target in found:
            while target.readers[0].partition(".")[0] != ("mamba", "feed_forward")[runner.block]:
                runner.step(layer)
            names = [target.readers[0], *(name for name in target.also if name in specs)]
            by, _ = awq.scale(masters, target, specs, runner.gather(layer, names))
            assert float(by.max() / by.min()) > 1.02, f"{target.readers} are not scaled, which tests nothing"
        runner.advance(layer)
    assert distance(logits(model, ids), before) < 1e-12
    # Token by token, and in chunks, too: the scaled state continues.
    out = model(input_ids=ids[:, :20], use_cache=True)
    rest = [out.logits]
    for step in range(20, 33):
        out = model(input_ids=ids[:, step : step + 1], state=out.state, use_cache=True)
        rest.append(out.logits)
    assert distance(torch.cat(rest, 1).detach(), before) < 1e-12


def test_scaled_training_has_the_same_gradients(tiny_model):
    """With the vector after the convolution gradients of the input are what they were, with recomputation, too."""
    model = structured(tiny_model, num_hidden_layers=1).double()
    other = copy.deepcopy(model)
    masters = awq.Masters(other.model.layers[0])
    target = awq.targets(other.model.layers[0], LARGE, conv_scale=True, rotated=())[1]
    with torch.no_grad():
        statistics = started(other).gather(other.model.layers[0], ["mamba.out_proj"])
        awq.scale(masters, target, specs_of(model, Spec("int4", 32)), statistics)
    ids, gradients = torch.randint(0, 97, (2, 17)), []
    for one, mode in ((model, "none"), (other, "none"), (other, "selective")):
        one.train().set_checkpointing(mode)
        embeds = model.model.embed_tokens(ids).detach().requires_grad_()
        one(inputs_embeds=embeds, labels=ids).loss.backward()
        gradients.append(embeds.grad)
    assert distance(gradients[1], gradients[0]) < 1e-11 and distance(gradients[2], gradients[0]) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_scaled_by_what_their_rounding_leaves(tiny_model, dtype):
    """The columns undo exactly what was done to the stored norm, whatever type that has."""
    layer = structured(tiny_model).model.layers[0].to(dtype)
    masters, before = awq.Masters(layer, torch.bfloat16), layer.input_layernorm.weight.detach().double().clone()
    with torch.no_grad():
        by = masters.divide("input_layernorm", torch.rand(64) + 0.5)
    after = layer.input_layernorm.weight.detach()
    assert torch.equal(after.to(torch.bfloat16).to(dtype), after)
    torch.testing.assert_close(after.double() * by.double(), before, rtol=1e-6, atol=0)


def test_scales_that_meet_activations_or_stored_matrices_are_powers_of_two(tiny_model):
    model = structured(tiny_model)
    specs = {name: Spec("int4", 32, False) for name in ("mamba.out_proj", "feed_forward.down_proj")}
    first = model.model.layers[0]
    up, x_proj = first.feed_forward.up_proj.weight.detach().clone(), first.mamba.x_proj.weight.detach().clone()
    tensors, _ = quantized(model, "awq", specs)
    kept = {name.partition("layers.0.")[2] for name in tensors if "layers.0." in name}
    assert {"mamba.conv_scale", "mamba.x_proj.weight", "feed_forward.up_proj.weight"} <= kept
    assert torch.equal(tensors["model.layers.0.mamba.conv_scale"].log2() % 1, torch.zeros(128))
    for name, old in (("feed_forward.up_proj", up), ("mamba.x_proj", x_proj)):
        ratio = (tensors[f"model.layers.0.{name}.weight"] / old).log2()
        assert torch.equal(ratio, ratio.round()) and bool((ratio != 0).any())


@pytest.mark.parametrize("names", [("mamba.out_proj",), rotate.ROTATABLE])
def test_rotation_changes_nothing_but_rounding(tiny_model, names):
    """At 8 bits a row the rotated model is the original almost exactly; folding alone is exact (test_hadamard.py)."""
    model = structured(tiny_model)
    ids, original = torch.randint(0, 97, (2, 40)), copy.deepcopy(model)
    specs = specs_of(model, Spec("int8", 32))
    tensors, _ = quantized(model, "gptq", specs, Options(rotate=names))
    made = loaded(original, tensors, specs, rotate=[name.rpartition(".")[2] for name in names])
    assert distance(logits(made, ids), logits(original, ids)) < 0.05
    assert distance(logits(made, ids), logits(model, ids)) < 1e-4
    assert distance(logits(loaded(original, tensors, specs), ids), logits(original, ids)) > 0.3, "it is needed"


# ---- what comes out


@pytest.mark.parametrize("fields", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize(
    ("method", "symmetric", "options"),
    [
        ("rtn", True, Options()),
        ("gptq", True, Options(rotate=("mamba.out_proj",))),
        ("gptq", False, Options(order="columns")),
        ("awq", False, Options()),
        ("awq", True, Options(conv_scale=False, overrides={"mamba.out_proj": "gptq"})),
    ],
)
def test_tensors_load_and_compute_what_the_layer_did(tiny_model, fields, method, symmetric, options):
    model = structured(tiny_model, **fields)
    original, ids = copy.deepcopy(model), torch.randint(0, 97, (2, 40))
    specs = specs_of(model, Spec("int4", 32, symmetric), small=True)
    tensors, reports = quantized(model, method, specs, options)
    extras = {"rotate": [name.rpartition(".")[2] for name in options.rotate]}
    made = loaded(original, tensors, specs, conv_scale=method == "awq" and options.conv_scale, **extras)
    # Adjusted tensors aside, nothing of the rest is touched.
    assert {name for name in tensors if name in original.state_dict()} <= {
        f"model.layers.{n}.{part}.weight"
        for n in range(2)
        for part in ("input_layernorm", "pre_ff_layernorm", "mamba.dt_layernorm", "mamba.x_proj")
    }
    assert distance(logits(made, ids), logits(model, ids)) < 1e-4
    for report in reports:
        assert set(report) == set(specs)
        for name, one in report.items():
            assert 0 < one["error"] < (0.3 if "4" in one["format"] else 0.02), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", Options(rotate=rotate.ROTATABLE)),
        ("awq", Options(stored=torch.bfloat16)),
        ("awq", Options(rotate=("mamba.out_proj",))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_can_go_on_from_the_layers_that_it_wrote(tiny_model, dtype, method, options):
    """The hidden states behind quantized layers are, bit for bit, those behind the same layers loaded again: an
    interrupted run ends as one that wasn't.
    """
    model = structured(tiny_model).to(torch.bfloat16).to(dtype)
    original, specs = copy.deepcopy(model), specs_of(model, Spec("int4", 32, method == "gptq"), small=True)
    runner, tensors = started(model), {}
    for number, layer in enumerate(model.model.layers):
        done = quantize_layer(layer, f"model.layers.{number}", specs, method=method, runner=runner, options=options)
        tensors |= {
            name: t.to(dtype) if t.is_floating_point() and "scales" not in name and "zeros" not in name else t
            for name, t in done.tensors.items()
        }
    extras = {"rotate": [name.rpartition(".")[2] for name in options.rotate], "conv_scale": method == "awq"}
    made, again = loaded(original, tensors, specs, **extras), started(original)
    for layer in made.to(dtype).model.layers:
        again.advance(layer)
    assert torch.equal(again.hidden, runner.hidden)


def test_the_order_is_gptq_awq_rtn(tiny_model):
    """On inputs with loud and correlated channels, by output error of each matrix and of the model."""
    base = structured(tiny_model)
    ids, errors = torch.randint(0, 97, (4, 48)), {}
    for method, sweeps in (("rtn", 2), ("awq", 0), ("awq", 2), ("gptq", 0), ("gptq", 2)):
        model = copy.deepcopy(base)
        specs = specs_of(model, Spec("int4", 32))
        _, reports = quantized(model, method, specs, data=sequences(16, 64), options=Options(sweeps=sweeps))
        errors[method, sweeps] = sum(one["error"] for report in reports for one in report.values())
        if method != "rtn":
            assert all(one["error"] < one["nearest"] for report in reports for one in report.values())
        errors[method, sweeps, "model"] = distance(logits(model, ids), logits(base, ids))
    assert errors["gptq", 0] < errors["awq", 0] < errors["rtn", 2]
    assert errors["gptq", 2] < errors["gptq", 0] and errors["awq", 2] < errors["awq", 0]
    for method in ("awq", "gptq"):
        assert errors[method, 2, "model"] < errors["rtn", 2, "model"]


def test_each_matrix_sees_the_quantized_ones_before_it(tiny_model):
    """The moments that out_proj is quantized with are those behind the quantized in_proj, of the second layer those
    behind the quantized first.
    """
    model = structured(tiny_model)
    specs, seen = specs_of(model, Spec("int4", 32)), []
    plain = layerwise._Layer._quantize

    def spy(self, module, statistics, *rest):
        seen.append((f"{self.name}.{module}", statistics))
        plain(self, module, statistics, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise._Layer, "_quantize", spy)
        quantized(model, "gptq", specs)
    # The model now computes with quantized matrices throughout: so did everything before each of them.
    runner = started(model)
    found = {}
    for number, layer in enumerate(model.model.layers):
        for stage in layerwise.STAGES:
            if names := [name for name in stage if name in specs]:
                if runner.block != (names[0].startswith("feed")):
                    runner.step(layer)
                one = runner.gather(layer, names[:1])[names[0]]
                found |= {f"model.layers.{number}.{name}": one for name in names}
        runner.advance(layer)
    assert [name for name, _ in seen] == list(found)
    for name, statistics in seen:
        torch.testing.assert_close(statistics.hessian, found[name].hessian, rtol=1e-6, atol=1e-9)


def test_two_runs_give_the_same_bits(tiny_model):
    base = structured(tiny_model)
    runs = [quantized(copy.deepcopy(base), "awq", specs_of(base, Spec("int4", 32, False)))[0] for _ in range(2)]
    assert runs[0].keys() == runs[1].keys() and all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_round_to_nearest_needs_no_data_and_any_format(tiny_model):
    model = structured(tiny_model)
    specs = {
        "mamba.in_proj": Spec("int4", 32),
        "mamba.out_proj": Spec("fp8", 0),
        "feed_forward.up_proj": Spec("int8", 0),
    }
    done = quantize_layer(model.model.layers[0], "model.layers.0", specs)
    assert {name.split(".")[-1] for name in done.tensors} == {"qweight", "scales"}
    assert 0.02 < done.report["mamba.in_proj"]["error"] < 0.15 and done.report["mamba.out_proj"]["error"] < 0.04


def test_refusals(tiny_model):
    layer = structured(tiny_model).model.layers[0]
    four = Spec("int4", 32)
    for message, specs, method, options in (
        ("no matrix 'mamba.conv1d'", {"mamba.conv1d": four}, "rtn", None),
        ("unknown method 'best'", {"mamba.in_proj": four}, "best", None),
        ("gptq needs calibration data", {"mamba.in_proj": four}, "gptq", None),
        ("group size 128 doesn't divide 64", {"mamba.in_proj": Spec("int4", 128)}, "rtn", None),
        (
            "inputs of mamba.in_proj can't be rotated",
            {"mamba.in_proj": four},
            "rtn",
            Options(rotate=("mamba.in_proj",)),
        ),
    ):
        with pytest.raises(UsageError, match=message):
            quantize_layer(layer, "model.layers.0", specs, method=method, options=options)
    with torch.no_grad():
        layer.mamba.in_proj.weight[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mamba\.in_proj\.weight: 1 of \d+ values are NaN"):
        quantize_layer(layer, "model.layers.0", {"mamba.in_proj": four})


def test_config_with_a_rotation_that_makes_no_sense_is_refused(tiny_model):
    config = tiny_model(hidden_size=64).config.to_dict()
    modules = {"out_proj": Spec("int4", 32).to_dict()}
    with pytest.raises(UsageError, match="rotate must be a list"):
        MoaiMambaForCausalLM(MoaiMambaConfig(**config | {"quantization": {"modules": modules, "rotate": "out_proj"}}))
