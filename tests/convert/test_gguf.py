"""GGUF against the gguf package's own reader, numbers and name tables, and back to moai bit for bit.

The keys and tensors that llama.cpp asks for are written out here as its sources have them, not taken from our code."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_helpers import source_of

from moai_core import convert, weights
from moai_core.convert import gguf as ours
from moai_core.convert import gguf_write
from moai_core.convert.gguf_file import inspect
from moai_core.convert.source import Lazy, Options, Refused
from moai_core.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

KEPT = ("A_log", "D", "dt_bias")
KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
SHAPES = {
    "jamba": {},
    "jamba tied, odd sizes": {"tie_word_embeddings": True, "hidden_size": 66, "intermediate_size": 50, "state_size": 7},
    "mamba": {"ffn": "none", "dt_bc_norm": False},
    "falcon-mamba": {"ffn": "none", "dt_bc_norm": True},
    "learned norms, no ffn": {"ffn": "none", "dt_bc_norm": True, "learned": True},
}


@pytest.fixture(scope="module")
def tokenizer_files():
    """A byte-level BPE of 300 tokens with the pattern of GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox, 안녕하세요 안녕 12 345\n\n  x = 'y'"] * 4, trainer)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": template.encode(),
    }


@pytest.fixture
def made_of(tiny_model, tokenizer_files):
    """A function that makes a model and the Source that a folder with it would be."""

    def made(name="jamba", dtype=torch.float32, **more):
        fields = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "state_size": 8,
            **SHAPES[name],
            **more,
        }
        learned = fields.pop("learned", False)
        model = tiny_model(**fields).to(dtype)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("A_log"):
                    parameter.copy_(torch.randn_like(parameter) * 2)
                if (
                    not learned
                    and fields.get("ffn") == "none"
                    and key.endswith(("dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight"))
                ):
                    parameter.fill_(1)
        return model, source_of(model, tokenizer_files)

    return made


def written(source, path, outtype):
    ours.write(source, path, Options("gguf", outtype))
    return gguf.GGUFReader(path)


# ---- what is written, read by the gguf package -------------------------------------------------------


def expected_names(arch, layers, tied, null):
    """llama.cpp's src/models/{mamba,jamba}.cpp, load_arch_tensors."""
    mixer = [
        "attn_norm.weight",
        "ssm_in.weight",
        "ssm_conv1d.weight",
        "ssm_conv1d.bias",
        "ssm_x.weight",
        "ssm_dt.weight",
        "ssm_dt.bias",
        "ssm_a",
        "ssm_d",
        "ssm_out.weight",
    ]
    norms = ["ssm_dt_norm.weight", "ssm_b_norm.weight", "ssm_c_norm.weight"]
    ffn = ["ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"]
    attention = ["attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"]
    names = {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    for layer in range(layers):
        names |= {f"blk.{layer}.{name}" for name in mixer + (norms + ffn if arch == "jamba" else [])}
    return names | ({f"blk.{layers}.{name}" for name in attention + ffn} if null else set())


@pytest.mark.parametrize("name", SHAPES)
def test_keys_and_tensors_are_those_that_llama_cpp_asks_for(made_of, tmp_path, name):
    model, source = made_of(name)
    reader, config = written(source, tmp_path / "m.gguf", "f32"), model.config
    value = {key: field.contents() for key, field in reader.fields.items()}
    arch = "mamba" if name in ("mamba", "falcon-mamba") else "jamba"
    assert value["general.architecture"] == arch
    null = arch == "jamba"
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": 2 + null,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 2 * config.hidden_size,
        "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.time_step_rank,
    }
    assert {key: value[f"{arch}.{key}"] for key in sizes} == sizes
    assert value[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    if arch == "jamba":
        assert value["jamba.attention.head_count_kv"] == [0, 0, 1]
        assert config.hidden_size % value["jamba.attention.head_count"] == 0
    else:
        assert value["mamba.ssm.dt_b_c_rms"] is (name == "falcon-mamba")
    assert value["tokenizer.ggml.model"] == "gpt2" and len(value["tokenizer.ggml.tokens"]) == 320
    assert value["tokenizer.ggml.eos_token_id"] == 2 and value["tokenizer.ggml.eot_token_id"] == 3
    assert value["general.file_type"] == gguf.LlamaFileType.ALL_F32
    found = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
    assert set(found) == expected_names(arch, 2, config.tie_word_embeddings, null)
    d, i, n, r = config.hidden_size, 2 * config.hidden_size, config.state_size, config.time_step_rank
    shapes = {
        "ssm_in.weight": (d, 2 * i),
        "ssm_conv1d.weight": (4, i),
        "ssm_x.weight": (i, r + 2 * n),
        "ssm_dt.weight": (r, i),
        "ssm_a": (n, i),
        "ssm_d": (i,),
        "ssm_out.weight": (i, d),
    }
    assert {key: found[f"blk.1.{key}"] for key in shapes} == shapes  # in ggml's order, columns first
    if null:
        narrow = d // value["jamba.attention.head_count"]
        assert found["blk.2.attn_q.weight"] == (d, d) and found["blk.2.attn_k.weight"] == (d, narrow)


@pytest.mark.parametrize("outtype", KINDS)
@pytest.mark.parametrize("name", ["jamba", "mamba"])
def test_every_number_is_where_the_gguf_package_finds_it(made_of, tmp_path, name, outtype):
    model, source = made_of(name)
    reader = written(source, tmp_path / "m.gguf", outtype)
    arch = gguf.MODEL_ARCH.JAMBA if name == "jamba" else gguf.MODEL_ARCH.MAMBA
    table = gguf.get_tensor_name_map(arch, 2)
    found = {tensor.name: tensor for tensor in reader.tensors}
    seen = set()
    for key, tensor in model.state_dict().items():
        # The package's own table of Jamba's and Mamba's names; dt's bias is called dt_proj.bias there
        theirs = table.get_name(key.replace("mamba.dt_bias", "mamba.dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        assert theirs is not None, key
        entry = found[theirs]
        seen.add(theirs)
        read = torch.from_numpy(np.array(gguf.dequantize(entry.data, entry.tensor_type), dtype=np.float32))
        wanted = (-torch.exp(tensor.double())).float() if key.endswith("A_log") else tensor.float()
        read, wanted = read.reshape(-1), wanted.reshape(-1)
        kind = entry.tensor_type.name
        if tensor.dim() == 1 or "conv1d" in key or key.endswith(("A_log", "norm.weight")):
            assert kind == "F32", key
        elif outtype in ("q8_0", "q4_0"):
            small = "dt_proj" in key or "x_proj" in key or key == "lm_head.weight"
            assert kind == ("F16" if "dt_proj" in key else "Q8_0" if small else KINDS[outtype]), key  # R is 4 here
        else:
            assert kind == KINDS[outtype], key
        if kind in ("F32", "F16", "BF16"):
            narrow = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            assert torch.equal(read, wanted.to(narrow).float()), key
        else:  # half a step; Q4_0 has 8 steps to the one side and 7 to the other
            step = wanted.view(-1, 32).abs().amax(-1, keepdim=True) / (127 if kind == "Q8_0" else 8)
            error = (read - wanted).view(-1, 32).abs()
            assert bool((error <= step * (0.57 if kind == "Q8_0" else 1.01)).all()), key
    zero = {tensor.name for tensor in reader.tensors} - seen
    assert zero == (
        expected_names("jamba", 2, False, True) - expected_names("jamba", 2, False, False) if name == "jamba" else set()
    )
    for theirs in zero:
        data = gguf.dequantize(found[theirs].data, found[theirs].tensor_type)
        assert np.array_equal(data, np.full_like(data, 1 if "norm" in theirs else 0))


# ---- there and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "outtype"),
    [
        (torch.float32, "f32"),
        (torch.bfloat16, "bf16"),
        (torch.bfloat16, None),
        (torch.float16, "f16"),
        (torch.bfloat16, "f32"),
    ],
    ids=str,
)
def test_round_trip_keeps_every_bit(made_of, tmp_path, name, dtype, outtype):
    model, source = made_of(name, dtype)
    ours.write(source, tmp_path / "m.gguf", Options("gguf", outtype))
    back = ours.read(tmp_path / "m.gguf")
    assert back.config == source.config
    wanted = {key: value for key, value in model.state_dict().items() if key in source.tensors}
    assert list(back.tensors) == list(wanted)
    same = dtype if outtype != "f32" else torch.float32
    for key, lazy in back.tensors.items():
        read = lazy.load()
        assert (read.dtype, tuple(read.shape)) == (lazy.dtype, lazy.shape) and lazy.shape == wanted[key].shape
        assert lazy.dtype == (torch.float32 if key.endswith(KEPT) else same), key
        if key.endswith("A_log"):  # stored as -exp(A_log)
            a, b = -torch.exp(wanted[key].double()), -torch.exp(read.double())
            assert bool(((a - b).abs() <= torch.exp(wanted[key].double()) * 2**-23).all())  # 1 ulp of fp32
        else:
            assert torch.equal(read.float(), wanted[key].float()), key
    assert any("null attention layer 2" in note for note in back.notes) == (name not in ("mamba", "falcon-mamba"))
    files = dict(source.files)
    assert back.used_vocab == 300
    assert back.files["tokenizer.json"] == files["tokenizer.json"]
    assert back.files["chat_template.jinja"] == files["chat_template.jinja"]
    assert json.loads(back.files["generation_config.json"])["eos_token_id"] == [2, 3]


def test_paper_initialisation_comes_back_exactly(made_of, tmp_path):
    _, source = made_of("mamba")
    a_log = torch.arange(1, 9).float().log().expand(128, 8).contiguous()
    for key in source.tensors:
        if key.endswith("A_log"):
            source.tensors[key] = Lazy(torch.float32, (128, 8), a_log.clone, key)
    ours.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    assert torch.equal(ours.read(tmp_path / "m.gguf").tensors["model.layers.0.mamba.A_log"].load(), a_log)


def test_quantized_files_are_read_as_the_package_dequantizes_them(made_of, tmp_path):
    """A file by another hand: written with the gguf package, one tensor in each type it can decode."""
    _, source = made_of("mamba", hidden_size=256, num_hidden_layers=1)
    plain = written(source, tmp_path / "plain.gguf", "f32")
    kinds = iter(["Q5_0", "Q5_1", "Q4_1", "Q6_K", "Q4_K", "Q8_0", "F16"])
    writer, wanted = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba"), {}
    for key, field in plain.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "tokenizer.huggingface", "moai.")):
            value, kind = field.contents(), field.types[0]
            writer.add_key_value(key, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    rng = np.random.default_rng(0)
    for tensor in plain.tensors:
        data, kind = np.array(tensor.data), gguf.GGMLQuantizationType.F32
        if (
            len(tensor.shape) == 2
            and "conv1d" not in tensor.name
            and "ssm_a" not in tensor.name
            and data.shape[-1] % 256 == 0
        ):
            kind = gguf.GGMLQuantizationType[next(kinds)]
            try:
                data = gguf.quantize(data, kind)
            except NotImplementedError:  # K-quants: any bytes, with scales that are numbers
                group, size = gguf.GGML_QUANT_SIZES[kind]
                data = rng.integers(0, 60, (data.shape[0], data.shape[1] // group * size), dtype=np.uint8)
        wanted[tensor.name] = gguf.dequantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = ours.read(tmp_path / "other.gguf")
    assert {lazy.dtype for lazy in read.tensors.values()} == {torch.float32}
    assert read.config["hidden_size"] == 256 and read.config["rms_norm_eps"] == 1e-5
    for key, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.layers.0.mamba.in_proj", "blk.0.ssm_in"),
        ("model.layers.0.mamba.x_proj", "blk.0.ssm_x"),
        ("model.layers.0.mamba.out_proj", "blk.0.ssm_out"),
    ):
        assert np.array_equal(read.tensors[f"{key}.weight"].load().numpy(), wanted[f"{theirs}.weight"]), key
    assert any("read as fp32" in note for note in read.notes)


def test_the_command_writes_and_reads_a_model_that_runs(tiny_model, tokenizer_files, tmp_path):
    from moai_core.checkpoint import save_model

    model = tiny_model(vocab_size=320, hidden_size=64)
    save_model(tmp_path / "in", model)
    for name, raw in tokenizer_files.items():
        (tmp_path / "in" / name).write_bytes(raw)
    events = []
    report = convert.convert(
        tmp_path / "in", tmp_path / "m.gguf", "gguf", outtype="f32", check=False, on_event=events.append
    )
    assert report["bytes"] == (tmp_path / "m.gguf").stat().st_size
    done = [event for event in events if event["event"] == "tensor"]
    assert [event["done"] for event in done] == list(range(1, done[0]["total"] + 1))
    convert.convert(tmp_path / "m.gguf", tmp_path / "out", "moai", check=False)
    back, ids = weights.read(tmp_path / "out"), torch.randint(320, (1, 40))
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_an_interrupted_conversion_leaves_nothing(tiny_model, tokenizer_files, tmp_path, monkeypatch):
    from moai_core.checkpoint import save_model

    save_model(tmp_path / "in", tiny_model(vocab_size=320, hidden_size=64))
    for name, raw in tokenizer_files.items():
        (tmp_path / "in" / name).write_bytes(raw)
    encode, calls = gguf_write._encode, []

    def interrupted(block, part):
        calls.append(part.name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(block, part)

    monkeypatch.setattr(gguf_write, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path / "in", tmp_path / "m.gguf", "gguf", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- what can't be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"expand_factor": 3}, "expand_factor of 2, this model has 3"),
        ({"dt_bc_norm": False}, "without norms on dt, B and C"),
        ({"dt_bc_norm_eps": 1e-6}, "one epsilon for all norms, this model has 1e-05 and, for dt, B and C, 1e-06"),
    ],
)
def test_what_llama_cpp_has_no_architecture_for_is_refused(made_of, tmp_path, fields, why):
    _, source = made_of(**fields)
    with pytest.raises(Refused, match=why) as refused:
        ours.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    assert refused.value.exit_code == 3 and refused.value.hint and "moai" in refused.value.hint
    assert not (tmp_path / "m.gguf").exists()


def test_a_transformer_is_refused_with_the_format_that_holds_it(made_of, tmp_path):
    _, source = made_of()
    source.format, source.config = "moai-transformer", {"hidden_size": 64}
    with pytest.raises(Refused, match="this one is moai-transformer") as refused:
        ours.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    assert "qwen3" in refused.value.hint


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/small", "small"),
        ("runs/mine/step-200", "mine-step-200"),
        ("x/models--state-spaces--mamba-130m/snapshots/1e76775f628fbb8d91a28a5b2ed06da73ae1bc9e", "mamba-130m"),
    ],
)
def test_name_and_card_travel(made_of, tmp_path, path, name):
    _, source = made_of("mamba")
    source.path = Path(path)
    source.files["README.md"] = "---\nlicense: mit\nlanguage: [ko, ja]\ntags:\n- mamba\n---\n# 모델\n".encode()
    value = {key: field.contents() for key, field in written(source, tmp_path / "m.gguf", "f32").fields.items()}
    assert (value["general.name"], value["general.license"], value["general.tags"]) == (name, "mit", ["mamba"])
    card = ours.read(tmp_path / "m.gguf").files["README.md"].decode()
    assert "license: mit" in card and "- ko" in card and f"# {name}" in card
    source.files["README.md"] = b"---\nlicense: [\n---\n"  # a card that can't be parsed harms nobody
    assert "general.license" not in written(source, tmp_path / "n.gguf", "f32").fields


def test_numbers_beyond_f16_are_refused(made_of, tmp_path):
    _, source = made_of("mamba")
    key = "model.layers.1.mamba.in_proj.weight"
    source.tensors[key] = source.tensors[key].map(lambda tensor: tensor.index_fill(0, torch.tensor([3]), 1e6))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ssm_in\.weight holds numbers beyond 65504"):
        ours.write(source, tmp_path / "m.gguf", Options("gguf", "f16"))


def test_falcons_other_epsilon_is_told_and_comes_back(made_of, tmp_path):
    _, source = made_of("falcon-mamba", dt_bc_norm_eps=1e-6)
    ours.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    assert any("not with 1e-06" in note for note in source.notes)
    assert ours.read(tmp_path / "m.gguf").config["dt_bc_norm_eps"] == 1e-6


# ---- damaged and hostile files -----------------------------------------------------------------------


@pytest.fixture
def good(made_of, tmp_path):
    _, source = made_of("jamba")
    ours.write(source, tmp_path / "good.gguf", Options("gguf", "f32"))
    return (tmp_path / "good.gguf").read_bytes()


def renamed(raw, old, new):
    assert raw.count(old) == 1 and len(old) == len(new)
    return raw.replace(old, new)


def key_changed(raw, key, form, value):
    """The scalar after `key` and its type replaced."""
    at = raw.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
    new = struct.pack(form, value)
    return raw[:at] + new + raw[at + len(new) :]


DAMAGE = {
    "empty": (lambda raw: b"", "truncated or not a GGUF file"),
    "garbage": (lambda raw: bytes(range(256)) * 20, "not a GGUF file"),
    "another magic": (lambda raw: b"GGML" + raw[4:], "not a GGUF file"),
    "old version": (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "GGUF version 1 can't be read"),
    "big-endian": (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "big-endian"),
    "counts": (lambda raw: raw[:8] + struct.pack("<QQ", 1 << 60, 1 << 60) + raw[24:], "claims 1152921504606846976 tensors"),
    "cut in the header": (lambda raw: raw[:2000], "truncated or damaged header"),
    "cut in the data": (lambda raw: raw[:-5000], "truncated"),
    "length of a string": (lambda raw: raw[:24] + struct.pack("<Q", 1 << 62) + raw[32:], "truncated or damaged header"),
    "not UTF-8": (lambda raw: renamed(raw, b"general.size_label", b"general.size_\xff\xfe\xfd\xfcl"), "not valid UTF-8"),
    "architecture": (lambda raw: renamed(raw, struct.pack("<Q", 5) + b"jamba", struct.pack("<Q", 5) + b"llama"), "the architecture is 'llama'"),
    "missing key": (lambda raw: renamed(raw, b"jamba.ssm.state_size", b"jamba.ssm.state_sizf"), "the key jamba.ssm.state_size is missing"),
    "zero key": (lambda raw: key_changed(raw, b"jamba.ssm.state_size", "<I", 0), "jamba.ssm.state_size can't be 0"),
    "shape": (lambda raw: key_changed(raw, b"jamba.ssm.state_size", "<I", 9), r"blk\.0\.ssm_a has the shape \[128, 8\], the keys make it \[128, 9\]"),
    "layers": (lambda raw: key_changed(raw, b"jamba.block_count", "<I", 4), "block_count is 4, the tensors have 3"),
    "many layers": (lambda raw: key_changed(raw, b"jamba.block_count", "<I", 1 << 30), "block_count is 1073741824"),
    "inner size": (lambda raw: key_changed(raw, b"jamba.ssm.inner_size", "<I", 129), "ssm.inner_size is 129"),
    "wrong type of a key": (lambda raw: key_changed(raw, b"jamba.attention.layer_norm_rms_epsilon", "<f", 7.0), "rms_norm_eps must be a number between 0 and 1"),
    "alignment": (lambda raw: renamed(raw, b"general.file_type", b"general.alignment"), "general.alignment is 0"),
    "tensor missing": (lambda raw: renamed(raw, b"blk.0.ssm_out.weight", b"blk.0.ssm_oot.weight"), r"tensor blk\.0\.ssm_out\.weight is missing"),
    "tensor twice": (lambda raw: renamed(raw, b"blk.0.ffn_gate.weight", b"blk.1.ffn_gate.weight"), r"'blk\.1\.ffn_gate\.weight' appears twice"),
    "tensor unknown": (lambda raw: renamed(raw, b"output_norm.weight", b"output_form.weight"), "output_norm.weight is missing"),
    "tensor's name": (lambda raw: renamed(raw, b"blk.0.ffn_gate.weight", b"../0/ffn gate\x00weights"), "a tensor is called"),
    "experts": (lambda raw: renamed(raw, b"blk.0.ffn_up.weight", b"blk.0.ffn_up_exps.w"), "mixtures of experts can't be converted yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_one_line(good, tmp_path, name):
    change, why = DAMAGE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(good))
    assert ours.detect(path) == "gguf"
    with pytest.raises(CheckpointError, match=why) as error:
        ours.read(path)
    assert "\n" not in error.value.message and str(path) in error.value.message and error.value.exit_code == 3


def test_tensors_outside_or_over_each_other_are_refused(good, tmp_path):
    entries = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "good.gguf").tensors}
    field = entries["blk.1.ssm_out.weight"].field
    at = field.offset + sum(part.nbytes for part in field.parts[:-1])
    for offset, why in ((0, "overlap"), (1 << 50, "truncated")):
        (tmp_path / "bad.gguf").write_bytes(good[:at] + struct.pack("<Q", offset) + good[at + 8 :])
        with pytest.raises(CheckpointError, match=why):
            ours.read(tmp_path / "bad.gguf")
    kind = at - 4
    for value, why in ((250, "has the type 250, which"), (gguf.GGMLQuantizationType.I8, "has the type I8, which")):
        (tmp_path / "bad.gguf").write_bytes(good[:kind] + struct.pack("<I", value) + good[kind + 4 :])
        with pytest.raises(CheckpointError, match=why):
            ours.read(tmp_path / "bad.gguf")


def test_attention_that_does_something_is_refused(made_of, tmp_path, monkeypatch):
    _, source = made_of("jamba")
    null = gguf_write._null_layer
    monkeypatch.setattr(
        gguf_write,
        "_null_layer",
        lambda *sizes: [(n, 1.0 if n == "attn_output.weight" else v, s) for n, v, s in null(*sizes)],
    )
    ours.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    with pytest.raises(CheckpointError, match="layer 2 is an attention layer that does something"):
        ours.read(tmp_path / "m.gguf")


def test_random_damage_to_the_header_never_escapes(good, tmp_path):
    """Any byte of the header changed: the file still reads, or is refused as damaged."""
    header = inspect(tmp_path / "good.gguf")
    end = min(entry.offset for entry in header.tensors.values())
    rng, path, refused = np.random.default_rng(0), tmp_path / "bad.gguf", 0
    for _ in range(150):
        at, raw = int(rng.integers(4, end)), bytearray(good)
        raw[at : at + 1] = bytes([int(rng.integers(256))])
        path.write_bytes(raw)
        try:
            for lazy in ours.read(path).tensors.values():
                assert lazy.load().shape == lazy.shape
        except CheckpointError as error:
            refused += 1
            assert "\n" not in error.message
    assert refused > 10


# ---- memory ------------------------------------------------------------------------------------------


def peak_memory():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0"])
def test_memory_stays_below_one_and_a_half_of_the_largest_tensor(made_of, tmp_path, outtype):
    _, source = made_of("mamba", hidden_size=512, num_hidden_layers=1)
    rows, columns = 20_000, 512
    source.config["vocab_size"] = rows
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        source.tensors[key] = Lazy(torch.float32, (rows, columns), lambda: torch.full((rows, columns), 0.1), key)
    largest = rows * columns * 4
    ours.write(source, tmp_path / "warm.gguf", Options("gguf", outtype))  # everything is imported once

    def grown(work):
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
        work()
        return peak_memory() - before

    assert grown(lambda: ours.write(source, tmp_path / "m.gguf", Options("gguf", outtype))) < 1.5 * largest
    back = ours.read(tmp_path / "m.gguf")
    assert (
        grown(
            lambda: (
                [lazy.load() for lazy in back.tensors.values() if lazy.nbytes < largest]
                and back.tensors["lm_head.weight"].load()
            )
        )
        < 1.5 * back.tensors["lm_head.weight"].nbytes
    )
