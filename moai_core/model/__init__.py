"""The model: configuration, state, Mamba mixer, feed-forward, loss. Importing it registers the Auto classes of
transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moai_core.model.configuration import MoaiMambaConfig, get_mamba_config, load_mamba_config
from moai_core.model.modeling import MoaiMambaForCausalLM, MoaiMambaModel
from moai_core.model.state import MoaiState

__all__ = [
    "MoaiMambaConfig",
    "MoaiMambaForCausalLM",
    "MoaiMambaModel",
    "MoaiState",
    "get_mamba_config",
    "load_mamba_config",
]

AutoConfig.register(MoaiMambaConfig.model_type, MoaiMambaConfig, exist_ok=True)
AutoModel.register(MoaiMambaConfig, MoaiMambaModel, exist_ok=True)
AutoModelForCausalLM.register(MoaiMambaConfig, MoaiMambaForCausalLM, exist_ok=True)
