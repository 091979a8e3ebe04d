"""Which models the decode engine takes, and their weights as its kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moai_core import cuda
from moai_core.generation.decode_kernels import Matrix, matrix, refusal
from moai_core.quant.linear import QuantLinear

STATES = (8, 16, 32, 64, 128)


def why_not(model: Any) -> str | None:
    """Why the engine can't run this model where it is, in one sentence, or None if it can."""
    from moai_core.model import MoaiMambaForCausalLM

    if type(model) is not MoaiMambaForCausalLM:
        return f"it knows moai's own model, not {type(model).__name__}"
    if why := cuda.why_not(model.device):
        return why
    config, dtype = model.config, model.model.final_layernorm.weight.dtype
    if dtype not in cuda.TYPES:
        return f"it computes in bf16, fp16 or fp32, not in {dtype}"
    if model.model.scan_backend not in ("auto", "cuda"):
        return f"the scan backend {model.model.scan_backend!r} was named"
    if config.mixer != "mamba" or config.ffn not in ("swiglu", "none"):
        return f"it knows Mamba-1 with SwiGLU or nothing, not mixer {config.mixer!r} with ffn {config.ffn!r}"
    if config.state_size not in STATES or not 2 <= config.conv_kernel_size <= 8:
        return f"state_size must be one of {STATES} and conv_kernel_size 2 to 8"
    return _refused_weights(model, dtype)


def _refused_weights(model: Any, dtype: torch.dtype) -> str | None:
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantLinear) and embedding.spec.format == "fp8":
        return "embed_tokens is stored as fp8"
    named = [("embed_tokens", embedding), ("lm_head", model.lm_head)]
    for index, layer in enumerate(model.model.layers):
        mixer, ffn = layer.mamba, layer.feed_forward
        parts = [(mixer, ("in_proj", "x_proj", "out_proj"))]
        parts += [] if ffn is None else [(ffn, ("gate_proj", "up_proj", "down_proj"))]
        named += [(f"layer {index}: {name}", getattr(part, name)) for part, names in parts for name in names]
        if mixer.conv1d.weight.dtype != dtype:
            return f"layer {index}: conv1d is {mixer.conv1d.weight.dtype}, not {dtype}"
        if ffn is not None and _kind(ffn.gate_proj) != _kind(ffn.up_proj):
            return f"layer {index}: gate_proj and up_proj are stored differently"
        if getattr(mixer.dt_proj, "rotation", None) is not None or not isinstance(
            mixer.dt_proj, (torch.nn.Linear, QuantLinear)
        ):
            return f"layer {index}: dt_proj is no plain matrix"
    return next((why for name, module in named if (why := refusal(name, module, dtype))), None)


def _kind(module: Any) -> Any:
    """How a weight is stored: equal for weights that one kernel can read."""
    return getattr(module, "spec", None)


@dataclass
class Rotation:
    """T of quant/hadamard.py as the kernel reads it: size = odd * 2^k; mix (odd, odd) fp32, None where odd is 1."""

    size: int
    mix: Tensor | None

    @property
    def odd(self) -> int:
        """The odd factor of the size."""
        return self.size // (self.size & -self.size)

    @property
    def scale(self) -> float:
        """What Sylvester's matrix of the power of two is multiplied by."""
        return 0.5 ** (((self.size & -self.size).bit_length() - 1) // 2)


def rotation_of(module: Any) -> Rotation | None:
    """The rotation of a matrix's inputs, if it has one."""
    online = getattr(module, "rotation", None)
    if online is None:
        return None
    found = Rotation(module.in_features, None)
    if found.odd > 1:
        # Unit vectors at the head of each block show the odd factor, in front of a row of ones.
        power = found.size // found.odd
        units = torch.eye(found.size, device=module.qweight.device)[::power]
        found.mix = (online(units)[:, ::power] / found.scale).contiguous()
    return found


@dataclass
class Layer:
    """A layer's weights as the kernels read them. A_log2: -exp(A_log) log2(e), (I, N) fp32."""

    norm: Tensor
    in_proj: Matrix
    conv: tuple[Tensor, Tensor | None, Tensor | None]
    x_proj: Matrix
    norms: tuple[Tensor | None, Tensor | None, Tensor | None]
    dt_proj: Tensor
    dt_bias: Tensor
    A_log2: Tensor
    D: Tensor
    out_proj: Matrix
    rotation: Rotation | None
    ffn_norm: Tensor | None = None
    gate: Matrix | None = None
    up: Matrix | None = None
    down: Matrix | None = None
    down_rotation: Rotation | None = None

    @property
    def bytes(self) -> int:
        """Weights read by a step."""
        matrices = (self.in_proj, self.x_proj, self.out_proj, self.gate, self.up, self.down)
        others = (self.dt_proj, self.A_log2, self.conv[0])
        return sum(m.bytes for m in matrices if m is not None) + sum(t.numel() * t.element_size() for t in others)


def layer_of(layer: Any, dtype: torch.dtype) -> Layer:
    """The weights of a model's layer; but for small ones nothing is copied."""
    mixer, ffn = layer.mamba, layer.feed_forward
    dt = mixer.dt_proj
    scale = getattr(mixer, "conv_scale", None)
    found = Layer(
        norm=layer.input_layernorm.weight.detach(),
        in_proj=matrix(mixer.in_proj),
        conv=(
            mixer.conv1d.weight.detach().flatten(1).contiguous(),
            None if mixer.conv1d.bias is None else mixer.conv1d.bias.detach(),
            None if scale is None else scale.detach().to(dtype),
        ),
        x_proj=matrix(mixer.x_proj),
        norms=tuple(n.weight.detach() for n in (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm))
        if mixer.norms
        else (None, None, None),
        dt_proj=(dt.weight_values(dtype) if isinstance(dt, QuantLinear) else dt.weight.detach()).contiguous(),
        dt_bias=mixer.dt_bias.detach().float(),
        A_log2=(-torch.exp(mixer.A_log.detach().double()) * 1.4426950408889634).float().contiguous(),
        D=mixer.D.detach().float(),
        out_proj=matrix(mixer.out_proj),
        rotation=rotation_of(mixer.out_proj),
    )
    if ffn is not None:
        found.ffn_norm = layer.pre_ff_layernorm.weight.detach()
        found.gate, found.up, found.down = (matrix(m) for m in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
        found.down_rotation = rotation_of(ffn.down_proj)
    return found
