"""The transformer that MOAI-LLM had before Mamba (`MoaiForCausalLM`, model type `moai`), as transformers' `qwen3`.

Grouped-query attention with RMSNorm on each head's queries and keys, rotary positions, SwiGLU, RMSNorm before each:
that is Qwen3. Only the feed-forward's names differ (`mlp.swiglu.` there). The rotary scalings `linear`, `dynamic` and
`ntk` are expressed as MOAI-LLM computed them: linear divided both the frequencies and the positions, so that its factor
counts twice; the other two were a larger base at every length. Left out: yarn (its own variant of it), longrope (it was
ignored there), a model without q/k norm, biases in the feed-forward, any target but qwen3: it isn't a Mamba.
Source: sh2orc/moai-llm, moai_llm/config.py and moai_llm/modeling/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moai_core.convert import folder as hf
from moai_core.convert.runtimes import TransformersRuntime
from moai_core.convert.source import OnEvent, Options, Refused, Runtime, Source, Unavailable
from moai_core.errors import CheckpointError

FORMATS = ("qwen3",)
SOURCE = "moai-transformer"
# MoaiConfig's defaults for what its config.json leaves out
_DEFAULTS = {
    "vocab_size": 128000,
    "hidden_size": 3840,
    "intermediate_size": 10240,
    "num_hidden_layers": 28,
    "num_attention_heads": 30,
    "num_key_value_heads": 5,
    "max_position_embeddings": 32768,
}


def detect(path: Path) -> str | None:
    """See source.py."""
    if not path.is_dir():
        return None
    kind = hf.model_type(path)
    if kind == "moai":
        return SOURCE
    return None


def read(path: Path) -> Source:
    """See source.py. The config is MOAI-LLM's, the tensors have Qwen3's names."""
    fields = hf.read_config(path)
    sizes = {name: fields.integer(name, default) for name, default in _DEFAULTS.items()}
    hidden, heads, groups = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if not heads or not groups or hidden % heads or heads % groups:
        raise CheckpointError(
            f"{fields.file}: hidden_size {hidden}, {heads} query heads and {groups} key and value heads don't agree"
        )
    found = hf.read_tensors(path)
    hf.check_layers(fields.file, "num_hidden_layers", sizes["num_hidden_layers"], found)
    head, tied = "lm_head.weight", fields.flag("tie_word_embeddings", False)
    config = {
        **sizes,
        "head_dim": hidden // heads,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": fields.number("rope_theta", 1e6),
        "rope_scaling": fields.values.get("rope_scaling"),
        "use_qk_norm": fields.flag("use_qk_norm", True),
        "attention_bias": fields.flag("attention_bias", False),
        "mlp_bias": fields.flag("mlp_bias", False),
        "initializer_range": fields.number("initializer_range", 0.02),
        "tie_word_embeddings": hf.untie(path, found, "model.embed_tokens.weight", head, tied),
        **fields.tokens(0, 1, 2),
    }
    # Tables of angles that an old version may have saved: they follow from the config.
    spare = {name for name in found if ".rotary_emb." in name} | ({head} if tied else set())
    taken = hf.adopt(path, found, _wanted(config), spare)
    return Source(path, SOURCE, config, taken, hf.read_files(path))


def _wanted(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`{Qwen3's name: (MOAI-LLM's name, shape)}`."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, (out, width) in {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }.items():
        layer[f"self_attn.{name}.weight"] = (out, width)
        if config["attention_bias"]:
            layer[f"self_attn.{name}.bias"] = (out,)
    if config["use_qk_norm"]:
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    layer |= {"post_attention_layernorm.weight": (hidden,)}
    for name, shape in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items():
        layer[f"mlp.{name}.weight"] = shape
        if config["mlp_bias"]:
            layer[f"mlp.{name}.bias"] = shape[:1]
    table = (config["vocab_size"], hidden)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (name, shape)
        for name, shape in {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}.items()
    }
    for number in range(config["num_hidden_layers"]):
        for name, made in layer.items():
            full = f"model.layers.{number}.{name}"
            wanted[full] = (full.replace(".mlp.", ".mlp.swiglu."), made)
    if not config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = ("lm_head.weight", table)
    return wanted


def write(source: Source, target: Any, options: Options, on_event: OnEvent | None = None) -> None:
    """See source.py; takes MOAI-LLM's transformer only."""
    config = source.config
    if not config["use_qk_norm"]:
        raise Refused("qwen3 norms queries and keys, this model doesn't (use_qk_norm is false)")
    if config["mlp_bias"]:
        raise Refused("qwen3's feed-forward has no biases, this model's has them (mlp_bias is true)")
    values = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{name: config[name] for name in (*_DEFAULTS, "head_dim", "rms_norm_eps", "attention_bias")},
        "hidden_act": "silu",
        "rope_parameters": rope(config),
        "use_sliding_window": False,
        "initializer_range": config["initializer_range"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        **{name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    hf.write(target, values, source.tensors, source.files, on_event)


def refuse(format: str) -> None:
    """Raises Refused: a transformer can't become a Mamba, nor the other way round."""
    if format == SOURCE:
        raise Refused("this model is MOAI-LLM's transformer, no Mamba", hint="it fits: qwen3 (transformers' Qwen3)")
    raise Refused(
        "qwen3 is a transformer, this model is a Mamba", hint="qwen3 is for MOAI-LLM's old transformer checkpoints"
    )


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen3's rope_parameters. Raises Refused for a scaling that it doesn't have."""
    theta, scaling = config["rope_theta"], config["rope_scaling"] or {}
    kind = scaling.get("type") if isinstance(scaling, dict) else scaling
    if kind is None:
        return {"rope_type": "default", "rope_theta": theta}
    factor = scaling.get("factor", 1.0) if isinstance(scaling, dict) else None
    if kind not in ("linear", "dynamic", "ntk") or not isinstance(factor, (int, float)) or factor <= 0:
        raise Refused(f"rope_scaling {str(scaling)[:80]} of MOAI-LLM has no equal in qwen3")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor) ** 2}
    dim = config["head_dim"]
    return {"rope_type": "default", "rope_theta": theta * float(factor) ** (dim / (dim - 2))}


def open_runtime(path: Path, format: str) -> Runtime:
    """See source.py."""
    if format == SOURCE:
        raise Unavailable("nothing here runs MOAI-LLM's old transformer")
    return TransformersRuntime(path, "Qwen3ForCausalLM")
