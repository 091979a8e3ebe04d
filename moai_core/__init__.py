"""moai_core: pure-Mamba language models: configuration, model, scans, data, training and generation.

The names below are the public API. They load on first use, so that `import moai_core` costs nothing and stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "MoaiMambaConfig": "moai_core.config",
    "get_mamba_config": "moai_core.config",
    "load_mamba_config": "moai_core.config",
    "MoaiMambaForCausalLM": "moai_core.model",
    "MoaiMambaModel": "moai_core.model",
    "MoaiState": "moai_core.model",
}
__all__ = ["MoaiMambaConfig", "MoaiMambaForCausalLM", "MoaiMambaModel", "MoaiState", "get_mamba_config", "load_mamba_config"]

if TYPE_CHECKING:
    from moai_core.config import MoaiMambaConfig, get_mamba_config, load_mamba_config
    from moai_core.model import MoaiMambaForCausalLM, MoaiMambaModel, MoaiState


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moai_core' has no attribute {name!r}")
    # Any of these names brings the registration of the Auto classes with it (moai_core.model does that on import).
    import_module("moai_core.model")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
