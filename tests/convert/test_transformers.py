"""transformers' Mamba, Falcon-Mamba and Jamba, both ways, against transformers itself."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from convert_helpers import SHAPES, ours, shake, step_by_step, whole

from moai_core.convert import convert
from moai_core.errors import CheckpointError

FIELDS = {
    "transformers-mamba": {"ffn": "none", "dt_bc_norm": False},
    "falcon-mamba": {"ffn": "none", "dt_bc_norm": True},
    "jamba": {"ffn": "swiglu", "dt_bc_norm": True},
}
CLASSES = {
    "transformers-mamba": "MambaForCausalLM",
    "falcon-mamba": "FalconMambaForCausalLM",
    "jamba": "JambaForCausalLM",
}
FORMATS = list(FIELDS)


def weightless(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mamba." in name and "layernorm" in name:
                parameter.fill_(1)


@pytest.fixture
def exportable(make):
    """A moai model that the format can hold."""

    def exportable(format, **fields):
        from moai_core import checkpoint

        folder, model = make(**{**FIELDS[format], **fields})
        if format == "falcon-mamba":
            weightless(model)
            checkpoint.save_model(folder, model)
        return folder, model

    return exportable


def theirs(format, folder):
    return getattr(transformers, CLASSES[format]).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("shape", SHAPES, ids=["even", "odd", "expand3"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_moai_wrote_gives_transformers_the_same_logits(format, shape, exportable, tmp_path):
    folder, model = exportable(format, **shape)
    report = convert(folder, tmp_path / "out", format)
    assert report["parity"]["max_delta"] < 1e-4 and report["parity"]["greedy"] == 64
    other = theirs(format, tmp_path / "out")
    ids = torch.randint(shape["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(3))
    mine = ours(model, ids)
    assert mine.std() > 0.3
    assert (whole(other, ids) - mine).abs().max() < 1e-4
    assert (step_by_step(other, ids) - mine).abs().max() < 1e-4


def foreign(format, shape, tied, folder):
    """A model that transformers made and saved itself."""
    torch.manual_seed(5)
    common = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "num_hidden_layers": shape["num_hidden_layers"],
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": [3, 4],
    }
    if format == "jamba":
        config = transformers.JambaConfig(
            **common,
            intermediate_size=51,
            mamba_d_state=shape["state_size"],
            mamba_d_conv=shape.get("conv_kernel_size", 4),
            mamba_expand=shape.get("expand_factor", 2),
            mamba_dt_rank=shape.get("time_step_rank", "auto"),
            num_experts=1,
            num_experts_per_tok=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            attn_layer_offset=8,
            attn_layer_period=9,
            rms_norm_eps=3e-6,
        )
    else:
        config = getattr(transformers, CLASSES[format].replace("ForCausalLM", "Config"))(
            **common,
            state_size=shape["state_size"],
            conv_kernel=shape.get("conv_kernel_size", 4),
            expand=shape.get("expand_factor", 2),
            time_step_rank=shape.get("time_step_rank", "auto"),
            layer_norm_epsilon=2e-5,
            **({"mixer_rms_eps": 4e-6} if format == "falcon-mamba" else {}),
        )
    model = shake(getattr(transformers, CLASSES[format])(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=["even", "odd", "expand3"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_transformers_wrote_reads_with_its_logits(format, shape, tmp_path):
    from moai_core import MoaiMambaForCausalLM, checkpoint

    other = foreign(format, shape, format == "transformers-mamba", tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "moai", "moai")
    assert report["source"]["format"] == format and report["parity"]["max_delta"] < 1e-4
    model = checkpoint.load_model(tmp_path / "moai")
    model = model[0] if isinstance(model, tuple) else model
    ids = torch.randint(shape["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(3))
    mine = ours(model, ids)
    assert mine.std() > 0.3 and (whole(other, ids) - mine).abs().max() < 1e-4
    state, steps = None, []
    for token in ids.T:
        out = model(token[:, None], state=state, use_cache=True)
        state = out.state
        steps.append(out.logits.detach())
    assert (torch.cat(steps, 1) - whole(other, ids)).abs().max() < 1e-4
    assert model.config.eos_token_id == [3, 4] and model.config.pad_token_id == 1
    again = MoaiMambaForCausalLM.from_pretrained(tmp_path / "moai").eval()
    assert torch.equal(ours(again, ids), mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_is_bit_exact(format, tied, dtype, exportable, stored, same, tmp_path):
    folder, _ = exportable(
        format, tie_word_embeddings=tied, dtype=dtype, rms_norm_eps=1e-5, residual_in_fp32=format != "jamba"
    )
    convert(folder, tmp_path / "there", format, check=False)
    convert(tmp_path / "there", tmp_path / "back", "moai", check=False)
    assert same(stored(folder), stored(tmp_path / "back"))
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert before["dtype"] == after["dtype"] == str(dtype).removeprefix("torch.")
    ignored = {"intermediate_size", "max_position_embeddings"} if format != "jamba" else set()
    for name in before.keys() - ignored:
        assert before[name] == after.get(name), name


@pytest.mark.parametrize("format", FORMATS)
def test_the_other_way_round_is_bit_exact_too(format, stored, same, tmp_path):
    foreign(format, SHAPES[1], False, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "moai", "moai", check=False)
    convert(tmp_path / "moai", tmp_path / "again", format, check=False)
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "again")
    if format == "jamba":
        after = {name: tensor for name, tensor in after.items() if ".layers.3." not in name}
    assert same(before, after)


def test_generate_of_transformers_on_an_exported_jamba_gives_moais_greedy_tokens(exportable, tmp_path):
    folder, model = exportable("jamba", initializer_range=0.5)
    convert(folder, tmp_path / "jamba", "jamba", check=False)
    other = theirs("jamba", tmp_path / "jamba")
    prompt = torch.tensor([[5, 3, 80, 41, 7]])
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    tokens = other.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    mine = prompt
    with torch.no_grad():
        for _ in range(64):  # no cache, no state: the definition
            logits = model(mine).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf
            mine = torch.cat([mine, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, mine) and len(set(tokens[0].tolist())) > 5


def test_the_null_attention_layer(exportable, tmp_path):
    folder, _ = exportable("jamba", hidden_size=256)
    convert(folder, tmp_path / "jamba", "jamba", check=False)
    config = transformers.JambaConfig.from_pretrained(tmp_path / "jamba")
    assert config.layers_block_type == ["mamba", "mamba", "attention"]
    assert config.hidden_size // config.num_attention_heads == 128 and config.num_key_value_heads == 1
    report = convert(tmp_path / "jamba", tmp_path / "back", "moai", check=False)
    assert report["notes"][0] == "null attention layer 2 dropped: it changes nothing"


def test_a_model_without_feed_forward_fits_a_jamba(exportable, stored, same, tmp_path):
    folder, _ = exportable("falcon-mamba")
    report = convert(folder, tmp_path / "jamba", "jamba")
    assert report["parity"]["max_delta"] < 1e-4
    convert(tmp_path / "jamba", tmp_path / "back", "moai", check=False)
    assert same(stored(folder), stored(tmp_path / "back"))


def test_attention_that_does_something_is_refused(tmp_path):
    transformers.JambaForCausalLM(
        transformers.JambaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, num_experts=1, attn_layer_period=3, attn_layer_offset=1,
        )
    ).save_pretrained(tmp_path / "theirs")  # fmt: skip
    with pytest.raises(CheckpointError, match="layer 1 is an attention layer that does something"):
        convert(tmp_path / "theirs", tmp_path / "moai", "moai")
    assert not (tmp_path / "moai").exists()


def test_experts_are_refused(tmp_path):
    transformers.JambaForCausalLM(
        transformers.JambaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_experts=4, attn_layer_period=9, attn_layer_offset=8,
        )
    ).save_pretrained(tmp_path / "theirs")  # fmt: skip
    with pytest.raises(CheckpointError, match="num_experts is 4"):
        convert(tmp_path / "theirs", tmp_path / "moai", "moai")


@pytest.mark.parametrize(("expand", "inner"), [(16, 32), (2.0, None), (3, 48)])
def test_the_inner_width_counts_and_not_what_expand_says(expand, inner, tmp_path):
    """falcon-mamba-7b says expand 16 where it means 2."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "expand": int(expand)}
    config = transformers.FalconMambaConfig(**sizes, **({"intermediate_size": inner} if inner else {}))
    shake(transformers.FalconMambaForCausalLM(config)).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    values = {**json.loads(file.read_text()), "expand": expand}
    if inner is None:
        del values["intermediate_size"]
    file.write_text(json.dumps(values))
    report = convert(tmp_path / "theirs", tmp_path / "moai", "moai", check=inner is not None)
    assert json.loads((tmp_path / "moai" / "config.json").read_text())["expand_factor"] == (inner or 32) // 16
    assert inner is None or report["parity"]["max_delta"] < 1e-4


def test_a_quantized_model_is_refused_by_name(tmp_path):
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(CheckpointError, match="the model is quantized by 'hqq'"):
        convert(tmp_path / "theirs", tmp_path / "moai", "moai")


def test_a_convolution_without_bias_gets_one_of_zeros(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4, use_conv_bias=False
    )
    shake(transformers.MambaForCausalLM(config)).save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "moai", "moai")
    assert report["parity"]["max_delta"] < 1e-4 and "have no bias" in report["notes"][0]


@pytest.mark.parametrize(
    ("fields", "to", "what", "fitting"),
    [
        ({}, "transformers-mamba", "no feed-forward", "jamba, gguf"),
        ({}, "falcon-mamba", "no feed-forward", "jamba, gguf"),
        ({}, "mamba-ssm", "no norms on dt, B and C", "jamba, gguf"),
        ({}, "qwen3", "is a Mamba", "MOAI-LLM"),
        ({"dt_bc_norm": False, "intermediate_size": 128}, "jamba", "dt_bc_norm is false", "mamba-ssm"),
        ({"dt_bc_norm": False, "ffn": "none"}, "jamba", "dt_bc_norm is false", "transformers-mamba, mamba-ssm, gguf"),
        ({"dt_bc_norm": False, "ffn": "none"}, "falcon-mamba", "this model doesn't", "transformers-mamba"),
        ({"ffn": "none"}, "transformers-mamba", "no norms on dt, B and C", "falcon-mamba, jamba, gguf"),
        ({"ffn": "none"}, "falcon-mamba", "aren't all 1", "jamba, gguf"),
        ({"dt_bc_norm_eps": 1e-4}, "jamba", "one epsilon", "moai"),
        (
            {"dt_bc_norm": False, "ffn": "none", "rms_norm_eps": 1e-6},
            "mamba-ssm",
            "epsilon 1e-05",
            "transformers-mamba",
        ),
        ({"dt_bc_norm": False}, "mamba-ssm", "multiple of 128", "moai"),
    ],
)
def test_what_a_format_cannot_express_is_refused_with_those_that_can(fields, to, what, fitting, make, tmp_path):
    from moai_core.convert.source import Refused

    folder, _ = make(**fields)
    with pytest.raises(Refused) as caught:
        convert(folder, tmp_path / "out", to)
    assert what in caught.value.message and fitting in caught.value.hint and "\n" not in caught.value.message
    assert caught.value.exit_code == 3 and [p.name for p in tmp_path.iterdir()] == ["moai"]
