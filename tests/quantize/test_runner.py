"""The runner: statistics of what a plain forward pass hands to each matrix, in memory and from a file."""

from __future__ import annotations

import pytest
import torch

from moai_core.errors import NonFiniteError, UsageError
from moai_core.quantize.calibrate import from_tokens
from moai_core.quantize.runner import Runner, _Sums


def model_of(tiny_model, **fields):
    return tiny_model(hidden_size=32, intermediate_size=64, time_step_rank=8, **fields).double()


def inputs_of(model, name, ids, seq_idx):
    """What a plain forward pass of the whole model hands to a module, padding left out."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, seq_idx=seq_idx)
    handle.remove()
    return found[0].flatten(0, 1) if seq_idx is None else found[0][seq_idx >= 0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [{}, {"ffn": "none", "dt_bc_norm": False}])
def test_statistics_are_those_of_a_plain_forward_pass(tiny_model, fields, padded, tmp_path):
    model = model_of(tiny_model, **fields)
    data = from_tokens([torch.randint(0, 97, (n,)) for n in (19, 19, 11 if padded else 19)])
    names = ["mamba.in_proj", "mamba.x_proj", "mamba.dt_proj", "mamba.out_proj"]
    runner = Runner(data, batch_tokens=40, scratch=tmp_path)
    runner.embed(model.model.embed_tokens)
    for number, layer in enumerate(model.model.layers):
        found = {}
        for name in names:
            found |= runner.gather(layer, [name])
        both = runner.gather(layer, ["mamba.out_proj", "mamba.x_proj"])
        assert torch.equal(both["mamba.x_proj"].hessian, found["mamba.x_proj"].hessian)
        if layer.feed_forward is not None:
            runner.step(layer)
            found |= runner.gather(layer, ["feed_forward.gate_proj", "feed_forward.down_proj"])
        runner.advance(layer)
        for name, one in found.items():
            x = inputs_of(model, f"model.layers.{number}.{name}", data.ids, data.seq_idx)
            assert one.count == len(x) == data.tokens
            torch.testing.assert_close(one.hessian, x.T @ x / len(x), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.mean_abs, x.abs().mean(0))
            torch.testing.assert_close(one.max_abs, x.abs().amax(0))
    assert not list(tmp_path.iterdir()), "the file of hidden states has no name"


def test_one_sequence_of_one_token(tiny_model):
    model = model_of(tiny_model)
    runner = Runner(from_tokens(torch.tensor([[5]])))
    runner.embed(model.model.embed_tokens)
    found = runner.gather(model.model.layers[0], ["mamba.in_proj"])["mamba.in_proj"]
    assert found.count == 1 and torch.linalg.matrix_rank(found.hessian) == 1


def test_statistics_of_scaled_inputs_and_of_groups():
    x = torch.randn(200, 8, dtype=torch.float64)
    by = torch.rand(8, dtype=torch.float64) + 0.5
    sums, scaled = _Sums(), _Sums()
    sums.add(x, None)
    scaled.add(x / by, None)
    made, expected = sums.finish("x").scaled(by), scaled.finish("x")
    torch.testing.assert_close(made.hessian, expected.hessian)
    torch.testing.assert_close(made.mean_abs, expected.mean_abs)
    torch.testing.assert_close(made.max_abs, expected.max_abs)
    torch.testing.assert_close(expected.blocks(4)[1], (x / by)[:, 4:].T @ (x / by)[:, 4:] / 200)
    weight = torch.randn(3, 8, dtype=torch.float64)
    assert made.energy(weight) == pytest.approx(float((x / by @ weight.T).square().sum() / 200))


def test_what_cannot_be_calibrated_is_told(tiny_model):
    model = model_of(tiny_model)
    with pytest.raises(UsageError, match="the token id 97, the vocabulary 97"):
        Runner(from_tokens(torch.tensor([[5, 97]]))).embed(model.model.embed_tokens)
    runner = Runner(from_tokens(torch.tensor([[5, 9]])))
    runner.embed(model.model.embed_tokens)
    runner.hidden[0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"mamba\.in_proj: its inputs hold NaN"):
        runner.gather(model.model.layers[0], ["mamba.in_proj"])


def test_hidden_states_in_a_file_are_those_in_memory(tiny_model, tmp_path):
    model, data = model_of(tiny_model).float(), from_tokens(torch.randint(0, 97, (5, 12)))
    runners = [Runner(data, batch_tokens=24), Runner(data, batch_tokens=24, scratch=tmp_path, dtype=torch.float32)]
    for runner in runners:
        runner.embed(model.model.embed_tokens)
        for layer in model.model.layers:
            runner.advance(layer)
    assert torch.equal(runners[0].hidden, runners[1].hidden)
    with torch.no_grad():
        expected = model.model(data.ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(runners[0].block, 0)
    assert expected.shape == runners[0].hidden.shape
