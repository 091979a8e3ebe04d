"""`MoaiMambaForCausalLM`: embeddings, a stack of Mamba (+ SwiGLU) layers, final norm and head, as a transformers
`PreTrainedModel`.

    logits = head(norm(layers(embed(ids))));  each layer: x += mixer(norm(x)), then x += ffn(ffn_norm(x))

Tensor names follow Jamba's, so that a checkpoint reads as a Jamba without attention. One contract holds for state,
padding and packing, with chunks of any length (`MoaiMambaForCausalLM.forward`). What is left out: attention, positions,
and anything that grows with the context.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from moai_core import scan as kernels
from moai_core.errors import UsageError
from moai_core.model import fused, padding, products, step
from moai_core.model import loss as losses
from moai_core.model.configuration import MoaiMambaConfig
from moai_core.model.ffn import SwiGLU
from moai_core.model.mamba import LayerState, MambaMixer, dt_bias_init
from moai_core.model.norm import RMSNorm
from moai_core.model.state import MoaiState
from moai_core.quant import linear as quant

CHECKPOINTING = ("none", "selective", "full")


@dataclass
class MoaiModelOutput(ModelOutput):
    """last_hidden_state (B, L, H) after the final norm; state after the last real token of each row."""

    last_hidden_state: Tensor | None = None
    state: MoaiState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MoaiCausalLMOutput(ModelOutput):
    """loss (scalar, fp32), logits (B, L or logits_to_keep, V), state after the last real token of each row."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: MoaiState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MoaiMambaLayer(nn.Module):
    """Pre-norm residual layer: Mamba mixer, then (unless `ffn: none`) SwiGLU."""

    def __init__(self, config: MoaiMambaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mamba = MambaMixer(config)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.ffn != "none" else None
        self.feed_forward = SwiGLU(config) if config.ffn != "none" else None

    def forward(
        self,
        residual: Tensor,
        x: Tensor | None,
        state: LayerState | None,
        seq_idx: Tensor | None,
        backend: str,
        selective: bool = False,
        own: bool = False,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """residual (B, L, H) the stream without x (B, L, H), the result of the block before (None = nothing) -> the
        same pair after this layer, whose sum is the stream, and the layer's new state.

        A block's result is added in the norm of the next, which reads both anyway. selective: keep for the backward
        pass only what takes a large matrix product or the scan to compute (recompute.py). own: nobody else has the
        stream, so that without gradients a block may add its result to it; then x is None.
        """
        own = own or x is not None
        residual, h = products.add_norm(residual, x, self.input_layernorm, selective, self.mamba.in_proj)
        x, state = self.mamba(h, state, seq_idx, backend, products.onto(residual, own, self.mamba.out_proj))
        feed = self.feed_forward
        if feed is not None and self.pre_ff_layernorm is not None:
            own = own or x is not None
            readers = (feed.gate_proj, feed.up_proj)
            residual, h = products.add_norm(residual, x, self.pre_ff_layernorm, selective, *readers)
            x = feed(h, products.onto(residual, own, feed.down_proj))
        return residual, x, state


class MoaiPreTrainedModel(PreTrainedModel):
    """Initialisation (model.md of the papers: A_log = log(1..N), D = 1, dt log-uniform, residual outputs scaled by
    depth) and loading.
    """

    config_class = MoaiMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoaiMambaLayer"]  # noqa: RUF012 (transformers' own convention)
    # Loading in half precision keeps these in fp32, as MambaMixer._apply does for casts.
    # (Scales of quantized layers are fp16 numbers, which fp32 holds and bf16 doesn't.)
    _keep_in_fp32_modules_strict = {"A_log", "D", "dt_bias", "scales", "zeros"}  # noqa: RUF012
    # A recurrent state can't be cropped: transformers then refuses assisted decoding instead of giving wrong tokens.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, MambaMixer):
            state = module.A_log.shape[1]
            init.copy_(
                module.A_log,
                torch.arange(1, state + 1, dtype=torch.float32, device=module.A_log.device)
                .log()
                .expand_as(module.A_log),
            )
            init.ones_(module.D)
            init.copy_(module.dt_bias, dt_bias_init(module.dt_bias.shape[0], module.dt_bias.device))
            if isinstance(module.dt_proj, nn.Linear):
                init.uniform_(module.dt_proj.weight, -(module.split[0] ** -0.5), module.split[0] ** -0.5)
        elif isinstance(module, nn.Conv1d):
            bound = 1 / math.sqrt(module.kernel_size[0])
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            # Outputs onto the residual stream start smaller, so that its variance doesn't grow with the depth (GPT-2).
            depth = math.sqrt(2 * self.config.num_hidden_layers) if getattr(module, "writes_residual", False) else 1.0
            init.normal_(module.weight, std=std / depth)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)


class MoaiMambaModel(MoaiPreTrainedModel):
    """The stack without the head: ids -> hidden states and state."""

    def __init__(self, config: MoaiMambaConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MoaiMambaLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.scan_backend = "auto" if config.use_fast_scan else "reference"
        # transformers switches these two (activation_checkpointing_enable); the config gives the start.
        self.gradient_checkpointing = config.use_checkpoint
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        self.selective = False
        self.checkpointing_layers: int | None = None
        if config.quantization is not None:
            quant.install(self, config.quantization, prefix="model.")
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: MoaiState | None = None,
        seq_idx: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx_in_order: bool = False,
    ) -> MoaiModelOutput:
        """As MoaiMambaForCausalLM.forward, without head and loss."""
        x: Any = self._embedded(input_ids, inputs_embeds, state)
        batch, length = x.shape[:2]
        seq_idx, order = padding.real_tokens_first(attention_mask, seq_idx, (batch, length), known=seq_idx_in_order)
        if order is not None:
            x = x.gather(1, order[..., None].expand_as(x))
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if state is not None and length == 1 and seq_idx is None and not output_hidden_states:
            taken = step.take(self, x, state.layers)
            if taken is not None:
                x, layers = taken
                after = MoaiState(layers, state.seen.to(x.device) + 1) if use_cache else None
                return MoaiModelOutput(last_hidden_state=x, state=after)
        new_layers: list[LayerState] = []
        every: list[Tensor] = []
        often = len(self.layers) if self.checkpointing_layers is None else self.checkpointing_layers
        residual, x = x, None
        for index, layer in enumerate(self.layers):
            again = self.training and torch.is_grad_enabled() and index < often
            full, selective = again and self.gradient_checkpointing, again and self.selective
            if (full or output_hidden_states) and x is not None:
                # One tensor to keep, or to show, instead of two.
                residual, x = residual + x, None
            if output_hidden_states:
                every.append(residual)
            before = state.layers[index] if state is not None else None
            if full:
                run = functools.partial(self._gradient_checkpointing_func, layer.__call__)
                residual, x, after = run(residual, x, before, seq_idx, self.scan_backend)
            else:
                own = index > 0 and not output_hidden_states
                residual, x, after = layer(residual, x, before, seq_idx, self.scan_backend, selective, own)
            if use_cache:
                new_layers.append(after)
        _, x = fused.add_rms_norm(residual, x, self.final_layernorm.weight, self.final_layernorm.eps)
        every.append(x)
        if order is not None:
            back = order.argsort(1)[..., None]
            every = [h.gather(1, back.expand_as(h)) for h in every]
        new_state = None
        if use_cache:
            read = torch.full((batch,), length, device=x.device) if seq_idx is None else (seq_idx >= 0).sum(1)
            new_state = MoaiState(new_layers, read if state is None else state.seen.to(read.device) + read)
        return MoaiModelOutput(
            last_hidden_state=every[-1], state=new_state, hidden_states=tuple(every) if output_hidden_states else None
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, state: MoaiState | None) -> Tensor:
        """The stream that the layers begin with (B, L, H). Raises UsageError for inputs that don't fit together."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None and input_ids.dim() != 2:
            raise UsageError(f"input_ids must have the shape (rows, tokens) (got {tuple(input_ids.shape)})")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if state is not None and (state.batch_size != len(x) or len(state.layers) != len(self.layers)):
            raise UsageError(
                f"the state has {state.batch_size} rows and {len(state.layers)} layers, "
                f"the call has {len(x)} rows and the model {len(self.layers)} layers"
            )
        return x.float() if self.config.residual_in_fp32 else x


class MoaiMambaForCausalLM(MoaiPreTrainedModel, GenerationMixin):
    """The language model: `MoaiMambaModel` and a head (tied to the embeddings if the config says so)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own convention)

    def __init__(self, config: MoaiMambaConfig) -> None:
        super().__init__(config)
        self.model = MoaiMambaModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # What is trained for in place of the cross-entropy (distillation): (hidden (B, L, H), targets (B, L), count,
        # the call's inputs) -> loss.
        self.objective: Callable[..., Tensor] | None = None
        if config.quantization is not None:
            self._quantize_head(config)
        self.post_init()

    def _quantize_head(self, config: MoaiMambaConfig) -> None:
        """The layers are quantized already; a tied head multiplies with what the embedding stores."""
        embedding = self.model.embed_tokens
        if config.tie_word_embeddings and isinstance(embedding, quant.QuantEmbedding):
            self.lm_head = quant.TiedHead(embedding)
            self._tied_weights_keys = {}
        quant.install(self, config.quantization)
        if config.tie_word_embeddings and isinstance(self.lm_head, quant.QuantLinear):
            raise UsageError(
                "model field quantization: lm_head is tied to embed_tokens, which holds the numbers of both",
                hint="name embed_tokens instead",
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def set_scan_backend(self, name: str) -> None:
        """Selects the scan by name (`auto` = the fastest that can run). Raises UsageError where the named one can't run
        here.
        """
        if name != "auto" and name not in kernels.BACKENDS:
            raise UsageError(f"unknown scan backend {name!r}", hint=f"backends: auto, {', '.join(kernels.BACKENDS)}")
        self.model.scan_backend = name

    def set_checkpointing(self, mode: str, layers: int | None = None) -> None:
        """What a layer keeps for the backward pass when training: `none` keeps everything, `selective` all but what is
        cheap to compute again (norms, convolution, time steps, SwiGLU's product), `full` its input alone. layers: only
        so many of them, from the first; the backward pass comes to them when the others' memory is free again.
        """
        if mode not in CHECKPOINTING:
            raise UsageError(f"unknown checkpointing {mode!r}", hint=f"modes: {', '.join(CHECKPOINTING)}")
        self.model.gradient_checkpointing, self.model.selective = mode == "full", mode == "selective"
        self.model.checkpointing_layers = layers

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: MoaiState | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items: Tensor | int | None = None,
        return_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        seq_idx_in_order: bool = False,
    ) -> MoaiCausalLMOutput | tuple[Any, ...]:
        """Reads a chunk of tokens of any length.

        input_ids (B, L) int64, or inputs_embeds (B, L, H). attention_mask (B, L), 0 = padding, anywhere in a row. A
        padded row gives what it gives alone, at every batch size; the outputs at padding mean nothing. state: what an
        earlier call returned (None = zeros); the first token continues it. It is not modified. seq_idx (B, L) int32:
        the document that a token belongs to, never decreasing in a row, < 0 = padding. State and convolution restart
        where it grows inside the call. labels (B, L) int64: aligned with input_ids and shifted inside; -100 and the
        first token of each document are not predicted. num_items: divide the summed loss by this instead of the number
        of counted labels (accumulation over micro-batches). use_cache: return the state (default: when not training).
        logits_to_keep: only the last so many positions' logits (0 = all). return_logits: default, no logits when labels
        are given. seq_idx_in_order: the caller knows (`padding.in_order`, on the CPU) that seq_idx doesn't decrease and
        has its padding at the ends of rows; it isn't looked at again, for which a GPU would have to be waited for.

        Raises UsageError for shapes that don't agree and for a seq_idx that decreases.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "seq_idx": seq_idx}
        out = self.model(
            **inputs,
            state=state,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx_in_order=seq_idx_in_order,
        )
        hidden = out.last_hidden_state
        loss = None if labels is None else self._loss(hidden, labels, num_items, inputs)
        logits = None
        if return_logits if return_logits is not None else labels is None:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        result = MoaiCausalLMOutput(loss=loss, logits=logits, state=out.state, hidden_states=out.hidden_states)
        return result.to_tuple() if return_dict is False else result

    def _loss(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None, inputs: dict[str, Tensor | None]
    ) -> Tensor:
        """The cross-entropy, or in training what stands in its place."""
        if labels.shape != hidden.shape[:2]:
            raise UsageError(
                f"labels must have the shape of input_ids {tuple(hidden.shape[:2])} (got {tuple(labels.shape)})"
            )
        targets = losses.shift_labels(labels, padding.numbered(inputs["attention_mask"], inputs["seq_idx"]))
        if self.objective is not None and self.training:
            return self.objective(hidden, targets, num_items, inputs)
        return losses.chunked_cross_entropy(hidden, targets, self.lm_head, num_items)

    # ---- transformers' generate: the state travels as its `past_key_values`

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: MoaiState | None = None,
        state: MoaiState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int = 0,
        is_first_iteration: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """The first call reads the whole prompt (continuing `state` if one is passed to generate), later ones the
        newest token.
        """
        inputs: dict[str, Any] = {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if past_key_values is not None:
            return {**inputs, "input_ids": input_ids[:, -1:], "state": past_key_values}
        prompt = (
            {"inputs_embeds": inputs_embeds}
            if inputs_embeds is not None and is_first_iteration
            else {"input_ids": input_ids}
        )
        return {**inputs, **prompt, "state": state, "attention_mask": attention_mask}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.state is not None:
            model_kwargs["past_key_values"] = outputs.state
        return model_kwargs
