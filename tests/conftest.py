"""What all tests share: no network, one thread unless a test wants more, caches in a temporary folder, a tiny model."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait cost other processes their core (tests start many).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Compiled kernels outlive a test session; numba rebuilds them when their source changes.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "kernels"))

import pytest
from hypothesis import settings

# The same examples in every run: a failure speaks of the change at hand. Slow tests draw fresh ones (derandomize=False).
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory):
    os.environ["MOAI_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_model():
    """A function that makes a small model with random weights, strong enough that every part shows in the logits."""

    def make(seed: int = 0, **fields):
        import torch

        from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM

        torch.manual_seed(seed)
        shape = {
            "vocab_size": 97,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "state_size": 5,
            "initializer_range": 0.2,
        }
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**{**shape, **fields})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        return model

    return make
