"""Quantizing a model that is in memory already: the Python names of MOAI's specification.

The model comes back with quantized layers in the places of the old ones, and can be saved, loaded, used and given to
every command. For a model on disk, and for reports, `quantize_folder` needs less memory.
"""

from __future__ import annotations

from typing import Any

import torch

from moai_core.config import MODEL_TYPE
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import fake, linear
from moai_core.quantize import layerwise, plan, search
from moai_core.quantize.calibrate import from_tokens
from moai_core.quantize.plan import EMBEDDING, HEAD
from moai_core.quantize.runner import Runner


def quantize(model: Any, settings: plan.Settings, calib_data: Any = None) -> Any:
    """`model` (a MoaiMambaForCausalLM) with the matrices that `settings` speak of quantized, in place; returned for
    convenience.

    calib_data: token ids (S, L), a list of (L,) tensors, or batches with input_ids; for gptq and awq. Raises
    UsageError for settings, data and a model quantized already, CheckpointError for NaN in its weights.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != MODEL_TYPE:
        raise UsageError(f"only a MoaiMambaForCausalLM can be quantized (got {type(model).__name__})")
    if model.config.quantization is not None:
        raise UsageError("the model is quantized already", hint="quantize the model that it was made of")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"tensor {name} holds NaN or infinite numbers")
    settings.spec()
    if settings.kind.calibrated and calib_data is None:
        raise UsageError(f"{settings.method} needs calib_data", hint="token ids of the shape (sequences, tokens)")
    tied = model.config.tie_word_embeddings
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    quantization = plan.quantization(settings, shapes, tied=tied)
    specs = linear.plan(quantization, list(linear.matrices(model)))
    model.eval()
    found = _layers(model, settings, specs, calib_data)
    for name in (EMBEDDING, HEAD):
        if (spec := specs.get(name)) is not None:
            tensors = search.nearest(spec, model.get_submodule(name).weight.detach())
            found |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    return _adopt(model, settings, quantization, found)


def _layers(model: Any, settings: plan.Settings, specs: Any, calib_data: Any) -> dict[str, torch.Tensor]:
    runner = None
    if settings.kind.calibrated:
        runner = Runner(from_tokens(calib_data), device=model.device, dtype=model.dtype)
        runner.embed(model.model.embed_tokens)
    found: dict[str, torch.Tensor] = {}
    options = plan.layer_options(settings, model.dtype)
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        mine = {name.removeprefix(prefix): spec for name, spec in specs.items() if name.startswith(prefix)}
        found |= layerwise.quantize_layer(
            layer, prefix[:-1], mine, runner=runner, method=settings.kind.layer, options=options
        ).tensors
    return found


def _adopt(model: Any, settings: plan.Settings, quantization: dict[str, Any], found: dict[str, torch.Tensor]) -> Any:
    """The quantized layers with their numbers, in the model itself."""
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    values = model.config.to_dict() | {
        "quantization": quantization,
        "use_quantization": True,
        "quantization_bits": settings.width,
    }
    with torch.device("meta"):
        other = MoaiMambaForCausalLM(MoaiMambaConfig(**values))
    old = model.state_dict()
    # What a method changed without quantizing it keeps the model's type.
    changed = {name: tensor.to(old[name].dtype) if name in old else tensor for name, tensor in found.items()}
    state = old | changed
    other.load_state_dict({name: state[name].to(model.device) for name in other.state_dict()}, assign=True)
    if isinstance(embedding := other.model.embed_tokens, linear.QuantEmbedding):
        embedding.dtype = model.dtype
    other.tie_weights()
    # The caller's model itself changes: optimizers aside, every reference to it sees the quantized one.
    model.model, model.lm_head, model.config = other.model, other.lm_head, other.config
    model._tied_weights_keys = other._tied_weights_keys
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the matrices that could be quantized, by module."""
    found: dict[str, Any] = linear.matrices(model)
    return {name: module.weight.detach() for name, module in found.items()}


def quantize_model(model: Any, bits: int = 4, group_size: int = 128, **more: Any) -> Any:
    """The model ready for quantization-aware training of all weights, in place: a forward pass computes with 4- or
    8-bit values, the optimizer sees full ones, `save_pretrained` writes the packed ones. Raises as `quantize`."""
    settings = plan.Settings("int4", bits, group_size, **more)
    masters = weights_of(model)
    quantize(model, settings)
    fake.trainable(model, "full", masters)
    return model


def quantize_gptq(model: Any, calib_data: Any, bits: int = 4, group_size: int = 128, **more: Any) -> Any:
    """GPTQ (arXiv 2210.17323); `more`: further fields of plan.Settings. Raises as `quantize`."""
    return quantize(model, plan.Settings("gptq", bits, group_size, **more), calib_data)


def quantize_awq(model: Any, calib_data: Any, w_bit: int = 4, group_size: int = 128, **more: Any) -> Any:
    """AWQ (arXiv 2306.00978), with a scale for out_proj too. Raises as `quantize`."""
    return quantize(model, plan.Settings("awq", w_bit, group_size, **more), calib_data)


def quantize_fp8(model: Any, **more: Any) -> Any:
    """FP8 (e4m3) weights, a scale a row; multiplied in FP8 where the GPU can (Ada, Hopper and later), and nowhere said
    to be: `moai doctor` tells. Raises as `quantize`."""
    return quantize(model, plan.Settings("fp8", **more))
