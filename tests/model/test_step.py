"""A token's step as one program, against the modules."""

from __future__ import annotations

import copy

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM
from moai_core.model import step
from moai_core.model.state import MoaiState

INT4 = {"format": "int4", "group_size": 32}
QUANTIZED = {
    "method": "rtn",
    "modules": {
        "in_proj": INT4,
        "out_proj": {**INT4, "symmetric": False},
        "gate_proj": {**INT4, "group_size": 64},
        "up_proj": {"format": "int8", "group_size": 0},
        "down_proj": INT4,
        "x_proj": {"format": "int8", "group_size": 0},
    },
}


def make(quantized: bool = False, seed: int = 0, **fields):
    torch.manual_seed(seed)
    shape = {"vocab_size": 97, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "state_size": 5}
    quantization = QUANTIZED if quantized else None
    config = MoaiMambaConfig(**{**shape, "initializer_range": 0.2, "quantization": quantization, **fields})
    model = MoaiMambaForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("qweight"):
            buffer.copy_(torch.randint(1, 100, buffer.shape).to(buffer.dtype))
        elif name.endswith("scales"):
            buffer.copy_(torch.rand(buffer.shape) * 0.02)
        elif name.endswith("zeros"):
            buffer.copy_(torch.rand(buffer.shape) * 15)
    return model


def both(model, rows: int, monkeypatch):
    """(the program's output, the modules' output) of one token after six."""
    ids, token = torch.randint(0, 97, (rows, 6)), torch.randint(0, 97, (rows, 1))
    with torch.no_grad():
        state = model(ids).state
        kept = state.clone()
        ours = model(token, state=state)
        assert taken(model, rows)
        assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(kept), strict=True)), "a given state was changed"
        with monkeypatch.context() as patch:
            patch.setattr(step, "take", lambda *_: None)
            theirs = model(token, state=state)
    return ours, theirs


def flat(state: MoaiState) -> list[torch.Tensor]:
    return list(state.tensors().values())


def taken(model, rows: int) -> bool:
    known = step._known.get(model.model, {}).get(rows)
    return known is not None and known.program is not None


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "quantized"])
@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_as_the_modules(quantized, rows, monkeypatch):
    ours, theirs = both(make(quantized), rows, monkeypatch)
    # A rounding that falls the other way moves an activation by one of 65000 steps.
    limit = 5e-5 if quantized else 5e-6
    assert apart(ours.logits, theirs.logits) < limit
    assert all(apart(a, b) < limit for a, b in zip(flat(ours.state), flat(theirs.state), strict=True))
    assert torch.equal(ours.state.seen, theirs.state.seen)


@pytest.mark.parametrize(
    "fields", [{"ffn": "none"}, {"dt_bc_norm": False}, {"state_size": 16, "conv_kernel_size": 2}, {"hidden_size": 132}]
)
def test_shapes_and_options(fields, monkeypatch):
    ours, theirs = both(make(**fields), 3, monkeypatch)
    assert apart(ours.logits, theirs.logits) < 5e-6


def test_a_row_has_the_same_bits_at_any_width_and_number_of_threads():
    model = make(True)
    before = torch.get_num_threads()
    with torch.no_grad():
        state = model(torch.randint(0, 97, (1, 6))).state
        token = torch.tensor([[5]])
        wanted = flat(model(token, state=state).state)
        try:
            for rows, threads in ((1, 2), (2, 1), (3, 2), (17, 3)):
                torch.set_num_threads(threads)
                found = model(token.expand(rows, 1), state=state.select(torch.zeros(rows, dtype=torch.int64))).state
                for a, b in zip(flat(found), wanted, strict=True):
                    assert torch.equal(a, b.expand_as(a))
        finally:
            torch.set_num_threads(before)


def test_changed_weights_are_seen():
    model, token = make(), torch.tensor([[3]])
    changes = [
        lambda: model.model.layers[0].mamba.A_log.data.add_(0.3),
        lambda: model.model.layers[1].feed_forward.up_proj.weight.data.mul_(1.1),
        lambda: setattr(model.model.layers[0].mamba, "D", torch.nn.Parameter(torch.zeros(384))),
        lambda: setattr(model.model.layers[1].mamba, "out_proj", torch.nn.Linear(384, 192, bias=False)),
        lambda: model.load_state_dict(make(seed=1).state_dict()),
    ]
    with torch.no_grad():
        state = model(torch.tensor([[1, 2]])).state
        last = model(token, state=state).logits
        for change in changes:
            change()
            new = model(token, state=state).logits
            assert taken(model, 1)
            fresh = copy.deepcopy(model)
            assert torch.equal(new, fresh(token, state=state).logits) and not torch.equal(new, last)
            last = new


def test_what_the_modules_have_to_do_themselves():
    token = torch.tensor([[3]])

    def declined(model) -> bool:
        with torch.no_grad():
            model(token, state=model(torch.tensor([[1, 2]])).state)
        return not taken(model, 1)

    assert not declined(make())
    seen = []
    hooked = make()
    hooked.model.layers[0].mamba.in_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert declined(hooked) and len(seen) == 2
    assert declined(make().to(torch.bfloat16))
    named = make()
    named.set_scan_backend("reference")
    assert declined(named)
    biased = make()
    biased.model.layers[0].mamba.in_proj = torch.nn.Linear(192, 768)
    assert declined(biased)
    exact = make(True)
    exact.model.layers[1].mamba.in_proj.kernel = "dequantize"
    assert declined(exact)
    trained = make()
    state = trained(torch.tensor([[1, 2]]), use_cache=True).state
    trained(token, state=state).logits.sum().backward()
    assert trained.model.layers[0].mamba.A_log.grad is not None and not taken(trained, 1)
