"""transformers' `mamba` and `falcon_mamba`: Mamba-1 without a feed-forward, the second with weightless norms.

Falcon-Mamba (arXiv 2410.05355) divides dt, B and C by their root mean square without weights, which is moai's
`dt_bc_norm` with weights of one and its own epsilon. Left out: biases of in_proj and out_proj, other activations.
Source: transformers/models/{mamba,falcon_mamba}.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moai_core.convert import folder as hf
from moai_core.convert.runtimes import TransformersRuntime
from moai_core.convert.source import Lazy, OnEvent, Options, Refused, Runtime, Source, holders

FORMATS = ("transformers-mamba", "falcon-mamba")
_TYPES = {"mamba": "transformers-mamba", "falcon_mamba": "falcon-mamba"}
_CLASSES = {"transformers-mamba": "MambaForCausalLM", "falcon-mamba": "FalconMambaForCausalLM"}

# Of a layer: moai's names and those of state-spaces' own code, which transformers kept.
LAYER = {
    "input_layernorm.weight": "norm.weight",
    "mamba.in_proj.weight": "mixer.in_proj.weight",
    "mamba.conv1d.weight": "mixer.conv1d.weight",
    "mamba.conv1d.bias": "mixer.conv1d.bias",
    "mamba.x_proj.weight": "mixer.x_proj.weight",
    "mamba.dt_proj.weight": "mixer.dt_proj.weight",
    "mamba.dt_bias": "mixer.dt_proj.bias",
    "mamba.A_log": "mixer.A_log",
    "mamba.D": "mixer.D",
    "mamba.out_proj.weight": "mixer.out_proj.weight",
}
NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
_OUTER = {
    "model.embed_tokens.weight": "backbone.embeddings.weight",
    "model.final_layernorm.weight": "backbone.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}


def theirs(name: str, outer: dict[str, str], layer: dict[str, str] = LAYER) -> str:
    """The name that a tensor of moai has among Mamba users."""
    if name in outer:
        return outer[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"backbone.layers.{number}.{layer[rest]}"


def is_norm(name: str) -> bool:
    """Whether a tensor of moai is the weight of a norm on dt, B or C."""
    return name.split(".")[-2] in NORMS


def detect(path: Path) -> str | None:
    """See source.py."""
    return _TYPES.get(hf.model_type(path) or "") if path.is_dir() else None


def read(path: Path) -> Source:
    """See source.py."""
    fields = hf.read_config(path)
    format = _TYPES[str(fields.values["model_type"])]
    fields.must("use_bias", False, False, why="moai's projections have no bias")
    fields.must("hidden_act", "silu", "silu", "swish", why="only silu is Mamba's")
    hidden = fields.integer("hidden_size", 768)
    # transformers takes intermediate_size where it is there, whatever expand says (falcon-mamba-7b: 16, and it is 2)
    inner = fields.integer("intermediate_size", int(fields.number("expand", 2) * hidden))
    if not hidden or inner % hidden:
        raise fields.wrong("intermediate_size", f"a multiple of hidden_size, {hidden},")
    found = hf.read_tensors(path)
    depth = fields.integer("num_hidden_layers", 32)
    hf.check_layers(fields.file, "num_hidden_layers", depth, found)
    head = _OUTER["lm_head.weight"]
    tied = fields.flag("tie_word_embeddings", True)
    falcon = format == "falcon-mamba"
    eps = fields.number("layer_norm_epsilon", 1e-5)
    values = fields.model(
        vocab_size=fields.integer("vocab_size", 50280),
        hidden_size=hidden,
        intermediate_size=hidden,  # of the feed-forward that isn't there
        num_hidden_layers=depth,
        state_size=fields.integer("state_size", 16),
        conv_kernel_size=fields.integer("conv_kernel", 4),
        expand_factor=inner // hidden,
        time_step_rank=fields.rank("time_step_rank", hidden),
        rms_norm_eps=eps,
        residual_in_fp32=fields.flag("residual_in_fp32", True),
        initializer_range=fields.number("initializer_range", 0.1),
        tie_word_embeddings=hf.untie(path, found, _OUTER["model.embed_tokens.weight"], head, tied),
        ffn="none",
        dt_bc_norm=falcon,
        dt_bc_norm_eps=fields.number("mixer_rms_eps", 1e-6) if falcon else eps,
        **fields.tokens(0, 0, 0),
    )
    shapes = hf.shapes(values, fields.file)
    biased = fields.flag("use_conv_bias", True)
    made = [name for name in shapes if is_norm(name) or (name.endswith("conv1d.bias") and not biased)]
    wanted = {name: (theirs(name, _OUTER), shape) for name, shape in shapes.items() if name not in made}
    taken = hf.adopt(path, found, wanted, {head} if tied else set())
    like = taken["model.final_layernorm.weight"]
    for name in made:
        taken[name] = (hf.ones if is_norm(name) else hf.zeros)(like, shapes[name])
    notes = [] if biased else ["the convolutions have no bias: zeros were added"]
    return Source(path, format, values, {name: taken[name] for name in shapes}, hf.read_files(path), notes=notes)


def write(source: Source, target: Any, options: Options, on_event: OnEvent | None = None) -> None:
    """See source.py."""
    format = options.format
    falcon = format == "falcon-mamba"
    config = source.config
    if config["ffn"] != "none":
        raise Refused(f"{format} has no feed-forward, this model has one in every layer", hint=holders(config))
    if config["dt_bc_norm"] and not falcon:
        raise Refused(f"{format} has no norms on dt, B and C, this model has them", hint=holders(config))
    if falcon and not config["dt_bc_norm"]:
        raise Refused(f"{format} norms dt, B and C, this model doesn't", hint=holders(config))
    if falcon and (name := first_weighted(source.tensors.items())):
        raise Refused(
            f"{format}'s norms on dt, B and C have no weights, those of this model aren't all 1 ({name})",
            hint=holders(config, weightless=False),
        )
    values = {
        "architectures": [_CLASSES[format]],
        "model_type": "falcon_mamba" if falcon else "mamba",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["expand_factor"] * config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "state_size": config["state_size"],
        "conv_kernel": config["conv_kernel_size"],
        "expand": config["expand_factor"],
        "time_step_rank": config["time_step_rank"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        **({"mixer_rms_eps": config["dt_bc_norm_eps"]} if falcon else {}),
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": config["residual_in_fp32"],
        "initializer_range": config["initializer_range"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        **{name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    found = {theirs(name, _OUTER): lazy for name, lazy in source.tensors.items() if not is_norm(name)}
    hf.write(target, values, found, source.files, on_event)


def first_weighted(tensors: Iterable[tuple[str, Lazy]]) -> str | None:
    """The first norm on dt, B or C whose weights aren't all one."""
    for name, lazy in tensors:
        if is_norm(name) and not torch.all(lazy.load() == 1):
            return name
    return None


def open_runtime(path: Path, format: str) -> Runtime:
    """See source.py."""
    return TransformersRuntime(path, _CLASSES[format])
