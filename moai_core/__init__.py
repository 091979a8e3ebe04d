"""moai_core: pure-Mamba language models: configuration, model, scans, quantization, data, training and generation.

The names below are the public API. They load on first use, so that `import moai_core` costs nothing and stays free of
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "MoaiMambaConfig",
    "MoaiMambaForCausalLM",
    "MoaiMambaModel",
    "MoaiState",
    "get_mamba_config",
    "load_mamba_config",
    "quantize_awq",
    "quantize_fp8",
    "quantize_gptq",
    "quantize_model",
]

if TYPE_CHECKING:
    from moai_core.model import (
        MoaiMambaConfig,
        MoaiMambaForCausalLM,
        MoaiMambaModel,
        MoaiState,
        get_mamba_config,
        load_mamba_config,
    )
    from moai_core.quantize.memory import quantize_awq, quantize_fp8, quantize_gptq, quantize_model


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moai_core' has no attribute {name!r}")
    home = "quantize.memory" if name.startswith("quantize_") else "model"
    return getattr(import_module(f"moai_core.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
