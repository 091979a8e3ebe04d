"""MOAI-LLM's old transformer as Qwen3, against a float64 implementation written from its description."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from moai_core.convert import convert
from moai_core.convert.source import Refused
from moai_core.errors import CheckpointError

SHAPES = [
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 91},
    {"hidden_size": 60, "intermediate_size": 33, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 1, "vocab_size": 50},
    {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 77},
]  # fmt: skip


def old(folder, **fields):
    """Writes a random checkpoint as MOAI-LLM did; returns (config, state)."""
    config = {
        "model_type": "moai", "rope_theta": 1e4, "rope_scaling": None, "rms_norm_eps": 1e-6, "use_qk_norm": True,
        "hidden_act": "swiglu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, **fields,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.25

    H, M, heads, groups = (
        config[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    d = H // heads
    state = {"model.embed_tokens.weight": random(config["vocab_size"], H) * 3, "model.norm.weight": 1 + random(H)}
    for n in range(config["num_hidden_layers"]):
        one = {"input_layernorm.weight": 1 + random(H), "post_attention_layernorm.weight": 1 + random(H)}
        for name, out, width in (("q", heads * d, H), ("k", groups * d, H), ("v", groups * d, H), ("o", H, heads * d)):
            one[f"self_attn.{name}_proj.weight"] = random(out, width)
            if config["attention_bias"]:
                one[f"self_attn.{name}_proj.bias"] = random(out)
        if config["use_qk_norm"]:
            one |= {"self_attn.q_norm.weight": 1 + random(d), "self_attn.k_norm.weight": 1 + random(d)}
        one |= {"mlp.swiglu.gate_proj.weight": random(M, H), "mlp.swiglu.up_proj.weight": random(M, H)}
        one |= {"mlp.swiglu.down_proj.weight": random(H, M)}
        state |= {f"model.layers.{n}.{name}": tensor for name, tensor in one.items()}
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = random(config["vocab_size"], H)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return config, state


def reference(config, state, ids):
    """Logits (L, V) in float64: pre-norm layers of grouped-query attention with normed heads and rotary positions, and
    SwiGLU."""
    w = {name: tensor.double() for name, tensor in state.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    L, d = len(ids), config["hidden_size"] // heads
    scaling = config["rope_scaling"] or {}
    base, slow = config["rope_theta"], 1.0
    if scaling.get("type") in ("ntk", "dynamic"):
        base = base * scaling["factor"] ** (d / (d - 2))
    if scaling.get("type") == "linear":  # once in the frequencies, once in the positions
        slow = scaling["factor"] ** 2
    angle = (
        torch.arange(L, dtype=torch.float64)[:, None] / slow / base ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    )

    def norm(x, weight):
        return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"])

    def turn(x):  # (L, heads, d): component i with component i + d/2
        a, b = x[..., : d // 2], x[..., d // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        p = {k.removeprefix(f"model.layers.{n}."): v for k, v in w.items() if k.startswith(f"model.layers.{n}.")}
        y = norm(x, p["input_layernorm.weight"])
        q, k, v = (
            F.linear(y, p[f"self_attn.{name}_proj.weight"], p.get(f"self_attn.{name}_proj.bias")).view(L, -1, d)
            for name in "qkv"
        )
        q, k = turn(norm(q, p["self_attn.q_norm.weight"])), turn(norm(k, p["self_attn.k_norm.weight"]))
        out = torch.zeros(L, heads, d, dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // groups)
            for t in range(L):
                weights = torch.softmax(k[: t + 1, group] @ q[t, head] / d**0.5, 0)
                out[t, head] = weights @ v[: t + 1, group]
        x = x + F.linear(out.view(L, -1), p["self_attn.o_proj.weight"], p.get("self_attn.o_proj.bias"))
        y = norm(x, p["post_attention_layernorm.weight"])
        gate, up = (F.linear(y, p[f"mlp.swiglu.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, p["mlp.swiglu.down_proj.weight"])
    return F.linear(norm(x, w["model.norm.weight"]), w.get("lm_head.weight", w["model.embed_tokens.weight"]))


@pytest.mark.parametrize(
    "fields",
    [
        SHAPES[0],
        SHAPES[1],
        {**SHAPES[2], "attention_bias": True},
        {**SHAPES[0], "tie_word_embeddings": True},
        {**SHAPES[0], "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**SHAPES[0], "rope_scaling": {"type": "ntk", "factor": 4.0}},
        {**SHAPES[2], "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    ],
    ids=["grouped", "one group", "biases", "tied", "linear", "ntk", "dynamic"],
)
def test_qwen3_of_transformers_gives_its_logits(fields, tmp_path):
    from transformers import AutoModelForCausalLM

    config, state = old(tmp_path / "old", **fields)
    report = convert(tmp_path / "old", tmp_path / "qwen3", "qwen3")
    assert report["source"]["format"] == "moai-transformer" and "skipped" in report["parity"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3", dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    ids = torch.randint(config["vocab_size"], (23,), generator=torch.Generator().manual_seed(1))
    expected = reference(config, state, ids)
    with torch.no_grad():
        assert expected.std() > 0.3 and (model(ids[None]).logits[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "to", "what"),
    [
        ({"use_qk_norm": False}, "qwen3", "use_qk_norm is false"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "qwen3", "has no equal in qwen3"),
        ({}, "moai", "transformer"),
        ({}, "jamba", "transformer"),
        ({}, "gguf", "transformer"),
    ],
)
def test_what_does_not_go(fields, to, what, tmp_path):
    old(tmp_path / "old", **SHAPES[0], **fields)
    with pytest.raises(Refused, match=what):
        convert(tmp_path / "old", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_divide(tmp_path):
    old(tmp_path / "old", **SHAPES[0])
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    with pytest.raises(CheckpointError, match="don't agree"):
        convert(tmp_path / "old", tmp_path / "out", "qwen3")
