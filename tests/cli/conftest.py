"""Fixtures of the command line's tests: a random model, and a runner that also watches for control characters."""

import io
import sys

import pytest

from moai_cli import main

CONTROLS = {*map(chr, range(32)), *map(chr, range(127, 160)), "\u202e"} - {"\n", "\t"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random model with the tokenizer of moai, whose likeliest token never ends an answer."""
    import torch

    from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM
    from moai_core.data.tokenize import load_tokenizer

    path = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer("moai_tiny")
    torch.manual_seed(0)
    config = MoaiMambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, initializer_range=0.4
    )
    model = MoaiMambaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:7] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def moai(capsys, monkeypatch, tmp_path):
    """Runs a command line in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = main.run([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and not CONTROLS & set(out + err)
        return code, out, err

    return run
