"""Fixtures of the conversions' tests; convert_helpers.py beside this file is importable by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from convert_helpers import SHAPES, shake


@pytest.fixture
def make(tmp_path):
    """A function: writes a random moai model into `tmp_path / name` and returns (folder, model)."""

    def make(name="moai", *, seed=0, dtype=None, tokenizer=None, **fields):
        import torch

        from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, checkpoint

        torch.manual_seed(seed)
        shape = {**SHAPES[0], "intermediate_size": 40, "initializer_range": 0.2, **fields}
        model = shake(MoaiMambaForCausalLM(MoaiMambaConfig(**shape)))
        if dtype is not None:
            model = model.to(dtype)
        checkpoint.save_model(tmp_path / name, model, tokenizer)
        return tmp_path / name, model

    return make


@pytest.fixture(scope="session")
def stored():
    """A function: all tensors of a folder's safetensors files by name."""

    def stored(folder):
        from safetensors.torch import load_file

        return {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }

    return stored


@pytest.fixture(scope="session")
def same():
    """A function: whether two dicts of tensors are equal in names, dtypes and bits."""

    def same(one, two):
        import torch

        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype, name
            assert torch.equal(
                one[name].contiguous().view(-1).view(torch.uint8), two[name].contiguous().view(-1).view(torch.uint8)
            ), name
        return True

    return same
