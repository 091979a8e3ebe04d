"""What only the CPU backend promises: threads, forks, strides, cache, denormals, layers shared with transformers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from moai_core import cpu as machine
from moai_core.scan import cpu, reference, scan


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(inputs, seq_idx=None, backend="cpu"):
    """(y, state, all gradients) as one list."""
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    y, final = scan(**leaves, seq_idx=seq_idx, backend=backend)
    return [y, final, *torch.autograd.grad(y.square().sum() + final.sum(), list(leaves.values()))]


def test_same_bits_for_any_number_of_threads_and_every_time(oracle, threads, monkeypatch):
    monkeypatch.setattr(machine, "SMALL", 0)
    inputs, numbers = oracle.problem(3, 35, 260, 4, packed=True)
    given, numbers = oracle.tensors(inputs), torch.tensor(numbers)
    runs = []
    for count in (1, 2, 3, 2, 1):
        threads(count)
        runs.append(everything(given, numbers))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_python_threads_do_the_work_where_openmp_is_out_of_reach(oracle, threads, monkeypatch):
    monkeypatch.setattr(machine, "SMALL", 0)
    inputs, _ = oracle.problem(2, 35, 260, 4)
    given = oracle.tensors(inputs)
    threads(1)
    wanted = everything(given)
    threads(3)
    monkeypatch.setattr(machine, "team", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(everything(given), wanted, strict=True))
    assert machine._pool.cache_info().currsize == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("team", [True, False], ids=["openmp", "python-threads"])
def test_a_forked_child_computes_the_same(team):
    """The parent's threads don't exist in the child: who waits for them hangs. A fresh process, so a hang is ours."""
    program = f"""
import os, torch
from moai_core import cpu
from moai_core.scan import scan
if not {team}:
    cpu.team = lambda: None
torch.set_num_threads(2)
torch.manual_seed(0)
u = torch.randn(2, 64, 300, requires_grad=True)
A, B = -torch.rand(300, 16), torch.randn(2, 64, 16)
def go():
    y, _ = scan(u, u, A, B, B, backend="cpu")
    return y.detach().numpy().tobytes() + torch.autograd.grad(y, u, torch.ones_like(y))[0].numpy().tobytes()
y, _ = scan(u.detach(), u.detach(), A, B, B, backend="cpu")
wanted = y.numpy().tobytes()
whole = go()
child = os.fork()
if child == 0:
    y, _ = scan(u.detach(), u.detach(), A, B, B, backend="cpu")  # even where torch still counts two threads
    torch.set_num_threads(1)  # torch's own operations hang in a forked child otherwise
    os._exit(0 if y.numpy().tobytes() == wanted and go() == whole else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert go() == whole
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_strided_and_expanded_inputs(oracle):
    """Views of larger tensors, turned ones and broadcast ones give the bits of contiguous copies."""
    inputs, _ = oracle.problem(2, 21, 30, 8)
    given = oracle.tensors(inputs)
    wanted = everything(given)
    both = torch.cat([given["u"], given["z"]], -1)
    three = torch.cat([torch.zeros(2, 21, 5), given["B"], given["C"]], -1)
    views = dict(given)
    views["u"], views["z"] = both.chunk(2, -1)
    views["B"], views["C"] = three.split([5, 8, 8], -1)[1:]
    views["dt"] = given["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    views["A"] = given["A"].t().contiguous().t()
    views["state"] = given["state"].transpose(1, 2).contiguous().transpose(1, 2)
    y, final = scan(**views, backend="cpu")
    assert torch.equal(y, wanted[0]) and torch.equal(final, wanted[1])
    row = given["B"][:1, :1].expand(2, 21, 8)
    y, _ = scan(**{**given, "B": row}, backend="cpu")
    assert torch.equal(y, scan(**{**given, "B": row.contiguous()}, backend="cpu")[0])


def test_inputs_are_not_modified(oracle):
    inputs, numbers = oracle.problem(2, 40, 9, 4, packed=True)
    given = oracle.tensors(inputs)
    kept = {n: x.clone() for n, x in given.items()}
    everything(given, torch.tensor(numbers))
    assert all(torch.equal(x, kept[n]) for n, x in given.items())


def test_marks_follow_a_changed_seq_idx(oracle):
    """The marks are remembered from layer to layer; a changed or another tensor must not meet the old ones."""
    inputs, _ = oracle.problem(1, 12, 4, 3)
    given = oracle.tensors(inputs)
    numbers = torch.zeros(1, 12, dtype=torch.int32)
    scan(**given, seq_idx=numbers, backend="cpu")
    numbers[0, 5:] = 1
    found = scan(**given, seq_idx=numbers, backend="cpu")
    wanted = reference.scan(**given, seq_idx=numbers)
    assert oracle.relative(found[0], wanted[0]) < 2e-6
    again = scan(**given, seq_idx=torch.zeros(1, 12, dtype=torch.int32), backend="cpu")
    assert oracle.relative(again[0], reference.scan(**given)[0]) < 2e-6


def test_inference_mode(oracle):
    inputs, numbers = oracle.problem(2, 30, 4, 3, packed=True)
    given = oracle.tensors(inputs)
    wanted = reference.scan(**given, seq_idx=torch.tensor(numbers))
    with torch.inference_mode():
        marks = torch.zeros(2, 30, dtype=torch.int32)
        scan(**given, seq_idx=marks, backend="cpu")
        marks.copy_(torch.tensor(numbers))
        y, final = scan(**given, seq_idx=marks, backend="cpu")
    assert oracle.relative(y, wanted[0]) < 2e-6 and oracle.relative(final, wanted[1]) < 2e-6


def test_seq_idx_of_any_integer_type(oracle):
    inputs, numbers = oracle.problem(2, 30, 4, 3, packed=True)
    given = oracle.tensors(inputs)
    wanted = scan(**given, seq_idx=torch.tensor(numbers), backend="cpu")
    found = scan(**given, seq_idx=torch.tensor(numbers).long(), backend="cpu")
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_gradients_through_the_state_alone(oracle):
    """A loss that reads only the final state, and one that reads only y."""
    inputs, _ = oracle.problem(2, 20, 6, 4)
    for part in (0, 1):
        results = []
        for dtype, module in ((torch.float64, reference), (torch.float32, cpu)):
            leaves = oracle.tensors(inputs, dtype, grad=True)
            out = module.scan(**leaves)[part]
            results.append(torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True))
        for a, b in zip(results[1], results[0], strict=True):
            assert oracle.relative(a, torch.zeros_like(a) if b is None else b) < 1e-5


def test_only_what_needs_a_gradient_gets_one(oracle):
    inputs, _ = oracle.problem(1, 9, 4, 3)
    given = oracle.tensors(inputs)
    given["B"].requires_grad_()
    y, final = scan(**given, backend="cpu")
    assert y.requires_grad and final.requires_grad
    assert oracle.relative(torch.autograd.grad(y.sum(), given["B"])[0], everything_grad(given, "B")) < 1e-5
    with torch.no_grad():
        assert not scan(**given, backend="cpu")[0].requires_grad


def everything_grad(given, name):
    leaves = {n: x.detach().double().requires_grad_(n == name) for n, x in given.items()}
    return torch.autograd.grad(reference.scan(**leaves)[0].sum(), leaves[name])[0]


def test_fading_states_become_zero_and_the_processor_keeps_its_settings():
    """States below 1e-38 would cost a hundred times as much on x86: they become zeros, and only inside the kernels."""
    u, dt = torch.zeros(1, 300, 8), torch.ones(1, 300, 8)
    u[:, 0] = 1
    A, B = -torch.linspace(0.3, 1, 16).repeat(8, 1), torch.ones(1, 300, 16)
    _, final = scan(u, dt, A, B, B, backend="cpu")
    normal = torch.finfo(torch.float32).smallest_normal
    if platform.machine() in ("x86_64", "AMD64"):
        assert ((final == 0) | (final >= normal)).all() and (final == 0).any()
    assert (torch.tensor([normal / 4]) * 0.5).item() > 0, "torch's own arithmetic lost its denormals"


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    """The kernels are compiled for this process alone, without a word and without a file."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    program = (
        "import torch; from moai_core.scan import conv\n"
        "y, _ = conv(torch.randn(1, 3, 2), torch.randn(2, 1, 4), None, backend='cpu'); assert y.isfinite().all()\n"
        "from numba.core import config; assert config.CACHE_DIR == ''\n"
    )
    env = {**os.environ, "MOAI_CACHE": str(blocked), "NUMBA_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=env)
    assert blocked.read_text() == "not a folder"


def test_mixer_of_transformers_agrees(oracle):
    """transformers' Mamba mixer, same weights: our convolution and scan in its place give its output and gradients."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    theirs = MambaMixer(MambaConfig(hidden_size=20, state_size=7, num_hidden_layers=1), layer_idx=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        theirs.A_log.copy_(torch.randn_like(theirs.A_log))
    x = torch.randn(2, 37, 20, requires_grad=True)
    wanted = theirs(x)

    u, z = theirs.in_proj(x).chunk(2, -1)
    u, _ = cpu.conv(u, theirs.conv1d.weight, theirs.conv1d.bias)
    dt, B, C = theirs.x_proj(u).split([theirs.time_step_rank, 7, 7], -1)
    dt = dt @ theirs.dt_proj.weight.T
    y, _ = cpu.scan(u, dt, -theirs.A_log.exp(), B, C, theirs.D, z, theirs.dt_proj.bias)
    found = theirs.out_proj(y)

    assert oracle.relative(found, wanted) < 3e-6
    leaves = [x, *theirs.parameters()]
    pairs = zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True)
    for a, b in pairs:
        assert oracle.relative(a, b) < 2e-5
