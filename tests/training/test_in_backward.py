"""Updates inside of the backward pass: the same bits as after it, gradients gone at once, refusals in one line."""

from __future__ import annotations

import json
import math
import signal
from contextlib import ExitStack

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, checkpoint
from moai_core import recipe as recipes
from moai_core.errors import Interrupted, RecipeError
from moai_core.training import StopFlag, in_backward, optim, train

ON = ["optim.in_backward=true", "optim.clip=null", "optim.name=adamw_bf16", "train.precision=bf16"]
OFF = ["optim.in_backward=false", *ON[1:]]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Of these tiny models the matrices count as large, norms and vectors as small."""
    monkeypatch.setattr(in_backward, "UPDATED_ALONE", 200)


def tiny_model(dtype=torch.bfloat16, **fields):
    torch.manual_seed(0)
    numbers = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "state_size": 4}
    return MoaiMambaForCausalLM(MoaiMambaConfig(**numbers, **fields)).to(dtype=dtype).train()


def settings(name, dtype=torch.bfloat16, **fields):
    """A model and its optimizer."""
    model = tiny_model(dtype, **fields)
    asked = recipes.load("cpu-tiny", [f"optim.name={name}", "optim.lr=1e-2"]).optim
    return model, optim.make_optimizer(model, asked, lr=1e-2, seed=3)


def stepped(model, optimizer, early, count=3):
    """The losses and gradient norms of some steps."""
    seen = []
    for step in range(count):
        ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(step))
        loss = model(ids, labels=ids).loss
        loss.backward()
        parameters = list(model.parameters())
        norm = optim.grad_norm(parameters) if early is None else early.norm(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append((loss.item(), norm.item()))
    return seen


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw_bf16", torch.bfloat16), ("adamw", torch.bfloat16), ("adamw_bf16", torch.float32)]
)
def test_the_same_bits_as_after_the_backward_pass(name, dtype, mode, fields):
    found = []
    for early in (False, True):
        model, optimizer = settings(name, dtype, **fields)
        model.set_checkpointing(mode)
        inside = in_backward.InBackward(optimizer) if early else None
        found.append((stepped(model, optimizer, inside), model.state_dict(), optimizer.state_dict()["state"]))
    (seen, weights, states), (seen2, weights2, states2) = found
    assert [loss for loss, _ in seen] == [loss for loss, _ in seen2]
    assert [norm for _, norm in seen2] == pytest.approx([norm for _, norm in seen], rel=1e-5)
    assert all(torch.equal(weights[key], weights2[key]) for key in weights)
    for key, state in states.items():
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(states2[key][k])) for k in state), key


def test_gradients_are_gone_when_the_backward_pass_is_over():
    model, optimizer = settings("adamw_bf16")
    early = in_backward.InBackward(optimizer)
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None and p.numel() >= 200 for p in model.parameters()))
        )
    ids = torch.randint(50, (2, 9))
    model(ids, labels=ids).loss.backward()
    left = {name for name, p in model.named_parameters() if p.grad is not None}
    assert left == {name for name, p in model.named_parameters() if p.numel() < 200} and left
    assert max(alive) == 0
    early.close()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters()), "without the hooks gradients stay"


def test_parameters_that_get_no_gradient_stay():
    model, optimizer = settings("adamw_bf16")
    early = in_backward.InBackward(optimizer)
    head = model.lm_head.weight
    ids = torch.randint(50, (2, 9))
    model(ids, labels=ids).loss.backward()
    before, first = head.detach().clone(), float(early.norm(list(model.parameters())))
    optimizer.zero_grad(set_to_none=True)
    model.model(ids).last_hidden_state.float().pow(2).sum().backward()
    assert torch.equal(head, before) and optimizer.state[head]["step"] == 1
    assert float(early.norm(list(model.parameters()))) != first


def test_what_is_not_finite_changes_nothing():
    model, optimizer = settings("adamw_bf16")
    early = in_backward.InBackward(optimizer)
    stepped(model, optimizer, early, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = model.lm_head.weight
    gradient = torch.ones_like(head)
    gradient[3, 5], gradient[7, 0] = math.nan, math.inf
    head.backward(gradient)
    assert not math.isfinite(float(early.norm(list(model.parameters()))))
    changed = head != before["lm_head.weight"]
    assert not changed[3, 5] and not changed[7, 0] and changed.sum() == head.numel() - 2
    assert all(torch.isfinite(t).all() for t in optimizer.state[head].values() if torch.is_tensor(t))


# ---- in the loop


def test_a_run_is_the_ordinary_one_and_may_change_over(tiny, tmp_path):
    ends = []
    for name, first, then in (("off", OFF, OFF), ("on", ON, ON), ("over", OFF, ON)):
        train(tiny("train.steps=4", "train.save_every=4", *first), output=tmp_path / name)
        train(tiny("train.steps=8", *then), output=tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        ends.append(([row["loss"] for row in rows if row["kind"] == "train"], tmp_path / name / "step-8"))
    for losses, folder in ends[1:]:
        assert losses == ends[0][0]
        one, other = (checkpoint.load_model(path).state_dict() for path in (ends[0][1], folder))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_stop_resumes_bit_for_bit(tiny, tmp_path):
    train(tiny("train.steps=6", *ON), output=tmp_path / "whole")
    flag = StopFlag()

    def stop(event):
        if event["event"] == "step" and event["step"] == 3:
            flag.request(signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 3, saved"):
        train(tiny("train.steps=6", *ON), output=tmp_path / "cut", on_event=stop, stop=flag)
    train(tiny("train.steps=6", *ON), output=tmp_path / "cut")
    one, other = (checkpoint.load_model(tmp_path / name / "step-6").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_gradient_that_is_not_finite_is_told(tiny, tmp_path, monkeypatch):
    norm, events = in_backward.InBackward.norm, []
    monkeypatch.setattr(in_backward.InBackward, "norm", lambda self, ps: norm(self, ps) * math.nan)
    recipe = tiny("train.steps=1", *ON)
    train(recipe, output=tmp_path / "run", on_event=events.append)
    told = [event["message"] for event in events if event["event"] == "warning"]
    assert told == [
        "step 1: the gradient is not finite; what of it wasn't changed nothing (1 in a row, 3 stop the run)"
    ]


# ---- what can't be


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("optim.clip=1.0", "the norm of all gradients is known, which optim.clip needs"),
        ("train.accumulation=2", r"the gradients of one micro-batch \(a step has 2\)"),
        ("train.effective_batch=64", r"the gradients of one micro-batch \(a step has 8\)"),
        ("hardware.count=2", r"the gradients of one device \(hardware.count is 2\)"),
        ("optim.name=adamw_8bit", "doesn't go with optim.name=adamw_8bit"),
    ],
)
def test_recipes_that_contradict_themselves(override, why):
    with pytest.raises(RecipeError, match=f"optim.in_backward .*{why}"):
        recipes.load("cpu-tiny", [*ON, override])


def test_runs_that_cannot_have_it(tiny, tmp_path):
    plain = [*ON, "optim.name=adamw", "train.precision=fp32"]
    with pytest.raises(RecipeError, match=r"needs bf16 weights or optim\.name=adamw_bf16"):
        train(tiny("train.steps=2", *plain), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model, optimizer = settings("adamw_bf16")
    recipe = recipes.load("cpu-tiny", ON)
    for count, ranks, why in ((1, 2, r"one process \(there are 2\)"), (4, 1, r"one micro-batch \(a step has 4\)")):
        with ExitStack() as stack, pytest.raises(RecipeError, match=why):
            in_backward.begin(recipe, optimizer, accumulation=count, ranks=ranks, stack=stack)
    with ExitStack() as stack:
        assert in_backward.begin(recipes.load("cpu-tiny"), optimizer, accumulation=4, ranks=2, stack=stack) is None
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)
