"""Presets, initialisation, dtypes, loss and configuration of the model."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, get_mamba_config, load_mamba_config
from moai_core.errors import CheckpointError, StorageError, UsageError
from moai_core.model import loss as losses

SPECIFICATION_JSON = {
    "model_type": "mamba_moai", "vocab_size": 128000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "state_size": 16,
    "conv_kernel_size": 4, "expand_factor": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "use_fast_scan": True, "use_checkpoint": True,
    "quantization_bits": 4, "use_quantization": False,
}  # fmt: skip


def count(H, layers, ffn, R, V=128000, N=16, K=4):
    """The parameter count from the equations alone: untied embeddings and head, a mixer with norms on dt, B, C, SwiGLU."""
    inner = 2 * H
    mixer = (
        H * 2 * inner
        + inner * K
        + inner
        + inner * (R + 2 * N)
        + R
        + 2 * N
        + R * inner
        + inner
        + inner * N
        + inner
        + inner * H
    )
    return 2 * V * H + layers * (mixer + 3 * H * ffn + 2 * H) + H


@pytest.mark.parametrize(
    "size, exact, shape",
    [
        ("2b", 1_989_416_704, (2048, 24, 5632, 128)),
        ("8b", 8_218_230_016, (4096, 40, 6016, 256)),
        ("16b", 16_374_846_976, (5120, 48, 9728, 320)),
    ],
)
def test_presets_have_their_exact_parameter_counts(size, exact, shape):
    with torch.device("meta"):
        model = MoaiMambaForCausalLM(get_mamba_config(size))
    assert sum(p.numel() for p in model.parameters()) == exact == count(*shape)
    assert model.model.gradient_checkpointing


@torch.no_grad()
def test_initialisation_is_the_papers():
    torch.manual_seed(3)
    model = MoaiMambaForCausalLM(
        MoaiMambaConfig(vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    )
    mixer = model.model.layers[3].mamba
    assert torch.equal(mixer.A_log[5], torch.arange(1, 17).float().log())
    assert torch.equal(mixer.D, torch.ones(512))
    dt = F.softplus(mixer.dt_bias).log()
    assert math.log(1e-3) - 1e-3 < dt.min() < math.log(2e-3) and math.log(0.08) < dt.max() < math.log(0.1) + 1e-3
    assert abs(dt.mean() - (math.log(1e-3) + math.log(0.1)) / 2) < 0.25
    assert mixer.dt_proj.weight.abs().max() <= 16**-0.5 and mixer.dt_proj.weight.std() == pytest.approx(
        16**-0.5 / 3**0.5, rel=0.05
    )
    assert mixer.in_proj.weight.std() == pytest.approx(0.02, rel=0.05)
    assert mixer.out_proj.weight.std() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.model.layers[0].feed_forward.down_proj.weight.std() == pytest.approx(0.02 / 4, rel=0.05)
    assert len({float(layer.mamba.dt_bias[0]) for layer in model.model.layers}) == 8


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_recurrence_parameters_stay_fp32_and_exact_under_casts(tiny_model, cast):
    model = tiny_model()
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(("A_log", ".D", "dt_bias"))}
    model.to(cast)
    assert model.lm_head.weight.dtype == cast and len(before) == 6
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]) and parameter.dtype == torch.float32
    model.half().bfloat16().float()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    out = model.to(cast)(torch.tensor([[5, 6, 7]]))
    assert out.logits.dtype == cast and out.state.layers[0][1].dtype == torch.float32


def test_the_specifications_json_loads_unchanged(tmp_path):
    file = tmp_path / "설정 2b.json"
    file.write_text(json.dumps(SPECIFICATION_JSON), encoding="utf-8")
    config = load_mamba_config(file)
    assert config.numbers() == get_mamba_config("2b").numbers()
    assert (config.time_step_rank, config.dt_bc_norm, config.tie_word_embeddings, config.mixer, config.ffn) == (
        128,
        True,
        False,
        "mamba",
        "swiglu",
    )
    custom = MoaiMambaConfig(
        vocab_size=128000,
        hidden_size=2560,
        num_hidden_layers=32,
        state_size=16,
        conv_kernel_size=4,
        expand_factor=2,
        use_fast_scan=True,
    )
    assert custom.time_step_rank == 160 and custom.inner_size == 5120


@pytest.mark.parametrize(
    "text, error, message",
    [
        ('{"hidden_size": 0}', UsageError, "hidden_size must be an integer >= 1 (got 0)"),
        ('{"hidden_size": "x"}', UsageError, "hidden_size"),
        ('{"mixer": "mamba9"}', UsageError, "mixer must be one of mamba (got 'mamba9')"),
        ('{"model_type": "llama"}', CheckpointError, "model_type is 'llama', expected 'mamba_moai'"),
        ('{"hiden_size": 64}', UsageError, "unknown model field 'hiden_size'"),
        ('{"hidden_size": 64', UsageError, "config.json:1: not valid JSON"),
        ("[1]", UsageError, "expected a JSON object"),
        ('{"eos_token_id": 999999}', UsageError, "eos_token_id must lie between 0 and vocab_size - 1"),
    ],
)
def test_bad_configurations_are_one_clear_error(tmp_path, text, error, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error) as caught:
        load_mamba_config(tmp_path)
    assert (
        message in caught.value.message and "\n" not in caught.value.message and "config.json" in caught.value.message
    )


def test_unknown_size_field_and_file():
    with pytest.raises(UsageError, match="unknown model size '3b'"):
        get_mamba_config("3b")
    with pytest.raises(UsageError, match="unknown model field 'hiden_size'") as caught:
        get_mamba_config("2b", hiden_size=3)
    assert "did you mean hidden_size?" in caught.value.hint
    with pytest.raises(StorageError, match="nowhere"):
        load_mamba_config("/nowhere/at/all.json")


@pytest.mark.parametrize("tokens, vocabulary, chunk", [(1, 11, 1), (37, 50, 16), (64, 1000, 7), (130, 97, 1 << 20)])
@pytest.mark.parametrize("num_items", [None, 1000])
def test_chunked_cross_entropy_equals_torch(monkeypatch, tokens, vocabulary, chunk, num_items):
    monkeypatch.setattr(losses, "_CHUNK", {"cpu": chunk * vocabulary, "cuda": chunk * vocabulary})
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(24, vocabulary, bias=False).double()
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[torch.rand(tokens) < 0.3] = losses.IGNORED
    counted = int((targets != losses.IGNORED).sum())
    want = F.cross_entropy(head(hidden), targets, reduction="sum", ignore_index=losses.IGNORED) / (
        num_items or max(counted, 1)
    )
    want_grads = torch.autograd.grad(want * 3, [hidden, head.weight])
    got = losses.chunked_cross_entropy(hidden, targets, head, num_items)
    got_grads = torch.autograd.grad(got * 3, [hidden, head.weight])
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6, abs=1e-12)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12
    with torch.no_grad():
        assert float(losses.chunked_cross_entropy(hidden, targets, head, num_items)) == pytest.approx(
            float(want.detach()), rel=1e-6, abs=1e-12
        )


def test_loss_never_holds_all_logits_at_once(monkeypatch):
    """The largest tensor that the loss makes is a chunk's logits, in the forward and in the backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    tokens, vocabulary, chunk = 512, 4000, 32
    monkeypatch.setattr(losses, "_CHUNK", {"cpu": chunk * vocabulary, "cuda": chunk * vocabulary})
    hidden, head = torch.randn(tokens, 8, requires_grad=True), torch.nn.Linear(8, vocabulary, bias=False)
    with Largest() as largest:
        losses.chunked_cross_entropy(hidden, torch.randint(0, vocabulary, (tokens,)), head).backward()
    assert 0 < largest.size <= chunk * vocabulary < tokens * vocabulary


def test_loss_matches_shifted_logits_and_never_crosses_documents(tiny_model):
    model = tiny_model()
    ids = torch.randint(5, 97, (2, 12))
    logits = model(ids).logits
    want = F.cross_entropy(logits[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1))
    assert float(model(ids, labels=ids).loss.detach()) == pytest.approx(float(want), rel=1e-5)
    out = model(ids, labels=ids, return_logits=True)
    assert out.logits.shape == (2, 12, 97) and model(ids, labels=ids).logits is None
    seq_idx = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    targets = losses.shift_labels(ids, seq_idx)
    assert targets[0, 4] == losses.IGNORED and targets[1, 4] == ids[1, 5] and (targets[:, -1] == losses.IGNORED).all()
    nothing = model(ids, labels=torch.full_like(ids, -100))
    assert float(nothing.loss) == 0.0
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 97)
    assert model(ids, return_dict=False)[0].shape == (2, 12, 97)


def test_projections_are_called_so_that_replaced_layers_work(tiny_model):
    """A quantized or adapted layer has no `.weight` to read: wrap every projection and compare."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.hidden_inner, self.calls, self.out_features = [inner], 0, inner.out_features

        def forward(self, x):
            self.calls += 1
            return self.hidden_inner[0](x)

    model = tiny_model()
    ids = torch.randint(5, 97, (1, 9))
    want = model(ids).logits
    wrapped = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                wrapped.append(Wrapped(child))
                setattr(module, name, wrapped[-1])
    assert torch.equal(model(ids).logits, want) and len(wrapped) == 2 * 7 + 1 and all(w.calls == 1 for w in wrapped)


def test_import_costs_nothing_and_registers_on_first_use():
    code = (
        "import sys, moai_core; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "from moai_core import get_mamba_config, load_mamba_config, MoaiMambaConfig, MoaiMambaForCausalLM; "
        "from transformers import AutoConfig, AutoModelForCausalLM; "
        "config = AutoConfig.for_model('mamba_moai', vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1); "
        "assert type(AutoModelForCausalLM.from_config(config)) is MoaiMambaForCausalLM; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
