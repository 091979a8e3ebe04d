"""The five rules of the state contract, on logits and gradients, against an independent float64 loop and transformers'
Mamba.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from moai_core import MoaiMambaForCausalLM, MoaiState
from moai_core.errors import UsageError

_spec = importlib.util.spec_from_file_location("loop", Path(__file__).with_name("loop.py"))
assert _spec is not None and _spec.loader is not None
loop = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loop)

SHAPES = [
    {},
    {"dt_bc_norm": False, "ffn": "none", "tie_word_embeddings": True},
    {"conv_kernel_size": 3, "state_size": 16, "time_step_rank": 7},
]
BACKENDS = ["reference", "auto"]


def relative(got, want) -> float:
    got, want = torch.as_tensor(got).detach().double(), torch.as_tensor(want).detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def ids_of(model, *shape, seed=1):
    return torch.randint(5, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, run):
    """Gradients of a loss function of the model, as {name: tensor}."""
    model.zero_grad(set_to_none=True)
    run().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, tolerance=1e-5):
    assert got.keys() == want.keys() and len(want) > 10
    total = torch.cat([g.flatten() for g in want.values()]).norm()
    for name in want:
        # A tensor whose gradient is tiny beside the whole has rounding noise of the whole, not of itself.
        error = (got[name] - want[name]).norm()
        assert error <= tolerance * max(want[name].norm(), 1e-2 * total), f"{name}: {error / want[name].norm():.2e}"


@pytest.fixture(params=SHAPES, ids=["jamba-like", "mamba", "odd"])
def shape(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def model(request, tiny_model, shape):
    made = tiny_model(**shape)
    made.set_scan_backend(request.param)
    return made


@pytest.mark.parametrize("length", [1, 2, 3, 17, 65])
def test_logits_equal_an_independent_float64_loop(model, length):
    ids = ids_of(model, 1, length, seed=length)
    want = loop.logits(model.state_dict(), model.config, ids[0].tolist())
    assert relative(model(ids).logits[0].detach(), want) < 1e-5


@pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [31, 32], list(range(1, 37))], ids=str)
def test_rule_1_chunks_equal_the_whole(model, cuts):
    ids = ids_of(model, 2, 37)
    whole = model(ids)
    state, parts = None, []
    for chunk in torch.tensor_split(ids, cuts, dim=1):
        out = model(chunk, state=state)
        state = out.state
        parts.append(out.logits)
    assert relative(torch.cat(parts, 1), whole.logits) < 1e-5
    for (conv, ssm), (conv_whole, ssm_whole) in zip(state.layers, whole.state.layers, strict=True):
        assert relative(conv, conv_whole) < 1e-5 and relative(ssm, ssm_whole) < 1e-5
    assert state.seen.tolist() == [37, 37]


def test_rule_1_token_by_token_without_gradients_takes_the_step_path(model):
    ids = ids_of(model, 3, 19)
    want = model(ids).logits
    state, parts = None, []
    with torch.no_grad():
        for t in range(19):
            out = model(ids[:, t : t + 1], state=state)
            state = out.state
            parts.append(out.logits)
    assert relative(torch.cat(parts, 1), want) < 1e-5


def test_rule_1_gradients_flow_through_the_state(model):
    ids = ids_of(model, 2, 23)

    def whole():
        return (model(ids).logits ** 2).mean()

    def chunked():
        state, parts = None, []
        for chunk in ids.split([9, 1, 13], dim=1):
            out = model(chunk, state=state, use_cache=True)
            state = out.state
            parts.append(out.logits)
        return (torch.cat(parts, 1) ** 2).mean()

    assert_same_gradients(gradients(model, chunked), gradients(model, whole))


@pytest.mark.parametrize("lengths", [[7, 1, 12], [1, 1, 1], [20], [3, 16]], ids=str)
def test_rule_2_packed_documents_equal_each_alone(model, lengths):
    documents = [ids_of(model, 1, n, seed=n + 7 * i) for i, n in enumerate(lengths)]
    packed = torch.cat(documents, 1)
    seq_idx = torch.cat([torch.full((1, n), i, dtype=torch.int32) for i, n in enumerate(lengths)], 1)
    # Padding behind the last document must change nothing.
    pad = 4
    padded = torch.cat([packed, torch.zeros(1, pad, dtype=torch.long)], 1)
    padded_idx = torch.cat([seq_idx, torch.full((1, pad), -1, dtype=torch.int32)], 1)
    want = torch.cat([model(d).logits for d in documents], 1)
    assert relative(model(packed, seq_idx=seq_idx).logits, want) < 1e-5
    out = model(padded, seq_idx=padded_idx)
    assert relative(out.logits[:, : packed.shape[1]], want) < 1e-5
    last = model(documents[-1]).state
    assert relative(out.state.layers[-1][1], last.layers[-1][1]) < 1e-5
    assert relative(out.state.layers[-1][0], last.layers[-1][0]) < 1e-5

    items = sum(lengths) - len(lengths)
    if items:
        labels = torch.where(padded_idx < 0, -100, padded)
        one_by_one = gradients(model, lambda: sum(model(d, labels=d, num_items=items).loss for d in documents))
        assert_same_gradients(
            gradients(model, lambda: model(padded, seq_idx=padded_idx, labels=labels).loss), one_by_one
        )


def test_rule_2_the_first_token_continues_the_state_whatever_its_number(model):
    ids = ids_of(model, 1, 12)
    first = model(ids[:, :5])
    rest = torch.full((1, 7), 9, dtype=torch.int32)
    rest[:, 3:] = 10
    out = model(ids[:, 5:], state=first.state, seq_idx=rest)
    want = torch.cat([model(ids[:, :8]).logits[:, 5:], model(ids[:, 8:]).logits], 1)
    assert relative(out.logits, want) < 1e-5


@pytest.mark.parametrize("lengths", [[13, 5, 1], [4], [9, 9]], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_rule_3_padding_equals_each_row_alone(model, lengths, side):
    rows = [ids_of(model, 1, n, seed=3 * n + i) for i, n in enumerate(lengths)]
    width = max(lengths) + 3
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for i, row in enumerate(rows):
        n = row.shape[1]
        places = {
            "left": range(width - n, width),
            "right": range(n),
            "holes": torch.randperm(width, generator=generator)[:n].sort().values,
        }[side]
        ids[i, list(places)] = row[0]
        mask[i, list(places)] = 1
    out = model(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row)
        assert relative(out.logits[i, mask[i] == 1], alone.logits[0]) < 1e-5
        for (conv, ssm), (conv_alone, ssm_alone) in zip(out.state.layers, alone.state.layers, strict=True):
            assert relative(conv[i : i + 1], conv_alone) < 1e-5 and relative(ssm[i : i + 1], ssm_alone) < 1e-5
    assert out.state.seen.tolist() == lengths
    if max(lengths) > 1:
        items = sum(lengths) - len(lengths)
        want = gradients(model, lambda: sum(model(r, labels=r, num_items=items).loss for r in rows if r.shape[1] > 1))
        if side == "holes":
            return  # the next token of a position before a hole stands behind it: labels are defined for contiguous rows
        assert_same_gradients(gradients(model, lambda: model(ids, attention_mask=mask, labels=ids).loss), want)


def test_rule_3_padding_inside_a_continued_row(model):
    ids = ids_of(model, 1, 11)
    state = model(ids[:, :6]).state
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids[:, 6:]], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    out = model(padded, attention_mask=mask, state=state)
    assert relative(out.logits[:, 2:], model(ids).logits[:, 6:]) < 1e-5
    nothing = model(
        torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.zeros(1, 3, dtype=torch.long), state=state
    )
    assert all(
        torch.equal(a, b)
        for x, y in zip(nothing.state.layers, state.layers, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_rule_4_a_state_on_disk_continues_bit_exactly(model, tmp_path):
    from safetensors.torch import load_file, save_file

    ids = ids_of(model, 2, 30)
    with torch.no_grad():
        state = model(ids[:, :20]).state
        save_file(state.tensors(), tmp_path / "state.safetensors")
        loaded = MoaiState.from_tensors(load_file(tmp_path / "state.safetensors"))
        a, b = model(ids[:, 20:], state=state), model(ids[:, 20:], state=loaded)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.state.seen, b.state.seen)
    assert all(
        torch.equal(x, y)
        for p, q in zip(a.state.layers, b.state.layers, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def test_a_state_given_is_not_modified(model):
    ids = ids_of(model, 2, 9)
    with torch.no_grad():
        state = model(ids).state
        kept = state.clone()
        for chunk in (ids[:, :1], ids):
            model(chunk, state=state)
    assert all(
        torch.equal(x, y) for p, q in zip(state.layers, kept.layers, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize(
    "settings", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1, "use_cache": False}], ids=str
)
def test_rule_5_generate_of_transformers(model, settings):
    ids = ids_of(model, 2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0
    got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None, **settings)
    if settings["num_beams"] > 1:
        uncached = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None, use_cache=False, **settings
        )
        assert torch.equal(got, uncached)
        return
    for row in range(2):
        prompt = ids[row : row + 1, mask[row].bool()]
        state, tokens = None, prompt
        with torch.no_grad():
            for token in prompt.T[:, None]:
                out = model(token, state=state)
                state = out.state
            for _ in range(12):
                token = out.logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, token], 1)
                out = model(token, state=state)
                state = out.state
        assert got[row, mask.shape[1] :].tolist() == tokens[0, prompt.shape[1] :].tolist()


def test_equals_transformers_mamba_in_logits_and_gradients(tiny_model):
    from transformers import MambaConfig, MambaForCausalLM

    ours = tiny_model(ffn="none", dt_bc_norm=False, tie_word_embeddings=True)
    ours.set_scan_backend("auto")
    c = ours.config
    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            state_size=c.state_size,
            num_hidden_layers=c.num_hidden_layers,
            conv_kernel=c.conv_kernel_size,
            expand=c.expand_factor,
            time_step_rank=c.time_step_rank,
            layer_norm_epsilon=c.rms_norm_eps,
            residual_in_fp32=False,
            tie_word_embeddings=True,
        )
    ).eval()
    renamed = {}
    for name, tensor in ours.state_dict().items():
        name = (
            name.replace("model.layers.", "backbone.layers.")
            .replace("input_layernorm", "norm")
            .replace(".mamba.", ".mixer.")
        )
        name = (
            name.replace("dt_bias", "dt_proj.bias")
            .replace("model.final_layernorm", "backbone.norm_f")
            .replace("model.embed_tokens", "backbone.embeddings")
        )
        renamed[name] = tensor
    theirs.load_state_dict(renamed)
    ids = ids_of(ours, 3, 33)
    assert relative(ours(ids).logits, theirs(ids).logits) < 1e-5
    mine, other = (
        gradients(ours, lambda: ours(ids, labels=ids).loss),
        gradients(theirs, lambda: theirs(ids, labels=ids).loss),
    )
    back = {new: old for old, new in zip(ours.state_dict(), renamed, strict=True)}
    assert_same_gradients(mine, {back[name]: g for name, g in other.items()})


def test_gradient_checkpointing_changes_nothing(model):
    ids = ids_of(model, 2, 21)
    model.train()
    plain = gradients(model, lambda: model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    recomputed = gradients(model, lambda: model(ids, labels=ids).loss)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_residual_in_fp32_keeps_a_bf16_model_closer_to_fp32(tiny_model):
    ids = None
    errors = {}
    for wide in (False, True):
        model = tiny_model(num_hidden_layers=8, residual_in_fp32=wide)
        ids = ids_of(model, 2, 40) if ids is None else ids
        want = model(ids).logits
        errors[wide] = relative(model.to(torch.bfloat16)(ids).logits.float(), want)
    assert errors[True] < errors[False] < 0.1


def test_bad_calls_are_named(tiny_model):
    model = tiny_model()
    ids = ids_of(model, 2, 6)
    with pytest.raises(UsageError, match=r"seq_idx must not decrease.*row 1 has 3 before 2"):
        model(ids, seq_idx=torch.tensor([[0] * 6, [0, 0, 3, 2, 2, 2]]))
    with pytest.raises(UsageError, match=r"input_ids must have the shape \(rows, tokens\) \(got \(6,\)\)"):
        model(ids[0])
    with pytest.raises(UsageError, match=r"labels must have the shape of input_ids \(2, 6\) \(got \(2, 5\)\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(UsageError, match=r"attention_mask must have the shape of input_ids \(2, 6\) \(got \(2, 5\)\)"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(UsageError, match="the state has 2 rows"):
        model(ids[:1], state=model(ids).state)
    with pytest.raises(UsageError, match="exactly one of input_ids"):
        model()
    with pytest.raises(UsageError, match="unknown scan backend 'fast'"):
        model.set_scan_backend("fast")
    with pytest.raises(TypeError, match="positions"):
        model(ids, positions=ids)  # nothing is swallowed by **kwargs


def test_nan_in_a_padded_place_stays_there(model):
    """Padding may hold anything: a poisoned embedding row must not reach real tokens."""
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
    ids = ids_of(model, 2, 8)
    ids[0, :3] = 0
    ids[1, 6:] = 0
    mask = (ids != 0).long()
    out = model(ids, attention_mask=mask)
    if not model.config.tie_word_embeddings:
        assert torch.isfinite(out.logits[mask.bool()]).all()
    assert all(torch.isfinite(t).all() for pair in out.state.layers for t in pair)
    assert np.isfinite(float(out.state.seen.sum()))


def test_save_and_load_round_trip(model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model.save_pretrained(tmp_path / "a model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a model")
    assert isinstance(again, MoaiMambaForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path / "a model").numbers() == model.config.numbers()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    half = MoaiMambaForCausalLM.from_pretrained(tmp_path / "a model", dtype=torch.bfloat16)
    mixer, original = half.model.layers[0].mamba, model.model.layers[0].mamba
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    for name in ("A_log", "D", "dt_bias"):
        assert torch.equal(getattr(mixer, name), getattr(original, name))
