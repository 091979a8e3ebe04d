"""The transformer that a Mamba model is compared with: transformers' Llama at equal parameters, as moai's training loop
wants a model.

Equal are vocabulary, width, depth, initial weights' scale (outputs onto the residual stream included), and tying; heads
of 64 channels, rotary positions, RMSNorm and SwiGLU as in Llama, whose feed-forward takes what parameters are left
(`shape`). A Mamba layer's projections hold 6 H^2 numbers where attention holds 4 H^2, so that a Mamba model with a
feed-forward of 2 H meets a transformer with one of 8/3 H, which is Llama's own.

Rows are packed from documents, and no attention crosses from one to another: on a GPU in 16 bits FlashAttention knows
where documents begin (no work is done across), elsewhere a mask says so. Positions count from a document's beginning.
What is saved is a plain Llama folder, which transformers loads by itself. Left out: grouped queries, which save memory
that is no matter at this size. Sources: Llama (arXiv 2302.13971), RoPE (arXiv 2104.09864), FlashAttention-2 (arXiv
2307.08691).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from moai_core import checkpoint, footprint, storage, tensors, weights
from moai_core.data import tokenize
from moai_core.errors import CheckpointError, UsageError
from moai_core.model.loss import chunked_cross_entropy, shift_labels
from moai_core.recipe import Recipe
from moai_core.training import setup

HEAD, THETA, TOLERANCE = 64, 10_000.0, 0.01
_ATTENTION = "moai_documents"


# ---- its size


def shape(config: Mapping[str, Any], *, head: int = HEAD, theta: float = THETA) -> dict[str, Any]:
    """LlamaConfig's fields for the twin of a Mamba model with these numbers (moai_core.config.fields).

    A stack without feed-forwards gets half as many layers, since each of the twin's has two blocks. UsageError where no
    feed-forward brings the parameters within 1 % of each other.
    """
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    depth = depth if config["ffn"] != "none" else -(-depth // 2)
    # Rotary positions turn channels in pairs.
    size = next((d for d in range(min(head, width), 1, -1) if width % d == 0 and d % 2 == 0), None)
    if size is None:
        raise UsageError(f"hidden_size {width} has no even divisor for attention heads", hint="use a multiple of 64")
    target = footprint.parameters(config)["total"]
    fields = {
        "vocab_size": config["vocab_size"],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // size,
        "num_key_value_heads": width // size,
        "head_dim": size,
        "intermediate_size": 0,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "rms_norm_eps": config["rms_norm_eps"],
        "initializer_range": config["initializer_range"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **{name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    ideal = (target - parameters(fields)) / (3 * width * depth)
    for step in (64, 16, 8, 4, 2, 1):  # whole tiles of a matrix product where the size allows
        fields["intermediate_size"] = max(1, round(ideal / step)) * step
        if abs(parameters(fields) / target - 1) <= TOLERANCE / 2:
            return fields
    raise UsageError(
        f"no Llama of width {width} and depth {depth} has {target:,} parameters within {TOLERANCE:.0%}",
        hint="choose a larger hidden_size or intermediate_size",
    )


def parameters(fields: Mapping[str, Any]) -> int:
    """Exact parameters of a Llama with these fields."""
    width, depth = fields["hidden_size"], fields["num_hidden_layers"]
    layer = 4 * width * fields["num_attention_heads"] * fields["head_dim"] + 3 * width * fields["intermediate_size"]
    tables = fields["vocab_size"] * width * (1 if fields["tie_word_embeddings"] else 2)
    return tables + depth * (layer + 2 * width) + width


# ---- documents in a row


class Documents:
    """Which document each token of packed rows belongs to; seq_idx (B, L) as in MoaiMambaForCausalLM.forward."""

    def __init__(self, seq_idx: Tensor) -> None:
        self.seq_idx, self.shape = seq_idx, seq_idx.shape
        self.starts = torch.ones_like(seq_idx, dtype=torch.bool)
        self.starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]

    @cached_property
    def positions(self) -> Tensor:
        """(B, L) int64: tokens since the document's beginning."""
        at = torch.arange(self.shape[1], device=self.seq_idx.device).expand(self.shape)
        return at - torch.where(self.starts, at, 0).cummax(1).values

    @cached_property
    def borders(self) -> Tensor:
        """(documents + 1,) int32: where each begins in the rows laid end to end, and the end; padding counts as one."""
        end = torch.tensor([self.starts.numel()], device=self.starts.device)
        return torch.cat([self.starts.flatten().nonzero().squeeze(1), end]).to(torch.int32)

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, L, L) bool: which tokens a token sees."""
        same = self.seq_idx[:, :, None] == self.seq_idx[:, None, :]
        return same.tril()[:, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, heads, L, D) each -> (B, L, heads, D); the products' type is value's."""
        if not _flash(value):
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scale)
            return out.transpose(1, 2).contiguous()
        rows, length = self.shape
        flat = [t.to(value.dtype).transpose(1, 2).reshape(rows * length, *t.shape[1::2]) for t in (query, key, value)]
        # The operator under torch's own attention over jagged tensors; those add a millisecond of Python a layer.
        cut = (self.borders, self.borders, length, length)
        out = torch.ops.aten._flash_attention_forward(*flat, *cut, 0.0, True, False, scale=scale)[0]
        return out.view(rows, length, *out.shape[1:])


def _flash(value: Tensor) -> bool:
    """Whether FlashAttention takes it."""
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return documents.attend(query, key, value, scaling), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


# ---- the model


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """transformers' Llama that also takes what moai's loop gives. The same name, since what it saves is one."""

    def __init__(self, config: LlamaConfig) -> None:
        config._attn_implementation = _ATTENTION
        super().__init__(config)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        num_items: Tensor | float | None = None,
        seq_idx_in_order: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """With seq_idx (B, L): the loss of labels (B, L), counted and divided as MoaiMambaForCausalLM does. Without: as
        transformers' own.
        """
        if seq_idx is None or labels is None:
            return super().forward(input_ids, labels=labels, **kwargs)
        documents = Documents(seq_idx)
        # transformers passes a mask of four dimensions on as it is; this one only keeps it from making its own.
        nothing = torch.empty((0, 0, 0, 0), device=seq_idx.device)
        call: dict[str, Any] = {"attention_mask": nothing, "position_ids": documents.positions, "use_cache": False}
        hidden = self.model(input_ids=input_ids, documents=documents, **call).last_hidden_state
        targets = shift_labels(labels, seq_idx)
        items: Any = num_items
        return CausalLMOutputWithPast(loss=chunked_cross_entropy(hidden, targets, self.lm_head, items))


def make(fields: Mapping[str, Any], seed: int) -> LlamaForCausalLM:
    """A model with initial weights from `seed`, fp32 on the CPU."""
    from accelerate.utils import set_seed

    set_seed(seed % 2**32)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(depth)  # as moai's outputs onto the residual stream
    return model


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", on_event: Any = None
) -> LlamaForCausalLM:
    """The twin in a run folder (its newest step), a step-N folder or a Llama folder. CheckpointError."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        folder = checkpoint.latest(folder, on_event=on_event) or folder
    if (folder / storage.MANIFEST).exists():
        storage.verify(folder, only=lambda name: not name.startswith("optimizer"))
    if (kind := model_type(folder)) != "llama":
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {kind!r}, expected 'llama'")
    try:
        model = LlamaForCausalLM(LlamaConfig(**storage.read_json(folder / "config.json")))
        found = {name: t for file in weights.shards(folder) for name, t in tensors.iterate(folder / file)}
        missing, extra = model.load_state_dict(found, strict=False)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise CheckpointError(f"{folder}: no usable Llama ({str(exc).splitlines()[0][:160]})") from exc
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if wrong := [*extra, *(name for name in missing if name not in tied)]:
        raise CheckpointError(f"{folder}: tensor {wrong[0][:80]} is {'unexpected' if extra else 'missing'}")
    model.tie_weights()
    stored = max(found.values(), key=Tensor.numel).dtype
    return cast(model, dtype or stored).to(device).eval()  # type: ignore[arg-type]


def cast(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model with weights of another type; its positions' frequencies stay fp32, as transformers loads them."""
    model.to(dtype=dtype)  # type: ignore[call-arg]
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.compute_default_rope_parameters(model.config)[0].to(rotary.inv_freq.device)
    return model


def model_type(folder: Path) -> str | None:
    """What config.json of a model folder says it is. CheckpointError where there is none."""
    values = storage.read_json(folder / "config.json")
    return values.get("model_type") if isinstance(values, dict) else None


# ---- for the training loop


def kind(*, head: int = HEAD, theta: float = THETA) -> setup.Kind:
    """The twin of whatever model a recipe describes, for `training.train`."""

    def new(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
        return make(shape(setup.numbers(recipe, tokenizer), head=head, theta=theta), recipe.train.seed)

    def read(path: Path, recipe: Recipe, tokenizer: Any, dtype: torch.dtype, on_event: Any) -> LlamaForCausalLM:
        model = load(path, dtype=dtype, on_event=on_event)
        tokenize.check_tokenizer(tokenizer, model.config.vocab_size)
        return model

    return setup.Kind(new, read, _ready, flops)


def _ready(model: LlamaForCausalLM, recipe: Recipe, dtype: torch.dtype) -> None:
    if recipe.train.checkpointing != "none":
        raise recipe.error("train.checkpointing", "must be none for the twin: both keep what they compute")
    cast(model, dtype).train()


def flops(model: LlamaForCausalLM) -> int:
    """FLOPs of training on a token: three times forward, matrix products of the weights alone. (Attention's own depend
    on how long the documents are.)
    """
    config = model.config
    fields = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")}
    fields |= {"num_attention_heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return 6 * (parameters({**fields, "tie_word_embeddings": True}) - norms)
