"""Checkpointing none, selective and full: the same gradients bit for bit, and only the tensors that are meant to stay."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, config, cuda, footprint, scan
from moai_core.errors import UsageError
from moai_core.model import fused
from moai_core.model.recompute import Recomputed, call, repeatable, split_halves

SHAPES = [{}, {"dt_bc_norm": False, "ffn": "none", "tie_word_embeddings": True}, {"residual_in_fp32": True}]
BATCH, LENGTH = 2, 70


def make(precision="fp32", *, backend="auto", **fields):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "state_size": 5}
    model = MoaiMambaForCausalLM(MoaiMambaConfig(initializer_range=0.2, **{**shape, **fields})).train()
    model.set_scan_backend(backend)
    return model.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def batch(model):
    ids = torch.randint(5, 97, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    seq_idx = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    seq_idx[:, 30:] = 1
    seq_idx[1, 60:] = -1
    return {"input_ids": ids, "labels": torch.where(seq_idx < 0, -100, ids), "seq_idx": seq_idx}


def mixed(precision):
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()


def step(model, precision, mode, times=1):
    """(loss, gradients) of a step with accumulation."""
    model.set_checkpointing(mode)
    model.zero_grad(set_to_none=True)
    for _ in range(times):
        with mixed(precision):
            loss = model(**batch(model)).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("fields", SHAPES, ids=["jamba-like", "mamba", "fp32-stream"])
def test_gradients_are_the_same_bits_in_every_mode(fields, precision, backend):
    model = make(precision, backend=backend, **fields)
    loss, want = step(model, precision, "none", times=2)
    assert len(want) > 10 and all(g.abs().sum() > 0 for g in want.values())
    for mode in ("selective", "full"):
        again, got = step(model, precision, mode, times=2)
        assert torch.equal(loss, again)
        assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_gradients_through_a_given_state_are_the_same_bits():
    model = make()
    ids = batch(model)["input_ids"]

    def run(mode):
        model.set_checkpointing(mode)
        model.zero_grad(set_to_none=True)
        state, total = None, torch.zeros(())
        for chunk in ids.split([9, 1, 60], dim=1):
            out = model(chunk, state=state, use_cache=True)
            state, total = out.state, total + out.logits.square().mean()
        total.backward()
        return [p.grad for p in model.parameters()]

    want = run("none")
    for mode in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(want, run(mode), strict=True)), mode


def test_a_graph_that_is_kept_gives_its_gradients_twice():
    model = make()
    model.set_checkpointing("selective")
    loss = model(**batch(model)).loss
    parameters = list(model.parameters())
    one = torch.autograd.grad(loss, parameters, retain_graph=True)
    part = torch.autograd.grad(loss, parameters[5:9], retain_graph=True)
    two = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[5:9], part, strict=True))


# ---- what stays in memory


class Live(TorchDispatchMode):
    """Counts the bytes of storages that were made inside and are still held; a model's weights were there before."""

    def __init__(self, model) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def held(mode, precision, layers, length=LENGTH, often=None, **fields):
    """Bytes that a forward pass of the stack leaves behind for the backward pass."""
    model = make(precision, num_hidden_layers=layers, **fields)
    model.set_checkpointing(mode, often)
    ids = torch.zeros(BATCH, length, dtype=torch.long)
    gc.disable()  # what only a garbage collection frees is held
    try:
        with Live(model) as live:
            with mixed(precision):
                out = model.model(ids).last_hidden_state
            return live.bytes() - out.nbytes
    finally:
        gc.enable()


def held_by_a_layer(mode, precision, **fields):
    """The same a token and layer."""
    return Fraction(held(mode, precision, 3, **fields) - held(mode, precision, 2, **fields), BATCH * LENGTH)


@pytest.mark.parametrize("fields", [{}, {"dt_bc_norm": False}], ids=str)
def test_what_is_dropped_is_dropped_and_no_more(fields):
    """In fp32: two norms of width H, u and dt of width I, SwiGLU's product of width F; full keeps one input."""
    H, I, F = 24, 48, 40
    none, selective, full = (held_by_a_layer(mode, "fp32", **fields) for mode in ("none", "selective", "full"))
    assert none - selective == 4 * (2 * H + 2 * I + F)
    assert full == 4 * H


def test_autocasts_copies_are_dropped_too():
    """in_proj, gate and up each get a bf16 copy of a norm's result; dt_proj's own input is kept to run again."""
    H, I, F, R = 24, 48, 40, 1
    none, selective, full = (held_by_a_layer(mode, "bf16-mixed") for mode in ("none", "selective", "full"))
    assert none - selective == 2 * (3 * H + 2 * I + F) - 4 * R
    assert full == 4 * H


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("fields", SHAPES, ids=["jamba-like", "mamba", "fp32-stream"])
def test_the_planner_counts_what_a_layer_keeps(fields, precision, mode):
    fields = {**fields, "hidden_size": 64, "intermediate_size": 96, "state_size": 16, "time_step_rank": 7}
    few, many = (
        held(mode, precision, 3, length, **fields) - held(mode, precision, 2, length, **fields) for length in (64, 192)
    )
    planned = footprint.saved_per_token(make(**fields).config.numbers(), precision, "cpu", mode)
    # By token alone: copies of weights do not count.
    assert (many - few) / (BATCH * 128) == sum(planned.values())


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("bf16-mixed", {}),
        ("bf16", {"dt_bc_norm": False, "ffn": "none"}),
        ("bf16", {"state_size": 64}),
    ],
    ids=str,
)
def test_the_planner_counts_what_a_layer_of_2b_keeps_with_the_gpu_operators(monkeypatch, precision, fields, mode):
    """Their fake implementations say what they allocate; no GPU and no memory is needed for that."""
    for backend in (scan.BACKENDS["cuda"], cuda):
        monkeypatch.setattr(backend, "why_not", lambda *_, **__: None)
    scan.pick.cache_clear()
    numbers = config.fields("2b", **fields)

    def held(layers, length):
        with torch.device("meta"):
            model = MoaiMambaForCausalLM(MoaiMambaConfig(**{**numbers, "num_hidden_layers": layers})).train()
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        model.set_scan_backend("cuda")
        model.set_checkpointing(mode)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            ids = torch.zeros(2, length, dtype=torch.long)
            with Live(model) as live:
                with mixed(precision):
                    out = model.model(ids).last_hidden_state
                return live.bytes() - out.nbytes

    few, many = (held(3, length) - held(2, length) for length in (64, 192))
    try:
        planned = footprint.saved_per_token(numbers, precision, "cuda", mode)
        assert (many - few) / (2 * 128) == sum(planned.values())
    finally:
        scan.pick.cache_clear()


def test_nothing_outlives_the_backward_pass():
    model = make()
    model.set_checkpointing("selective")
    seen = []

    def watch(module, args, output):
        seen.append(weakref.ref(output))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch)
    loss = model(**batch(model)).loss
    gc.disable()
    try:
        loss.backward()
        del loss
        assert len(seen) > 20 and not any(reference() is not None for reference in seen)
    finally:
        gc.enable()


def test_without_gradients_and_outside_of_training_nothing_is_hooked(monkeypatch):
    model = make()
    model.set_checkpointing("selective")

    def refuse(*_):
        raise AssertionError("hooked")

    ids = batch(model)["input_ids"]
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", refuse)
    with torch.no_grad():
        model(ids)
    model.eval()
    model(ids)
    model.train().set_checkpointing("none")
    model(ids)
    model.set_checkpointing("selective")
    with pytest.raises(AssertionError, match="hooked"):
        model(ids)


# ---- the parts


def test_a_tensor_is_made_once_for_all_who_saved_it_and_views_come_back_as_views():
    made = []
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(4, 8, requires_grad=True)

    def make_h():
        made.append(torch.is_grad_enabled())
        return x.detach() * 2

    h = x * 2
    kept = Recomputed(h, make_h)
    a = call(lambda t: (t.view(6, 4)[1::2] * weight[:3, :4]).sum(), kept)
    b = call(lambda t, w: torch.nn.functional.linear(t, w).square().sum(), kept, weight)
    plain = (h.view(6, 4)[1::2] * weight[:3, :4]).sum() + torch.nn.functional.linear(h, weight).square().sum()
    want = torch.autograd.grad(plain, [x, weight], retain_graph=True)
    got = torch.autograd.grad(a + b, [x, weight])
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert made == [False]


def test_a_part_of_a_larger_storage_is_kept():
    """A projection may give back a slice of what its kernel padded."""
    x = torch.randn(4, 6, requires_grad=True)

    def refuse():
        raise AssertionError("made again")

    (grad,) = torch.autograd.grad(call(torch.square, Recomputed((x * 2)[:, :3], refuse)).sum(), [x])
    assert torch.equal(grad[:, :3], 8 * x[:, :3]) and not grad[:, 3:].any()


def test_dropout_is_not_repeated():
    assert repeatable(torch.nn.Linear(2, 2))
    adapter = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(2, 2))
    assert not repeatable(adapter) and repeatable(adapter.eval())
    model = make()
    for layer in model.model.layers:
        layer.mamba.dt_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), layer.mamba.dt_proj)
    grads = []
    for mode in ("none", "selective", "full"):
        torch.manual_seed(7)
        grads.append(list(step(model, "fp32", mode)[1].values()))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_frozen_weights_and_adapters(mode):
    """Only small matrices beside frozen projections learn, as in LoRA; their gradients are those of mode none."""

    class Adapted(torch.nn.Module):
        def __init__(self, inner, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.inner = inner
            self.down, self.up = (
                torch.nn.Linear(inner.in_features, 3, bias=False),
                torch.nn.Linear(3, inner.out_features, bias=False),
            )

        def forward(self, x):
            return self.inner(x) + self.up(self.down(x))

    grads = []
    for one in ("none", mode):
        model = make()
        model.requires_grad_(False)
        for n, layer in enumerate(model.model.layers):
            layer.mamba.in_proj = Adapted(layer.mamba.in_proj, n)
            layer.mamba.dt_proj = Adapted(layer.mamba.dt_proj, n)
            layer.feed_forward.up_proj = Adapted(layer.feed_forward.up_proj, n)
        model.set_checkpointing(one)
        model(**batch(model)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 18 and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_halves_and_their_gradient():
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    one, other = split_halves(x)
    assert one._is_view() and torch.equal(torch.cat([one, other], -1), x)
    assert torch.autograd.gradcheck(lambda t: split_halves(t)[0] * split_halves(t)[1].sin(), [x])
    one.sum().backward()  # the other's gradient is missing: zeros
    assert torch.equal(x.grad, torch.cat([torch.ones_like(one), torch.zeros_like(other)], -1))


def test_norms_again_are_the_sums_norm():
    """What `selective` relies on: the norm of the sum that add_rms_norm returns is the norm that it returned."""
    for residual_type, type_ in (
        (torch.float32, torch.float32),
        (torch.bfloat16,) * 2,
        (torch.float32, torch.bfloat16),
    ):
        residual, x = torch.randn(7, 64, dtype=residual_type), torch.randn(7, 64, dtype=type_)
        weight = torch.randn(64, dtype=type_)
        total, y = fused.add_rms_norm(residual, x, weight, 1e-5)
        assert torch.equal(y, fused.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_some_layers_keep_everything(mode):
    """The layers in front are checkpointed; gradients are the same bits, memory is between."""
    model = make(num_hidden_layers=3)
    loss, gradients = step(model, "fp32", "none")
    none, all_of_them = (held(one, "fp32", 3) for one in ("none", mode))
    kept = []
    for layers in (1, 2, 3, 9):
        model.zero_grad(set_to_none=True)
        model.set_checkpointing(mode, layers)
        again = model(**batch(model)).loss
        again.backward()
        assert torch.equal(again.detach(), loss)
        assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
        kept.append(held(mode, "fp32", 3, often=layers))
    assert none > kept[0] > kept[1] > kept[2] == kept[3] == all_of_them
    assert kept[0] - kept[1] == held_by_a_layer("none", "fp32") * BATCH * LENGTH - held_by_a_layer(mode, "fp32") * (
        BATCH * LENGTH
    )


def test_modes_have_names():
    model = make()
    with pytest.raises(UsageError, match="unknown checkpointing 'some'") as caught:
        model.set_checkpointing("some")
    assert caught.value.hint == "modes: none, selective, full"
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing and held("full", "fp32", 2) < held("none", "fp32", 2) / 4


# ---- compiled and sharded


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_gives_the_same_gradients(mode, backend):
    model = make(num_hidden_layers=2, state_size=8)
    loss, want = step(model, "fp32", mode)
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    again = compiled(**batch(model)).loss
    again.backward()
    assert float(again.detach()) == pytest.approx(float(loss), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name]).norm() <= 1e-5 * want[name].norm(), name


@pytest.mark.slow
def test_sharded_and_replicated_models_have_the_gradients_of_one_process():
    script = Path(__file__).parents[1] / "ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(script), "cpu"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the same gradients" in done.stdout, done.stderr[-3000:]
