"""Models of a size with random weights in a format, for benchmarks: speed doesn't depend on the numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moai_core import config
from moai_core.bench import report
from moai_core.errors import at_least
from moai_core.quant.formats import FORMATS as KNOWN
from moai_core.quant.linear import QuantLinear, TiedHead, quantized

_INT8 = {"format": "int8", "group_size": 0, "symmetric": True}
_LAYER = ("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")


def _whole(name: str) -> dict[str, Any]:
    return {"format": name, "group_size": 0, "symmetric": True}


# By name: of a layer's large matrices; head and embedding beside them are int8. none: as the model computes.
FORMATS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "int4": {"format": "int4", "group_size": 128, "symmetric": True},
    "int8": _INT8,
    **{name: _whole(name) for name in ("fp8", "nvfp4", "mxfp4", "nf4", "bnb8")},
}
# Seconds on a CPU, not minutes.
_SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8192}
_SPREAD = 4


def sized(preset: str | None, layers: int | None, device: torch.device) -> tuple[str, dict[str, Any]]:
    """(name, numbers) of the model that flags ask for: without a preset 2b on a GPU, a small one on a CPU; layers: so
    many instead of its own. Raises UsageError."""
    report.check_preset(preset)
    at_least(("--layers", layers, 1))
    preset = preset or ("2b" if device.type == "cuda" else None)
    fields: dict[str, Any] = {} if preset else dict(_SMALL)
    if layers is not None:
        fields["num_hidden_layers"] = layers
    return preset or "small", config.fields(preset, **fields)


def model(numbers: dict[str, Any], form: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """moai's model of this size with random weights, quantized as `form` says."""
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    chosen = dict(numbers)
    if FORMATS[form] is not None:
        names = _LAYER if numbers["ffn"] != "none" else _LAYER[:2]
        modules = dict.fromkeys(names, FORMATS[form])
        head = ("embed_tokens",) if numbers["tie_word_embeddings"] else ("embed_tokens", "lm_head")
        chosen["quantization"] = {"method": "random", "modules": modules | dict.fromkeys(head, _INT8)}
    with torch.device(device):
        made = MoaiMambaForCausalLM(MoaiMambaConfig(**chosen))
    made.requires_grad_(False)
    for module in quantized(made).values():
        fill(module)
    # Logits as far apart as a trained model's: how long a token's choice takes depends on how many are in question.
    last: Any = made.lm_head._embedding[0] if isinstance(made.lm_head, TiedHead) else made.lm_head
    size_of_logits: Any = last.scales if isinstance(last, QuantLinear) else last.weight
    size_of_logits.mul_(_SPREAD)
    return nn.Module.to(made, dtype).eval()


def fill(module: QuantLinear) -> None:
    """Random numbers of about the size that a model has."""
    codes = module.qweight
    if "scales" not in module.stored or module.spec.format not in ("int4", "int8", "fp8"):
        weight = torch.randn(module.out_features, module.in_features, device=codes.device)
        module.load_state_dict(KNOWN[module.spec.format].encode(module.spec, weight / module.in_features**0.5))
        return
    if codes.dtype == torch.float8_e4m3fn:
        codes.copy_(torch.randn(codes.shape, device=codes.device))
    else:
        low, high = (0, 256) if codes.dtype == torch.uint8 else (-127, 128)
        codes.copy_(torch.randint(low, high, codes.shape, device=codes.device, dtype=torch.int16).to(codes.dtype))
    width = {"int4": 4.6, "int8": 73.0}.get(module.spec.format, 1.0)
    module.scales = torch.full_like(module.tensors()["scales"], 1 / (width * module.in_features**0.5))
    if not module.spec.symmetric:
        module.zeros = torch.full_like(module.tensors()["zeros"], 7.5)
