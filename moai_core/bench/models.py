"""The models that `moai_core.bench.train` compares, behind one face: a loss to train with and hidden states to read.

`transformers` is its Llama of the same width, depth and feed-forward (heads of 128, SDPA), `mamba_ssm` its Mamba-1 of
the same size, as its authors assemble it (fused norm and residual). Both materialise their logits. All have random
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moai_core import scan as kernels
from moai_core.bench.work import heads_of
from moai_core.errors import UsageError
from moai_core.recipe import Recipe
from moai_core.training import setup


@dataclass
class Model:
    """A model as this benchmark sees it: `loss(tokens, seq_idx)` and `hidden(tokens)` of (B, L) int64."""

    name: str
    module: nn.Module
    loss: Callable[[Tensor, Tensor | None], Tensor]
    hidden: Callable[[Tensor], Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.module.parameters() if p.requires_grad]


def moai(numbers: dict[str, Any], recipe: Recipe, device: torch.device, chunk: int | None) -> Model:
    """moai's model with initial weights in the recipe's precision; `hidden` reads in chunks if `chunk` says so."""
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    dtype, mixed = setup.precision(recipe)
    with torch.device(device):
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**numbers))
    setup.make_ready(model, recipe, dtype)

    def loss(tokens: Tensor, seq_idx: Tensor | None) -> Tensor:
        packed = {} if seq_idx is None else {"seq_idx": seq_idx, "seq_idx_in_order": True}
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            return model(input_ids=tokens, labels=tokens, **packed).loss

    def hidden(tokens: Tensor) -> Tensor:
        state, out = None, None
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            for part in tokens.split(chunk or tokens.shape[1], dim=1):
                out = model.model(input_ids=part, state=state, use_cache=True)
                state = out.state
        assert out is not None
        return out.last_hidden_state

    return Model("moai", model, loss, hidden)


def llama(numbers: dict[str, Any], dtype: torch.dtype, mixed: bool, device: torch.device) -> Model:
    """transformers' Llama of the same width, depth, feed-forward and vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = heads_of(numbers["hidden_size"])[0]
    shape = {name: numbers[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "attn_implementation": "sdpa"}
    shape |= {"tie_word_embeddings": numbers["tie_word_embeddings"], "pad_token_id": None}
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=1 << 20))
    model.to(dtype).train()  # type: ignore[arg-type]

    def loss(tokens: Tensor, seq_idx: Tensor | None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def read(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            return model.model(input_ids=tokens, use_cache=False).last_hidden_state

    return Model("transformers", model, loss, read)


def require_mamba_ssm(where: torch.device) -> None:
    """UsageError where mamba_ssm's kernels can't run."""
    for op in ("scan", "conv"):
        why = dict(kernels.explain(where, torch.bfloat16, op=op))["mamba_ssm"]
        if why is not None:
            raise UsageError(f"--against mamba_ssm: {why}", hint="leave it out of --against")


def mamba_ssm(numbers: dict[str, Any], dtype: torch.dtype, mixed: bool, device: torch.device) -> Model:
    """mamba_ssm's Mamba-1 model of the same size."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    ffn = numbers["intermediate_size"] if numbers["ffn"] != "none" else 0
    state = {"d_state": numbers["state_size"], "d_conv": numbers["conv_kernel_size"]}
    layer = {"layer": "Mamba1", **state, "expand": numbers["expand_factor"], "dt_rank": numbers["time_step_rank"]}
    model = MambaLMHeadModel(
        MambaConfig(
            d_model=numbers["hidden_size"], d_intermediate=ffn, n_layer=numbers["num_hidden_layers"], ssm_cfg=layer,
            vocab_size=numbers["vocab_size"], rms_norm=True, residual_in_fp32=numbers["residual_in_fp32"],
            fused_add_norm=True, pad_vocab_size_multiple=1, tie_embeddings=numbers["tie_word_embeddings"],
        ),
        device=device, dtype=dtype,
    )  # fmt: skip
    model.train()

    def loss(tokens: Tensor, seq_idx: Tensor | None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits = model(tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    return Model("mamba_ssm", model, loss, model.backbone)
