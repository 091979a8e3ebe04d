"""Quantized models as folders: moai's own decoded for every format, and the layouts of other tools written and read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moai_core import MoaiMambaForCausalLM, checkpoint, storage
from moai_core.convert import convert, hf, interchange, packed, parity
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import hadamard, layout_gptq, linear
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quantize.disk import quantize_folder
from moai_core.quantize.plan import Settings

# Rows and columns in multiples of 32, an odd number of groups in one matrix (96 = 3 groups of 32).
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "time_step_rank": 4,
    "state_size": 5,
}
LARGE = ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
INT4, INT8 = Spec("int4", 32), Spec("int8", 0)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """The comparison at each conversion's end, with fewer greedy tokens."""
    monkeypatch.setattr(parity, "GREEDY", 4)


@pytest.fixture
def make(tiny_model, tmp_path):
    """A function: writes a quantized moai model; returns (folder, the plain model with the same values)."""

    def make(name="quantized", *, specs=None, tied=False, dtype=torch.float32, extra=None, tokenizer=None, **fields):
        specs = {n: INT4 for n in LARGE} if specs is None else specs
        plain = tiny_model(tie_word_embeddings=tied, **{**SHAPE, **fields}).to(dtype)
        modules = {n: spec.to_dict() for n, spec in specs.items()}
        quantization = {"method": "rtn", "modules": modules, **(extra or {})}
        config = type(plain.config)(
            **{**plain.config.to_dict(), "quantization": quantization, "use_quantization": True}
        )
        quantized = MoaiMambaForCausalLM(config).to(dtype)
        rounded = plain.state_dict()
        state = dict(rounded)
        for module, layer in linear.quantized(quantized).items():
            weight = state.pop(f"{module}.weight").float()
            if (extra or {}).get("rotate") and module.endswith("out_proj"):
                weight = hadamard.fold(weight)
            tensors = FORMATS[layer.spec.format].encode(layer.spec, weight)
            values = decode(layer.spec, tensors)
            if (extra or {}).get("rotate") and module.endswith("out_proj"):
                values = hadamard.unfold(values)
            rounded[f"{module}.weight"] = values
            state |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        if (extra or {}).get("conv_scale"):
            for layer in range(plain.config.num_hidden_layers):
                name_ = f"model.layers.{layer}.mamba"
                scale = 2.0 ** torch.randint(-2, 3, (2 * SHAPE["hidden_size"],))
                state[f"{name_}.conv_scale"] = scale
                for reader in ("x_proj", "out_proj"):
                    rounded[f"{name_}.{reader}.weight"] = rounded[f"{name_}.{reader}.weight"].float() * scale
        if tied:
            state.pop("lm_head.weight", None)
            rounded["lm_head.weight"] = rounded["model.embed_tokens.weight"]
        quantized.load_state_dict(state, strict=not tied)
        quantized.tie_weights()
        checkpoint.save_model(tmp_path / name, quantized, tokenizer)
        plain = plain.float()
        plain.load_state_dict(rounded)
        return tmp_path / name, plain

    return make


def stored(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def equal(one, two):
    return one.keys() == two.keys() and all(
        one[n].dtype == two[n].dtype
        and torch.equal(one[n].view(-1).view(torch.uint8), two[n].view(-1).view(torch.uint8))
        for n in one
    )


@torch.no_grad()
def logits(model, seed=3):
    linear.set_kernel(model, "dequantize")
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(seed))
    return model(ids, use_cache=False).logits


def close(one, two):
    return (one - two).norm() < 1e-5 * two.norm()


# ---- moai's own


FORMATS_OF = {
    "int4": {n: INT4 for n in LARGE},
    "int4 asymmetric, embeddings int8": {n: Spec("int4", 32, False) for n in LARGE} | {"embed_tokens": INT8, "lm_head": INT8},
    "int8, small ones too": {n: INT8 for n in (*LARGE, "x_proj", "dt_proj")},
    "mixed": {"in_proj": Spec("int4", 64), "out_proj": INT8, "model.layers.0.feed_forward.up_proj": Spec("nvfp4", 0)},
    "fp8": {n: Spec("fp8", 0) for n in LARGE},
    "mxfp4": {n: Spec("mxfp4", 0) for n in LARGE},
    "nf4": {"in_proj": Spec("nf4", 0), "out_proj": Spec("nf4_double", 0), "gate_proj": Spec("bnb8", 0)},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS_OF)
def test_a_quantized_model_is_decoded_for_other_formats(name, make, tmp_path):
    folder, plain = make(specs=FORMATS_OF[name])
    report = convert(folder, tmp_path / "out", "jamba", check=name == "mixed")
    if name == "mixed":
        assert report["parity"]["max_delta"] < 1e-4 * max(1, report["parity"]["largest"])
    assert any("quantized matrices decoded to fp32" in note for note in report["notes"])
    convert(tmp_path / "out", tmp_path / "back", "moai", check=False)
    again = checkpoint.load_model(tmp_path / "back")
    assert not linear.quantized(again) and again.config.use_quantization is False
    assert equal({n: t.float() for n, t in again.state_dict().items()}, plain.state_dict())
    assert close(logits(again), logits(plain))


def test_gguf_of_a_quantized_model(make, tmp_path):
    from moai_core.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer("moai_tiny")
    specs = {n: INT4 for n in LARGE} | {"embed_tokens": INT8, "lm_head": INT8}
    folder, plain = make(specs=specs, tokenizer=tokenizer, vocab_size=len(tokenizer))
    report = convert(folder, tmp_path / "model.gguf", "gguf")
    assert report["parity"].get("max_delta", 0) < 1e-4 * report["parity"].get("largest", 1)
    convert(tmp_path / "model.gguf", tmp_path / "back", "moai", check=False)
    again = checkpoint.load_model(tmp_path / "back").state_dict()
    assert equal({n: t.float() for n, t in again.items()}, plain.state_dict())


def test_tied_embeddings_and_bf16(make, tmp_path):
    specs = {n: INT4 for n in LARGE} | {"embed_tokens": INT8}
    folder, plain = make(specs=specs, tied=True, dtype=torch.bfloat16)
    report = convert(folder, tmp_path / "out", "jamba")
    assert report["parity"]["max_delta"] < 1e-4
    convert(folder, tmp_path / "small", "jamba", outtype="bf16")
    assert stored(tmp_path / "small")["model.layers.0.mamba.in_proj.weight"].dtype == torch.bfloat16
    convert(tmp_path / "out", tmp_path / "back", "moai", check=False)
    assert close(logits(checkpoint.load_model(tmp_path / "back")), logits(plain))


@pytest.mark.parametrize("extra", [{"rotate": ["out_proj"]}, {"conv_scale": True}])
def test_rotation_and_the_scale_after_the_convolution_are_folded(extra, make, tmp_path):
    folder, plain = make(extra=extra)
    report = convert(folder, tmp_path / "out", "jamba")
    assert report["parity"]["max_delta"] < 1e-4 * max(1, report["parity"]["largest"])
    convert(tmp_path / "out", tmp_path / "back", "moai", check=False)
    again = checkpoint.load_model(tmp_path / "back")
    assert close(logits(again), logits(plain)) and again.config.quantization is None
    # And into moai: what stands alone stays quantized, the rest is fp32
    convert(folder, tmp_path / "moai", "moai", check=False)
    kept = linear.quantized(checkpoint.load_model(tmp_path / "moai"))
    assert {n.rpartition(".")[2] for n in kept} == set(LARGE) - {"out_proj"}
    assert close(logits(checkpoint.load_model(tmp_path / "moai")), logits(plain))


def test_moai_to_moai_stays_quantized_unless_a_type_is_asked_for(make, tmp_path):
    folder, plain = make(specs={**{n: INT4 for n in LARGE}, "lm_head": INT8})
    report = convert(folder, tmp_path / "copy", "moai")
    assert "11 quantized matrices kept as they are" in report["notes"] and report["parity"]["max_delta"] == 0
    assert equal(stored(tmp_path / "copy"), stored(folder))
    assert config(tmp_path / "copy")["quantization"]["modules"] == config(folder)["quantization"]["modules"]
    assert config(tmp_path / "copy")["dtype"] == "float32" and config(tmp_path / "copy")["quantization_bits"] == 4
    report = convert(folder, tmp_path / "plain", "moai", outtype="f32", check=False)
    assert "11 quantized matrices decoded to fp32" in report["notes"]
    assert config(tmp_path / "plain")["quantization"] is None
    assert close(logits(checkpoint.load_model(tmp_path / "plain")), logits(plain))
    convert(folder, tmp_path / "half", "moai", outtype="bf16", check=False)
    assert {t.dtype for n, t in stored(tmp_path / "half").items() if n.endswith("proj.weight")} == {torch.bfloat16}


def test_single_layers_may_differ(make, tmp_path):
    specs = {"in_proj": INT4, "model.layers.1.mamba.in_proj": INT8, "model.layers.0.feed_forward.up_proj": INT4}
    folder, plain = make(specs=specs)
    convert(folder, tmp_path / "copy", "moai", check=False)
    assert equal(stored(tmp_path / "copy"), stored(folder))
    assert close(logits(checkpoint.load_model(tmp_path / "copy")), logits(plain))


def edit(folder, change):
    """Changes the folder's tensors and drops its manifest, which would tell."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    (folder / "manifest.json").unlink(missing_ok=True)


def in_proj(leaf, layer=0):
    return f"model.layers.{layer}.mamba.in_proj.{leaf}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(in_proj("scales")), "scales is missing"),
        (lambda t: t.pop(in_proj("qweight")), "config.json calls it int4, but there is no qweight"),
        (lambda t: t.update({in_proj("scales"): t[in_proj("scales")].float()}), "scales has the type float32, expected float16"),
        (lambda t: t.update({in_proj("scales"): t[in_proj("scales")][:-1]}), r"scales has the shape .* expected \[256, 2\]"),
        (lambda t: t.update({in_proj("qweight"): t[in_proj("qweight")][:, :-1]}), "group size 32 doesn't divide 62"),
        (lambda t: t.update({in_proj("qweight"): t[in_proj("qweight")].flatten()}), "expected that of a matrix"),
        (lambda t: t.update({in_proj("weight"): torch.zeros(256, 64)}), "weight has no place in this layout"),
    ],
)  # fmt: skip
def test_damaged_folders_of_moai(change, message, make, tmp_path):
    folder, _ = make()
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(folder, tmp_path / "out", "jamba")
    assert "\n" not in caught.value.message and not (tmp_path / "out").exists()


def test_adapters_are_not_left_behind_silently(make, tmp_path):
    folder, _ = make()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has LoRA adapters"):
        convert(folder, tmp_path / "out", "jamba")


# ---- other tools' layouts, written


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("to", interchange.FORMATS)
def test_there_and_back_bit_for_bit(to, symmetric, make, tmp_path):
    spec = Spec("int4", 32, symmetric)
    folder, plain = make(specs={n: spec for n in LARGE})
    report = convert(folder, tmp_path / "out", to, check=not symmetric)
    if not symmetric:
        assert report["parity"]["max_delta"] < 1e-4 and f"({to} decoded by moai)" in report["parity"]["runtimes"][1]
    count = 10 if to == "compressed-tensors" else 13  # the null layer's feed-forward among them
    assert any(f"{count} quantized matrices kept bit for bit, 0 decoded" in note for note in report["notes"])
    names = stored(tmp_path / "out")
    assert not any(n.startswith(("model.layers.0.mamba.x_proj.q", "model.layers.0.mamba.dt_proj.q")) for n in names)
    assert config(tmp_path / "out")["quantization_config"]["quant_method"] == to
    # Back: the same bits
    report = convert(tmp_path / "out", tmp_path / "back", "moai", check=False)
    assert "10 quantized matrices kept as they are" in report["notes"]
    assert report["source"]["format"] == to
    before, after = stored(folder), stored(tmp_path / "back")
    if to == "awq" and symmetric:
        zeros = {n for n in after if n.endswith(".zeros")}
        assert len(zeros) == 10 and all((after.pop(n) == 8).all() for n in zeros)
        spec = Spec("int4", 32, False)
    assert equal(before, after)
    quantization = config(tmp_path / "back")["quantization"]
    assert quantization == {"method": to, "modules": {n: spec.to_dict() for n in sorted(LARGE)}}
    assert close(logits(checkpoint.load_model(tmp_path / "back")), logits(plain))
    # And once more forth
    convert(tmp_path / "back", tmp_path / "again", to, check=False)
    assert equal(stored(tmp_path / "again"), stored(tmp_path / "out"))


@pytest.mark.parametrize("to", interchange.FORMATS)
def test_what_a_layout_can_not_hold_is_decoded(to, make, tmp_path):
    specs = {n: INT4 for n in LARGE} | {
        "embed_tokens": INT8,
        "lm_head": INT8,
        "out_proj": Spec("nvfp4", 0),
        "x_proj": INT8,
    }
    folder, plain = make(specs=specs, dtype=torch.bfloat16)
    report = convert(folder, tmp_path / "out", to, check=to == "gptq")
    assert any("6 decoded to bfloat16" in note for note in report["notes"])
    names = stored(tmp_path / "out")
    for name in ("lm_head.weight", "model.layers.0.mamba.out_proj.weight", "model.layers.0.mamba.x_proj.weight"):
        assert names[name].dtype == torch.bfloat16
        assert torch.equal(names[name], plain.state_dict()[name].bfloat16())
    assert config(tmp_path / "out")["dtype"] == "bfloat16"
    listed = json.dumps(config(tmp_path / "out")["quantization_config"])
    assert ("out_proj" in listed) == (to == "awq"), "awq lists what isn't quantized, the others what is"


def test_mixed_settings(make, tmp_path):
    """compressed-tensors has groups of modules; of GPTQ the setting of most numbers is taken."""
    specs = {n: INT4 for n in LARGE} | {
        "out_proj": Spec("int8", 64),
        "model.layers.1.feed_forward.up_proj": Spec("int4", 64),
    }
    folder, _plain = make(specs=specs)
    report = convert(folder, tmp_path / "ct", "compressed-tensors", check=False)
    assert "10 quantized matrices kept bit for bit, 0 decoded to float32" in report["notes"]
    groups = config(tmp_path / "ct")["quantization_config"]["config_groups"]
    assert sorted((g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups.values()) == [
        (4, 32),
        (4, 64),
        (8, 64),
    ]
    convert(tmp_path / "ct", tmp_path / "back", "moai", check=False)
    assert equal(stored(tmp_path / "back"), stored(folder))
    report = convert(folder, tmp_path / "gptq", "gptq")
    assert "8 quantized matrices kept bit for bit, 4 decoded to float32" in report["notes"]
    assert config(tmp_path / "gptq")["quantization_config"]["modules_in_block_to_quantize"] == [
        ["mamba.in_proj"], ["feed_forward.gate_proj"], ["feed_forward.down_proj"],
    ]  # fmt: skip


def test_rotation_and_conv_scale_leave_out_proj_unquantized(make, tmp_path):
    for extra in ({"rotate": ["out_proj"]}, {"conv_scale": True}):
        folder, _ = make(str(extra)[2:6], extra=extra)
        out = tmp_path / f"out-{str(extra)[2:6]}"
        report = convert(folder, out, "gptq", check=False)
        assert any("kept bit for bit, " in note for note in report["notes"])
        assert "model.layers.0.mamba.out_proj.weight" in stored(out)
        assert "model.layers.0.mamba.in_proj.qweight" in stored(out)


def test_eight_bits(make, tmp_path):
    folder, _plain = make(specs={n: Spec("int8", 32) for n in LARGE})
    for to in ("gptq", "compressed-tensors"):
        convert(folder, tmp_path / to, to, check=to == "gptq")
        convert(tmp_path / to, tmp_path / f"{to}-back", "moai", check=False)
        assert equal(stored(tmp_path / f"{to}-back"), stored(folder))
    with pytest.raises(CheckpointError, match="no matrix is quantized so that awq can hold it"):
        convert(folder, tmp_path / "awq", "awq")


def test_what_is_refused(make, tmp_path, tiny_model):
    folder, _ = make()
    with pytest.raises(UsageError, match="--outtype f32: --to gptq keeps the numbers"):
        convert(folder, tmp_path / "out", "gptq", outtype="f32")
    checkpoint.save_model(tmp_path / "plain", tiny_model(**SHAPE))
    for to in interchange.FORMATS:
        with pytest.raises(CheckpointError, match=f"no matrix is quantized so that {to} can hold it"):
            convert(tmp_path / "plain", tmp_path / "out", to)
    folder, _ = make("asymmetric", specs={n: Spec("int4", 32, False) for n in LARGE})
    edit(folder, lambda t: t[in_proj("zeros")].fill_(7.25))
    with pytest.raises(CheckpointError, match=r"in_proj: a zero point of 7.25 can't be stored") as caught:
        convert(folder, tmp_path / "out", "gptq", check=False)
    assert caught.value.hint and not (tmp_path / "out").exists()


# ---- other tools' layouts, read


@pytest.fixture
def foreign(make, tmp_path):
    """A GPTQ folder in the shape of a Jamba, as other tools write it."""
    folder, plain = make()
    convert(folder, tmp_path / "gptq", "gptq", check=False)
    (tmp_path / "gptq" / "manifest.json").unlink()
    return tmp_path / "gptq", plain


def reconfigure(folder, change):
    values = config(folder)
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_what_auto_gptq_wrote(foreign, tmp_path):
    """Another name of the weights, quantize_config.json alone, no g_idx, a bias of zeros beside every matrix."""
    folder, plain = foreign

    def change(tensors):
        for name in [n for n in tensors if n.endswith("g_idx")]:
            del tensors[name]
        for name in [n for n in tensors if n.endswith("qweight")]:
            tensors[name.replace("qweight", "bias")] = torch.zeros(tensors[name].shape[1]).half()

    edit(folder, change)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    reconfigure(folder, lambda values: values.pop("quantization_config"))
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
           "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}  # fmt: skip
    (folder / "quantize_config.json").write_text(json.dumps(old))
    report = convert(folder, tmp_path / "moai", "moai")
    assert report["source"]["format"] == "gptq" and report["parity"]["max_delta"] < 1e-4
    assert close(logits(checkpoint.load_model(tmp_path / "moai")), logits(plain))
    # In two files with an index
    tensors = load_file(folder / "gptq_model-4bit-32g.safetensors")
    (folder / "gptq_model-4bit-32g.safetensors").unlink()
    places = {n: f"gptq_model-4bit-32g-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file)
    index = folder / "gptq_model-4bit-32g.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert(folder, tmp_path / "again", "moai", check=False)
    assert equal(stored(tmp_path / "again"), stored(tmp_path / "moai"))
    index.write_text(json.dumps({"weight_map": places | {"x": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="points to"):
        convert(folder, tmp_path / "evil", "moai")


def test_what_autoawq_wrote(make, tmp_path):
    folder, _plain = make(specs={n: Spec("int4", 32, False) for n in LARGE})
    convert(folder, tmp_path / "awq", "awq", check=False)
    reconfigure(tmp_path / "awq", lambda values: values.pop("quantization_config"))
    (tmp_path / "awq" / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"})
    )
    convert(tmp_path / "awq", tmp_path / "back", "moai")
    assert equal(stored(tmp_path / "back"), stored(folder))


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_models_in_the_shape_of_a_mamba(kind, tmp_path):
    """Also with dt_proj quantized, which keeps its bias, and x_proj; as the old tools did it to every matrix."""
    import transformers

    name = {"mamba": "Mamba", "falcon_mamba": "FalconMamba"}[kind]
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, state_size=16, time_step_rank=32, initializer_range=0.2,
        use_bias=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(made)
    model.save_pretrained(tmp_path / "plain")
    expected, tensors = load_file(tmp_path / "plain" / "model.safetensors"), {}
    for tensor, weight in expected.items():
        if tensor.endswith("proj.weight"):
            quantized = FORMATS["int4"].encode(INT4, weight)
            tensors |= {
                tensor.replace("weight", leaf): make(quantized, INT4) for leaf, make in layout_gptq.MADE.items()
            }
            expected[tensor] = decode(INT4, quantized)
        else:
            tensors[tensor] = weight
    shutil.copytree(tmp_path / "plain", tmp_path / "gptq")
    save_file(tensors, tmp_path / "gptq" / "model.safetensors")
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    report = convert(tmp_path / "gptq", tmp_path / "moai", "moai")
    assert report["source"]["format"] == "gptq" and report["parity"]["max_delta"] < 1e-4
    assert "8 quantized matrices kept as they are" in report["notes"]
    to = {"mamba": "transformers-mamba", "falcon_mamba": "falcon-mamba"}[kind]
    convert(tmp_path / "gptq", tmp_path / "back", to, check=False)
    assert all(torch.equal(t, expected[n]) for n, t in stored(tmp_path / "back").items())


def test_act_order_is_decoded(foreign, tmp_path):
    """Columns of a group that are no neighbours: the values are right, though not quantized any more."""
    folder, _plain = foreign
    index = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    edit(folder, lambda t: t.update({in_proj("g_idx"): index.int()}))
    reconfigure(folder, lambda values: values["quantization_config"].update(desc_act=True))
    report = convert(folder, tmp_path / "moai", "moai")
    assert "9 quantized matrices kept as they are, 1 quantized matrices decoded to fp32" in report["notes"]
    assert report["parity"]["max_delta"] < 1e-4
    before = stored(folder)
    q = torch.stack([(before[in_proj("qweight")].T >> (4 * i)) & 15 for i in range(8)], -1).flatten(1)
    expected = (q - 8) * before[in_proj("scales")].T.float()[:, index]
    assert torch.equal(stored(tmp_path / "moai")[in_proj("weight")], expected)
    assert {t.dtype for n, t in stored(tmp_path / "moai").items() if n.endswith(".weight")} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[in_proj("g_idx")].fill_(2), "g_idx holds 2, there are groups 0 to 1"),
        (lambda t: t[in_proj("g_idx")].fill_(-1), "g_idx holds -1"),
        (lambda t: t.pop(in_proj("qzeros")), "qzeros is missing"),
        (lambda t: t.pop(in_proj("qweight")), "in_proj"),
        (lambda t: t.update({in_proj("qzeros"): t[in_proj("qzeros")][:, :-1]}), "qzeros has the shape"),
        (lambda t: t.update({in_proj("qweight"): t[in_proj("qweight")][:-1]}), "groups of 32 don't divide 56 columns"),
        (lambda t: t.update({in_proj("qweight"): t[in_proj("qweight")].long()}), "qweight has the type int64"),
        (lambda t: t.update({in_proj("weight"): torch.zeros(256, 64)}), "beside a quantized matrix"),
        (lambda t: t.update({in_proj("bias"): torch.ones(256)}), "in_proj.bias"),
        (lambda t: t[in_proj("qzeros")].add_(1), "a zero point is 9"),
        (lambda t: t[in_proj("scales")].fill_(float("nan")), "scales hold NaN"),
    ],
)  # fmt: skip
def test_damaged_folders_of_others(change, message, foreign, tmp_path):
    folder, _ = foreign
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(folder, tmp_path / "out", "moai", check=False)
    assert "\n" not in caught.value.message and caught.value.exit_code == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_files(keep, foreign, tmp_path):
    folder, _ = foreign
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: keep if isinstance(keep, int) else int(keep * len(raw))])
    with pytest.raises(CheckpointError, match=r"truncated|not valid JSON|header") as caught:
        convert(folder, tmp_path / "out", "moai")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(bits=3), "gptq: bits is 3"),
        (lambda q: q.update(group_size=48), "groups of 48 don't divide|expected"),
        (lambda q: q.update(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (lambda q: q.update(quant_method="bitsandbytes"), "the model is quantized by 'bitsandbytes'"),
        (lambda q: q.update(quant_method="compressed-tensors"), "config_groups is missing"),
        (lambda q: q.update(quant_method="compressed-tensors", format="float-quantized"), "format is 'float-quantized'"),
        (lambda q: q.update(quant_method="compressed-tensors", config_groups={"a": {"weights": 1}}), "config_groups.a has no weights"),
        (lambda q: q.update(quant_method="compressed-tensors", config_groups={"a": {"weights": {}, "input_activations": {"num_bits": 8}}}), "quantizes activations"),
    ],
)  # fmt: skip
def test_configs_that_can_not_be_read(change, message, foreign, tmp_path):
    folder, _ = foreign
    reconfigure(folder, lambda values: change(values["quantization_config"]))
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", "moai")
    reconfigure(folder, lambda values: values.update(quantization_config=[1]))
    with pytest.raises(CheckpointError, match="must be a JSON object"):
        hf.read_tensors(folder)


def test_no_pattern_of_a_stranger_runs(make, tmp_path):
    """compressed-tensors chooses modules by regular expressions; ours goes by shapes."""
    folder, _ = make()
    convert(folder, tmp_path / "ct", "compressed-tensors", check=False)
    slow = "re:(a+)+" * 20 + "$"
    reconfigure(tmp_path / "ct", lambda v: v["quantization_config"]["config_groups"]["group_0"].update(targets=[slow]))
    convert(tmp_path / "ct", tmp_path / "back", "moai", check=False)
    assert equal(stored(tmp_path / "back"), stored(folder))


def test_tensors_are_read_one_at_a_time(make, monkeypatch):
    """Nothing but g_idx, scales and the null layer's matrices is read before it is written."""
    folder, _ = make()
    read = []
    load = packed.Loading.__getitem__
    monkeypatch.setattr(packed.Loading, "__getitem__", lambda self, name: read.append(name) or load(self, name))
    from moai_core.convert import moai

    source = moai.read(folder)
    assert read == []
    source.tensors["model.layers.0.mamba.in_proj.weight"].load()
    assert sorted(read) == ["qweight", "scales"]


# ---- moai quantize --format


@pytest.fixture
def plain(tiny_model, tmp_path):
    checkpoint.save_model(tmp_path / "plain", tiny_model(**SHAPE))
    return tmp_path / "plain"


@pytest.mark.parametrize("to", interchange.FORMATS)
def test_quantize_writes_the_layout(to, plain, tmp_path):
    settings = Settings("int4", None, 32, to != "awq", layout=to)
    report = quantize_folder(plain, tmp_path / "out", settings)
    assert any("quantized matrices kept bit for bit, 0 decoded" in note for note in report["notes"])
    storage.verify(tmp_path / "out")
    assert config(tmp_path / "out")["model_type"] == "jamba"
    assert config(tmp_path / "out")["quantization_config"]["quant_method"] == to
    assert {"quantization.json", "generation_config.json", "README.md", "model.safetensors"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert (tmp_path / "out" / "quantize_config.json").exists() == (to == "gptq")
    assert not (tmp_path / "out" / "layout").exists() and not (tmp_path / "out.partial").exists()
    # The same numbers as in moai's own format
    own = Settings("int4", None, 32, to != "awq", embeddings="bf16")
    quantize_folder(plain, tmp_path / "own", own)
    convert(tmp_path / "out", tmp_path / "back", "moai", check=False)
    assert equal(stored(tmp_path / "back"), stored(tmp_path / "own"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(layout="gguf"), "--format can't be 'gguf'"),
        (Settings("fp8", layout="gptq"), "--format gptq holds int4 and int8, not fp8"),
        (Settings("int4", 8, layout="awq"), "--format awq holds int4, not int8"),
        (Settings(rotate=True, layout="gptq"), "--rotate: only moai's own format has it"),
        (Settings(embeddings="int8", layout="awq"), "--embeddings int8: only moai's own format has it"),
    ],
)
def test_settings_that_a_layout_can_not_hold(settings, message, plain, tmp_path):
    with pytest.raises(UsageError, match=message):
        quantize_folder(plain, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_model_without_norms_on_dt_is_refused_before_the_work(tiny_model, tmp_path):
    checkpoint.save_model(tmp_path / "plain", tiny_model(**SHAPE, dt_bc_norm=False))
    with pytest.raises(CheckpointError, match="jamba norms dt, B and C"):
        quantize_folder(tmp_path / "plain", tmp_path / "out", Settings("int4", None, 32, layout="gptq"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
