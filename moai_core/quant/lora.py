"""Low-rank adapters on a quantized model, by the peft library (LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314).

A folder holds the quantized model as ever, and beside it the adapters as peft writes them (adapter_config.json,
adapter_model.safetensors), so that each half can be used alone. `merge` makes one matrix of both again. Left out: other
adapters than LoRA, adapters on the convolution.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moai_core import storage, tensors
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import hadamard
from moai_core.quant.formats import FORMATS
from moai_core.quant.linear import QuantLinear, replace

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."  # how peft names modules in its files
_LIMIT = 1 << 20


def require() -> None:
    """UsageError when peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("adapters need peft", hint="pip install 'moai[quant]'")


def attach(
    model: nn.Module, *, rank: int = 16, alpha: float = 32, dropout: float = 0.0, targets: Any = TARGETS
) -> None:
    """Puts fresh adapters on the modules `targets`, in place: y = W x + alpha / rank * B (A x), B zero, A random.
    Everything but A and B is frozen.

    Raises UsageError for a missing peft, a rank below 1, and names that no module has.
    """
    require()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    class LoraQuantLinear(Linear):
        """peft's layer calls what it wraps; of that it needs no weight."""

    if rank < 1:
        raise UsageError(f"the rank of the adapters must be >= 1 (got {rank})")
    leaves = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantLinear))
    }
    there = [name for name in targets if name in leaves]
    if not there:
        raise UsageError(f"no module to adapt among {', '.join(targets)}")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=there, bias="none")  # type: ignore[arg-type]
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # the custom module supports it
        inject_adapter_in_model(config, model)
    model.adapters = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": there}  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapted(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return getattr(model, "adapters", None) is not None


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict with adapters as (that of the model without them, the adapters under peft's names)."""
    plain, extra = {}, {}
    for name, tensor in state.items():
        if ".lora_" in name:
            extra[_PREFIX + name.replace(".default.", ".")] = tensor
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    return plain, extra


def write(folder: storage.FolderWriter, model: Any, adapters: Mapping[str, Tensor]) -> None:
    """The two files, as peft reads them."""
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": "",
        "bias": "none",
        "inference_mode": True,
        **model.adapters,
    }
    folder.write(CONFIG, storage.json_bytes(values))
    folder.write(FILE, tensors.encode(adapters, {"format": "pt"}))


def read(folder: Path, model: nn.Module, device: Any = "cpu") -> None:
    """Attaches the adapters of `folder` to the model in it. Raises CheckpointError for files that don't fit it."""
    values = storage.read_json(folder / CONFIG, limit=_LIMIT)
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: not the configuration of LoRA adapters")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    dropout, targets = values.get("lora_dropout", 0.0), values.get("target_modules")
    known = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in (rank, alpha, dropout)]
    if not all(known) or not isinstance(rank, int) or not 1 <= rank <= 1 << 16 or not 0 <= float(dropout) < 1:
        raise CheckpointError(f"{folder / CONFIG}: r, lora_alpha and lora_dropout must be numbers")
    if not isinstance(targets, list) or not all(isinstance(name, str) and name in TARGETS for name in targets):
        raise CheckpointError(f"{folder / CONFIG}: target_modules must be some of {', '.join(TARGETS)}")
    attach(model, rank=rank, alpha=float(alpha), dropout=float(dropout), targets=targets)  # type: ignore[arg-type]
    own = dict(model.named_parameters())
    wanted = {_PREFIX + name.replace(".default.", "."): p for name, p in own.items() if ".lora_" in name}
    found = tensors.inspect(folder / FILE)
    for name, parameter in wanted.items():
        if name not in found or found[name].shape != tuple(parameter.shape):
            there = f"shape {list(found[name].shape)}" if name in found else "missing"
            raise CheckpointError(f"{folder / FILE}: tensor {name} is {there}, the model needs {list(parameter.shape)}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{folder / FILE}: unexpected tensor {extra[0][:80]}")
    for name, tensor in tensors.iterate(folder / FILE, device=device):
        wanted[name].data = tensor.to(device)


def plain_weight(layer: QuantLinear) -> Tensor:
    """(out, in) fp32: what a layer multiplies its inputs with, a rotation of them included."""
    weight = layer.weight_values()
    return weight if layer.rotation is None else hadamard.unfold(weight)


@torch.no_grad()
def merge(model: nn.Module, *, dtype: torch.dtype | None) -> None:
    """Makes W + alpha / rank * B A of every adapted matrix, in place.

    dtype: an `nn.Linear` of this type comes in its place; None: it is rounded to the format that it had (one that isn't
    quantized keeps its type).
    """
    from peft.tuners.lora import LoraLayer

    adapted: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        base = layer.get_base_layer()
        quantized = isinstance(base, QuantLinear)
        weight = plain_weight(base) if quantized else base.weight.float()
        weight = weight + layer.get_delta_weight("default").float()
        if quantized and dtype is None:
            turned = weight if base.rotation is None else hadamard.fold(weight)
            base.load_state_dict(FORMATS[base.spec.format].encode(base.spec, turned))
            base._prepared = {}
        else:
            plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight.to(dtype or base.weight.dtype), requires_grad=True)
            base = plain
        replace(model, name, base)
    del model.adapters
