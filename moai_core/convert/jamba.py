"""transformers' `jamba` without attention: Mamba-1 with norms on dt, B and C, and SwiGLU in every layer.

That is moai's stack, name for name. But where no layer attends, the caches of transformers and llama.cpp fail. So one
null attention layer is written after the last: its projections and its feed-forward are zero, the residual stream
passes it unchanged, and caches work. Likewise a model without feed-forward gets one of zeros. Reading recognises both
and drops them. Left out: attention that does something, experts (a Jamba needs `num_experts` 1).
Source: transformers/models/jamba, arXiv 2403.19887.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moai_core.convert import folder as hf
from moai_core.convert.runtimes import TransformersRuntime
from moai_core.convert.source import Lazy, OnEvent, Options, Refused, Runtime, Source, holders
from moai_core.errors import CheckpointError

FORMATS = ("jamba",)
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")
_FFN = ("gate_proj", "up_proj", "down_proj")
# The width of a feed-forward of zeros.
NULL_WIDTH = 32


def detect(path: Path) -> str | None:
    """See source.py."""
    return "jamba" if path.is_dir() and hf.model_type(path) == "jamba" else None


def read(path: Path) -> Source:
    """See source.py."""
    fields = hf.read_config(path)
    fields.must("mamba_proj_bias", False, False, why="moai's projections have no bias")
    fields.must("hidden_act", "silu", "silu", "swish", why="only silu is Jamba's")
    found = hf.read_tensors(path)
    depth = fields.integer("num_hidden_layers", 32)
    hf.check_layers(fields.file, "num_hidden_layers", depth, found)
    _refuse_experts(fields, depth)
    nulls = _null_layers(fields, depth, found)
    kept = [number for number in range(depth) if number not in nulls]
    if not kept:
        raise CheckpointError(f"{fields.file}: none of its {depth} layers is a Mamba layer")
    ffn = not _null_ffn(found, kept)
    hidden = fields.integer("hidden_size", 4096)
    eps = fields.number("rms_norm_eps", 1e-6)
    head, tied = "lm_head.weight", fields.flag("tie_word_embeddings", False)
    values = fields.model(
        vocab_size=fields.integer("vocab_size", 65536),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 14336),
        num_hidden_layers=len(kept),
        state_size=fields.integer("mamba_d_state", 16),
        conv_kernel_size=fields.integer("mamba_d_conv", 4),
        expand_factor=fields.integer("mamba_expand", 2),
        time_step_rank=fields.rank("mamba_dt_rank", hidden),
        max_position_embeddings=fields.integer("max_position_embeddings", 262144),
        rms_norm_eps=eps,
        dt_bc_norm_eps=eps,
        initializer_range=fields.number("initializer_range", 0.02),
        tie_word_embeddings=hf.untie(path, found, "model.embed_tokens.weight", head, tied),
        ffn="swiglu" if ffn else "none",
        dt_bc_norm=True,
        **fields.tokens(0, 1, 2),
    )
    shapes = hf.shapes(values, fields.file)
    biased = fields.flag("mamba_conv_bias", True)
    made = [name for name in shapes if name.endswith("conv1d.bias") and not biased]
    wanted = {name: (_theirs(name, kept), shape) for name, shape in shapes.items() if name not in made}
    spare = {name for name in found if (match := _LAYER.match(name)) and int(match[1]) in nulls}
    spare |= set() if ffn else {name for name in found if ".feed_forward." in name or ".pre_ff_layernorm." in name}
    taken = hf.adopt(path, found, wanted, spare | ({head} if tied else set()))
    for name in made:
        taken[name] = hf.zeros(taken["model.final_layernorm.weight"], shapes[name])
    notes = [f"null attention layer {number} dropped: it changes nothing" for number in nulls]
    notes += [] if ffn else ["the feed-forward of zeros dropped: it changes nothing"]
    notes += [] if biased else ["the convolutions have no bias: zeros were added"]
    return Source(path, "jamba", values, {name: taken[name] for name in shapes}, hf.read_files(path), notes=notes)


def _theirs(name: str, numbers: list[int]) -> str:
    """The name in a Jamba whose Mamba layers have these numbers."""
    match = _LAYER.match(name)
    if not match:
        return name
    rest = "mamba.dt_proj.bias" if match[2] == "mamba.dt_bias" else match[2]
    return f"model.layers.{numbers[int(match[1])]}.{rest}"


def _refuse_experts(fields: hf.Fields, depth: int) -> None:
    experts, period = fields.integer("num_experts", 16), fields.integer("expert_layer_period", 2)
    if experts > 1 and any(i % max(1, period) == fields.integer("expert_layer_offset", 1) for i in range(depth)):
        raise CheckpointError(
            f"{fields.file}: num_experts is {experts}, mixtures of experts can't be converted yet",
            hint="a dense Jamba (num_experts 1) can",
        )


def _null_layers(fields: hf.Fields, depth: int, found: dict[str, Lazy]) -> list[int]:
    """The attention layers, all of which pass the stream unchanged. Raises CheckpointError for one that doesn't."""
    period = max(1, fields.integer("attn_layer_period", 8))
    attending = [i for i in range(depth) if i % period == fields.integer("attn_layer_offset", 4)]
    for number in attending:
        for last in ("self_attn.o_proj", "feed_forward.down_proj"):
            name = f"model.layers.{number}.{last}.weight"
            if name not in found:
                raise CheckpointError(f"{fields.file.parent}: tensor {name} is missing")
            if found[name].load().any():
                raise CheckpointError(
                    f"{fields.file}: layer {number} is an attention layer that does something; moai has no attention",
                    hint="only a Jamba of Mamba layers (and null attention layers) can be converted",
                )
    return attending


def _null_ffn(found: dict[str, Lazy], kept: list[int]) -> bool:
    """Whether every layer's feed-forward is zero, as in what was written for a model that has none."""
    names = [f"model.layers.{number}.feed_forward.{part}.weight" for number in kept for part in reversed(_FFN)]
    # The first one that isn't zero ends it: of another model a single tensor is read.
    return all(name in found and not found[name].load().any() for name in names)


def heads(hidden: int) -> int:
    """Query heads of the null layer: the fewest that are at most 128 wide."""
    return next(n for n in range(1, hidden + 1) if hidden % n == 0 and hidden // n <= 128)


def write(source: Source, target: Any, options: Options, on_event: OnEvent | None = None) -> None:
    """See source.py."""
    values, found = shaped(source)
    hf.write(target, values, found, source.files, on_event)


def shaped(source: Source) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """config.json and the tensors of a Jamba, under its names. Raises Refused."""
    config = source.config
    if not config["dt_bc_norm"]:
        raise Refused("jamba norms dt, B and C, this model doesn't (dt_bc_norm is false)", hint=holders(config))
    if config["dt_bc_norm_eps"] != config["rms_norm_eps"]:
        raise Refused(
            f"jamba has one epsilon for all norms, this model has {config['rms_norm_eps']} and, for dt, B and C, "
            f"{config['dt_bc_norm_eps']}",
            hint="only moai's own format holds both",
        )
    depth = config["num_hidden_layers"]
    width = config["intermediate_size"] if config["ffn"] != "none" else NULL_WIDTH
    values = {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": width,
        "num_hidden_layers": depth + 1,
        "attn_layer_offset": depth,
        "attn_layer_period": depth + 1,
        "num_attention_heads": heads(config["hidden_size"]),
        "num_key_value_heads": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "mamba_d_state": config["state_size"],
        "mamba_d_conv": config["conv_kernel_size"],
        "mamba_expand": config["expand_factor"],
        "mamba_dt_rank": config["time_step_rank"],
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "max_position_embeddings": config["max_position_embeddings"],
        "rms_norm_eps": config["rms_norm_eps"],
        "hidden_act": "silu",
        "initializer_range": config["initializer_range"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        **{name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    found = {_theirs(name, list(range(depth))): lazy for name, lazy in source.tensors.items()}
    like = source.tensors["model.layers.0.mamba.in_proj.weight"]
    if like.quantized:  # whose numbers are of no type that others have
        like = source.tensors["model.final_layernorm.weight"]
    found |= _null_attention(config["hidden_size"], depth, like)
    for number in range(0 if config["ffn"] == "none" else depth, depth + 1):
        found |= _null_feed_forward(config["hidden_size"], width, number, like)
    return values, found


def _null_attention(hidden: int, number: int, like: Lazy) -> dict[str, Lazy]:
    """The mixer's half of an attention layer through which nothing changes, in the dtype of `like`."""
    narrow = hidden // heads(hidden)
    shapes = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
    made = {f"model.layers.{number}.self_attn.{part}_proj.weight": hf.zeros(like, s) for part, s in shapes.items()}
    return {f"model.layers.{number}.input_layernorm.weight": hf.ones(like, (hidden,)), **made}


def _null_feed_forward(hidden: int, width: int, number: int, like: Lazy) -> dict[str, Lazy]:
    """A feed-forward that adds nothing."""
    made = {
        f"model.layers.{number}.feed_forward.{part}.weight": hf.zeros(
            like, (hidden, width) if part == "down_proj" else (width, hidden)
        )
        for part in _FFN
    }
    return {f"model.layers.{number}.pre_ff_layernorm.weight": hf.ones(like, (hidden,)), **made}


def open_runtime(path: Path, format: str) -> Runtime:
    """See source.py."""
    return TransformersRuntime(path, "JambaForCausalLM")
