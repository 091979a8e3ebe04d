"""state-spaces' own `mamba_ssm`: config.json with `d_model`, and pytorch_model.bin.

Its loader is strict: config.json may hold the fields of its `MambaConfig` and no other, the head's weight is in the
file though it is tied, the vocabulary is padded to `pad_vocab_size_multiple`, norms have the epsilon 1e-5. A
feed-forward (`d_intermediate`) is a `GatedMLP`, whose first matrix stacks up and gate, and whose width is a multiple of
128. What the fields can't say (token ids) is in generation_config.json. Left out: LayerNorm (`rms_norm` false),
Mamba-2, attention.
Source: mamba_ssm/models/{config_mamba,mixer_seq_simple}.py, modules/{mamba_simple,block,mlp}.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from moai_core import storage
from moai_core.convert import folder as hf
from moai_core.convert import mamba, torch_bin
from moai_core.convert.runtimes import TransformersRuntime
from moai_core.convert.source import Lazy, OnEvent, Options, Refused, Runtime, Source, Unavailable, holders
from moai_core.errors import CheckpointError

FORMATS = ("mamba-ssm",)
EPS = 1e-5
_MULTIPLE = 128  # of a GatedMLP's width
_OUTER = {
    "model.embed_tokens.weight": "backbone.embedding.weight",
    "model.final_layernorm.weight": "backbone.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    **mamba.LAYER,
    "pre_ff_layernorm.weight": "norm2.weight",
    "feed_forward.up_proj.weight": "mlp.fc1.weight",
    "feed_forward.gate_proj.weight": "mlp.fc1.weight",
    "feed_forward.down_proj.weight": "mlp.fc2.weight",
}


def detect(path: Path) -> str | None:
    """See source.py."""
    if not path.is_dir() or hf.model_type(path) != "":
        return None
    return "mamba-ssm" if {"d_model", "n_layer"} <= set(hf.read_config(path).values) else None


def read(path: Path) -> Source:
    """See source.py."""
    fields = hf.read_config(path)
    ssm = fields.values.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise fields.wrong("ssm_cfg", "an object")
    mixer = hf.Fields(fields.file, ssm)
    mixer.must("layer", "Mamba1", "Mamba1", why="only its Mamba1 layers can be converted")
    mixer.must("bias", False, False, why="moai's projections have no bias")
    fields.must("rms_norm", True, True, why="moai has no LayerNorm")
    fields.must("attn_layer_idx", [], [], None, why="moai has no attention")
    hidden, width = fields.integer("d_model", 2560), fields.integer("d_intermediate", 0)
    found = hf.read_tensors(path)
    depth = fields.integer("n_layer", 64)
    hf.check_layers(fields.file, "n_layer", depth, found)
    head, tied = _OUTER["lm_head.weight"], fields.flag("tie_embeddings", True)
    used, multiple = fields.integer("vocab_size", 50277), max(1, fields.integer("pad_vocab_size_multiple", 8))
    files = hf.read_files(path)
    generation = storage.parse_json(files.get("generation_config.json", b"{}"), str(path / "generation_config.json"))
    values = fields.model(
        vocab_size=-(-used // multiple) * multiple,
        hidden_size=hidden,
        intermediate_size=-(-width // _MULTIPLE) * _MULTIPLE or hidden,
        num_hidden_layers=depth,
        state_size=mixer.integer("d_state", 16),
        conv_kernel_size=mixer.integer("d_conv", 4),
        expand_factor=mixer.integer("expand", 2),
        time_step_rank=mixer.rank("dt_rank", hidden),
        rms_norm_eps=EPS,
        residual_in_fp32=fields.flag("residual_in_fp32", True),
        tie_word_embeddings=hf.untie(path, found, _OUTER["model.embed_tokens.weight"], head, tied),
        ffn="swiglu" if width else "none",
        dt_bc_norm=False,
        **hf.Fields(fields.file, generation if isinstance(generation, dict) else {}).tokens(None, None, None),
    )
    shapes = hf.shapes(values, fields.file)
    biased = mixer.flag("conv_bias", True)
    made = [name for name in shapes if name.endswith("conv1d.bias") and not biased]
    wanted = {
        name: (mamba.theirs(name, _OUTER, _LAYER), _stacked(name, shape))
        for name, shape in shapes.items()
        if name not in made
    }
    taken = hf.adopt(path, found, wanted, {head} if tied else set())
    taken = {name: _half(name, lazy, shapes[name]) for name, lazy in taken.items()}
    for name in made:
        taken[name] = hf.zeros(taken["model.final_layernorm.weight"], shapes[name])
    notes = [] if biased else ["the convolutions have no bias: zeros were added"]
    notes += [f"the vocabulary of {used} is padded to {values['vocab_size']}"] if used != values["vocab_size"] else []
    return Source(
        path, "mamba-ssm", values, {name: taken[name] for name in shapes}, files, used_vocab=used, notes=notes
    )


def _stacked(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the matrix in which the tensor lies: up over gate."""
    return (2 * shape[0], shape[1]) if name.endswith(("up_proj.weight", "gate_proj.weight")) else shape


def _half(name: str, lazy: Lazy, shape: tuple[int, ...]) -> Lazy:
    if name.endswith("up_proj.weight"):
        return lazy.map(lambda both: both[: shape[0]].clone(), shape)
    if name.endswith("gate_proj.weight"):
        return lazy.map(lambda both: both[shape[0] :].clone(), shape)
    return lazy


def write(source: Source, target: Any, options: Options, on_event: OnEvent | None = None) -> None:
    """See source.py."""
    config = source.config
    width = config["intermediate_size"] if config["ffn"] != "none" else 0
    if config["dt_bc_norm"]:
        raise Refused("mamba-ssm has no norms on dt, B and C, this model has them", hint=holders(config))
    if config["rms_norm_eps"] != EPS:
        raise Refused(
            f"mamba-ssm's norms have the epsilon {EPS}, this model's {config['rms_norm_eps']}",
            hint="transformers-mamba holds any" if not width else "only moai's own format holds it",
        )
    if width % _MULTIPLE:
        raise Refused(
            f"mamba-ssm's feed-forward is a multiple of {_MULTIPLE} wide, this model's {width}",
            hint="only moai's own format holds it",
        )
    rows = config["vocab_size"]
    used = source.used_vocab or rows
    # The loader rounds vocab_size up to the multiple: so they must give the embedding's rows.
    multiple = 8 if rows % 8 == 0 else 1
    values = {
        "d_model": config["hidden_size"],
        "d_intermediate": width,
        "n_layer": config["num_hidden_layers"],
        "vocab_size": used if -(-used // multiple) * multiple == rows else rows,
        "ssm_cfg": {
            "d_state": config["state_size"],
            "d_conv": config["conv_kernel_size"],
            "expand": config["expand_factor"],
            "dt_rank": config["time_step_rank"],
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config["residual_in_fp32"],
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": config["tie_word_embeddings"],
    }
    found = {mamba.theirs(name, _OUTER, _LAYER): lazy for name, lazy in source.tensors.items()}
    for number in range(config["num_hidden_layers"]) if width else ():
        up, gate = (source.tensors[f"model.layers.{number}.feed_forward.{part}_proj.weight"] for part in ("up", "gate"))
        found[f"backbone.layers.{number}.mlp.fc1.weight"] = _stack(up, gate)
    if config["tie_word_embeddings"]:
        found["lm_head.weight"] = found["backbone.embedding.weight"]
    target.write("config.json", storage.json_bytes(values))
    torch_bin.write(target, found, hf.Progress(on_event, len(found)).tell)
    ids = {name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for name, content in {"generation_config.json": storage.json_bytes(ids), **source.files}.items():
        if name != hf.CARD:
            target.write(name, content)


def _stack(up: Lazy, gate: Lazy) -> Lazy:
    shape = (2 * up.shape[0], up.shape[1])
    return Lazy(up.dtype, shape, lambda: torch.cat([up.load(), gate.load()]), up.origin)


def open_runtime(path: Path, format: str) -> Runtime:
    """See source.py. mamba_ssm itself needs a GPU; without one transformers' Mamba, which began as its port, reads the
    same file.
    """
    if importlib.util.find_spec("mamba_ssm") and torch.cuda.is_available():
        return _Native(path)
    fields = hf.read_config(path)
    if fields.integer("d_intermediate", 0):
        raise Unavailable("mamba_ssm isn't installed or finds no GPU, and nothing else reads its feed-forward")
    return _through_transformers(path, fields)


def _through_transformers(path: Path, fields: hf.Fields) -> Runtime:
    from transformers import MambaConfig, MambaForCausalLM

    ssm = fields.values.get("ssm_cfg") or {}
    state = {
        name.replace("backbone.embedding.", "backbone.embeddings."): lazy.load().float()
        for name, lazy in hf.read_tensors(path).items()
    }
    embedding = state["backbone.embeddings.weight"]
    config = MambaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=fields.integer("d_model"),
        num_hidden_layers=fields.integer("n_layer"),
        state_size=ssm.get("d_state", 16),
        conv_kernel=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        time_step_rank=ssm.get("dt_rank", "auto"),
        use_conv_bias=ssm.get("conv_bias", True),
        layer_norm_epsilon=EPS,
        tie_word_embeddings=fields.flag("tie_embeddings", True),
    )
    with torch.device("meta"):
        model = MambaForCausalLM(config)
    state.setdefault("lm_head.weight", embedding)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as exc:
        raise CheckpointError(f"{path}: transformers' Mamba can't take its tensors ({str(exc)[:200]})") from exc
    runtime = TransformersRuntime(path, "MambaForCausalLM", model)
    runtime.name += " (its Mamba; mamba_ssm itself needs a GPU)"
    return runtime


class _Native:
    """mamba_ssm's own model on a GPU."""

    def __init__(self, path: Path) -> None:
        import mamba_ssm
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        self.name = f"mamba_ssm {mamba_ssm.__version__}"
        self.model = MambaLMHeadModel.from_pretrained(str(path), device="cuda", dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """See source.Runtime."""
        return self.model(torch.tensor([ids], device="cuda")).logits[0].float().cpu()

    def close(self) -> None:
        """See source.Runtime."""
        self.model = None
        torch.cuda.empty_cache()
