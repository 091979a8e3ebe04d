"""The benchmark of quantized models on processors, on a tiny one."""

from __future__ import annotations

import json

import pytest

from moai_core.bench import cpu_quant
from moai_core.errors import UsageError
from moai_core.model import MoaiMambaConfig, configuration


@pytest.fixture
def tiny(monkeypatch):
    def preset(name: str, **fields):
        return MoaiMambaConfig(vocab_size=1200, hidden_size=128, intermediate_size=256, num_hidden_layers=2, **fields)

    monkeypatch.setattr(configuration, "get_mamba_config", preset)
    monkeypatch.setattr(cpu_quant.Memory.__init__, "__defaults__", (1 << 20,))


def test_a_report(tiny, capsys):
    words = ["--prompt", "5", "--tokens", "2", "--rounds", "2", "--threads", "1", "--json"]
    assert cpu_quant.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(one["name"], one["what"]) for one in found["results"]} == {("moai", "prompt"), ("moai", "decode")}
    assert all(0 < one["low"] <= one["rate"] <= one["high"] for one in found["results"]) and found["read_rate"] > 0
    assert len(cpu_quant.tables(found)[0].rows) == 2


def test_a_file_that_llama_cpp_does_not_run_is_said(tmp_path):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"no\.gguf: llama\.cpp doesn't run it"):
        cpu_quant.Llama(path, 1)


def test_bytes_of_a_token(tiny):
    model = cpu_quant.build("2b")
    layer = 2 * (128 * 512 + 256 * 128 + 3 * 128 * 256) // 2  # five int4 matrices of two layers
    assert layer < cpu_quant.read_by_a_token(model) < layer + 2 * 60_000 + 1200 * 130
