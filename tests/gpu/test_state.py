"""The five rules of the state contract on a GPU (tests/model/test_contract.py has them for the CPU), with the scan
backend that `auto` picks there: logits, gradients and states in fp32.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from moai_core import MoaiState

pytestmark = pytest.mark.gpu

_spec = importlib.util.spec_from_file_location("loop", Path(__file__).parents[1] / "model" / "loop.py")
assert _spec is not None and _spec.loader is not None
loop = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loop)

SHAPES = {
    "jamba-like": {"state_size": 16},
    "mamba": {"state_size": 8, "dt_bc_norm": False, "ffn": "none", "tie_word_embeddings": True},
    "wide states": {"state_size": 64, "conv_kernel_size": 3, "time_step_rank": 7, "num_hidden_layers": 1},
}


@pytest.fixture(params=list(SHAPES))
def model(request, tiny_model, device, scans):
    return tiny_model(hidden_size=64, intermediate_size=96, **SHAPES[request.param]).to(device)


def ids_of(model, *shape, seed=1):
    made = torch.randint(5, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return made.to(model.device)


def gradients(model, run):
    model.zero_grad(set_to_none=True)
    run().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_states_equal(relative, got, want, rows=slice(None)):
    for (conv, ssm), (conv_want, ssm_want) in zip(got.layers, want.layers, strict=True):
        assert relative(conv[rows], conv_want) < 1e-5 and relative(ssm[rows], ssm_want) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 17, 65])
def test_logits_equal_an_independent_float64_loop(model, scans, length):
    ids = ids_of(model, 1, length, seed=length)
    want = loop.logits({n: w.cpu() for n, w in model.state_dict().items()}, model.config, ids[0].tolist())
    assert scans.relative(model(ids).logits[0].detach().cpu(), torch.as_tensor(want)) < 1e-5


@pytest.mark.parametrize("cuts", [[20, 17], [1, 2, 3, 31], [1] * 37], ids=["two", "four", "tokens"])
def test_rule_1_chunks_equal_the_whole(model, scans, cuts):
    """Token by token without gradients takes the step kernels."""
    ids = ids_of(model, 3, 37)
    whole, parts, state = model(ids), [], None
    with torch.no_grad():
        for chunk in ids.split(cuts, 1):
            out = model(chunk, state=state)
            state = out.state
            parts.append(out.logits)
    assert scans.relative(torch.cat(parts, 1), whole.logits) < 1e-5
    assert_states_equal(scans.relative, state, whole.state)
    assert state.seen.tolist() == [37] * 3


def test_rule_1_gradients_flow_through_the_state(model, scans):
    ids = ids_of(model, 2, 37)

    def chunked():
        state, parts = None, []
        for chunk in ids.split([20, 1, 16], 1):
            out = model(chunk, state=state, use_cache=True)
            state = out.state
            parts.append(out.logits)
        return (torch.cat(parts, 1) ** 2).mean()

    want = gradients(model, lambda: (model(ids).logits ** 2).mean())
    assert scans.relative(gradients(model, chunked), want) < 2e-5


@pytest.mark.parametrize("lengths", [[7, 1, 29], [1, 1, 1], [16, 16, 5]], ids=str)
def test_rule_2_packed_documents_equal_each_alone(model, scans, lengths):
    documents = [ids_of(model, 1, n, seed=i) for i, n in enumerate(lengths)]
    pad = 4
    ids = torch.cat([*documents, documents[0].new_zeros(1, pad)], 1)
    numbers = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * pad
    seq_idx = torch.tensor([numbers], dtype=torch.int32, device=ids.device)
    out = model(ids, seq_idx=seq_idx)
    assert scans.relative(out.logits[:, :-pad], torch.cat([model(d).logits for d in documents], 1)) < 1e-5
    assert_states_equal(scans.relative, out.state, model(documents[-1]).state)
    items = sum(lengths) - len(lengths)
    if items:
        labels = torch.where(seq_idx < 0, -100, ids)
        want = gradients(model, lambda: sum(model(d, labels=d, num_items=items).loss for d in documents))
        got = gradients(model, lambda: model(ids, seq_idx=seq_idx, labels=labels).loss)
        assert scans.relative(got, want) < 2e-5


def test_rule_2_the_first_token_continues_the_state_whatever_its_number(model, scans):
    ids = ids_of(model, 1, 30)
    first = model(ids[:, :5])
    rest = torch.full((1, 25), 9, dtype=torch.int32, device=ids.device)
    rest[:, 13:] = 10
    out = model(ids[:, 5:], state=first.state, seq_idx=rest)
    want = torch.cat([model(ids[:, :18]).logits[:, 5:], model(ids[:, 18:]).logits], 1)
    assert scans.relative(out.logits, want) < 1e-5


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_rule_3_padding_equals_each_row_alone(model, scans, side):
    lengths = [33, 5, 1, 20]
    rows = [ids_of(model, 1, n, seed=n) for n in lengths]
    width = max(lengths) + 3
    ids, mask = (rows[0].new_zeros(len(rows), width) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for i, n in enumerate(lengths):
        holes = torch.randperm(width, generator=generator)[:n].sort().values
        places = {"left": torch.arange(width - n, width), "right": torch.arange(n), "holes": holes}[side].to(ids.device)
        ids[i, places], mask[i, places] = rows[i][0], 1
    out = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row)
        assert scans.relative(out.logits[i, mask[i] == 1], alone.logits[0]) < 1e-5
        assert_states_equal(scans.relative, out.state, alone.state, slice(i, i + 1))
    assert out.state.seen.tolist() == lengths
    if side != "holes":  # what comes next is defined for rows without holes
        items = sum(lengths) - len(lengths)
        want = gradients(model, lambda: sum(model(r, labels=r, num_items=items).loss for r in rows if r.shape[1] > 1))
        labels = torch.where(mask == 1, ids, -100)
        got = gradients(model, lambda: model(ids, attention_mask=mask, labels=labels, num_items=items).loss)
        assert scans.relative(got, want) < 2e-5


def test_rule_3_nothing_but_padding_leaves_the_state_alone(model):
    ids = ids_of(model, 2, 20)
    state = model(ids).state
    kept = state.clone()
    nothing = model(torch.zeros_like(ids), attention_mask=torch.zeros_like(ids), state=state).state
    for after in (nothing, state):
        assert all(
            torch.equal(a, b) for x, y in zip(after.layers, kept.layers, strict=True) for a, b in zip(x, y, strict=True)
        )


def test_rule_4_a_state_on_disk_continues_bit_exactly(model, tmp_path):
    from safetensors.torch import load_file, save_file

    ids = ids_of(model, 2, 50)
    with torch.no_grad():
        state = model(ids[:, :29]).state
        save_file(state.tensors(), tmp_path / "state.safetensors")
        loaded = MoaiState.from_tensors(load_file(tmp_path / "state.safetensors", device=str(model.device)))
        for rest in (ids[:, 29:], ids[:, 29:30]):
            a, b = model(rest, state=state), model(rest, state=loaded)
            assert torch.equal(a.logits, b.logits) and torch.equal(a.state.seen, b.state.seen)
            assert all(
                torch.equal(s, t)
                for x, y in zip(a.state.layers, b.state.layers, strict=True)
                for s, t in zip(x, y, strict=True)
            )


def test_rule_5_generate_of_transformers_equals_token_by_token(model):
    ids = ids_of(model, 2, 21)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    ids[1, :9] = 0
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    got = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, use_cache=False, **settings))
    for row in range(2):
        tokens, state = ids[row : row + 1, mask[row].bool()], None
        begun = tokens.shape[1]
        with torch.no_grad():
            for token in tokens.T[:, None]:
                out = model(token, state=state)
                state = out.state
            for _ in range(12):
                token = out.logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, token], 1)
                out = model(token, state=state)
                state = out.state
        assert got[row, ids.shape[1] :].tolist() == tokens[0, begun:].tolist()
