"""What the scan kernels promise as PyTorch operators: fake tensors, torch.compile, CUDA graphs, streams, no waiting for
the GPU, tensors of more than 2^31 numbers.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.gpu

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
DOCUMENTS = [[0] * 9 + [1] * 20 + [-1] * 4, [3] * 33]


def scan(x, seq_idx=None):
    """The backend's scan of inputs by name."""
    from moai_core import scan

    tensors = [x.get(n) for n in NAMES[:-1]]
    return scan.scan(*tensors, state=x.get("state"), seq_idx=seq_idx, backend="cuda")


def leaves_of(inputs):
    return {n: inputs[n].detach().clone().requires_grad_() for n in NAMES if inputs.get(n) is not None}


class Recorder(TorchDispatchMode):
    """Keeps every call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "moai":
            kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((function, kept, dict(kwargs or {})))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("without", [(), ("D", "z", "dt_bias", "state")], ids=["everything", "bare"])
def test_opcheck(scans, device, dtype, without):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes, of every operator that
    a scan and its backward pass call.
    """
    inputs = scans.problem(2, 33, 24, 16, dtype, device, seed=20, without=without)
    seq_idx = None if without else torch.tensor(DOCUMENTS, dtype=torch.int32, device=device)
    with Recorder() as recorder:
        x = leaves_of(inputs)
        y, last = scan(x, seq_idx)
        (y.float().sum() + last.sum()).backward()
    assert len(recorder.calls) >= 2
    for position, (function, args, kwargs) in enumerate(recorder.calls):
        if position == 0:  # the forward pass has a gradient; the backward pass has none
            args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(function, tuple(args), kwargs)


def loss(u, dt, A, B, C, D, z, dt_bias, state):
    y, last = scan(dict(zip(NAMES, (u * 1.5, dt, A, B, C, D, z, dt_bias, state), strict=True)))
    return (y.float() * 0.5).square().sum() + last.sin().sum()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile_without_graph_breaks(scans, device, dynamic):
    backend = "aot_eager" if scans.small or dynamic else "inductor"
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (33, 40):
        inputs = scans.problem(2, length, 24, 16, torch.float32, device, seed=21)
        mine, want = leaves_of(inputs), leaves_of(inputs)
        compiled(*mine.values()).backward()
        loss(*want.values()).backward()
        for name in NAMES:
            assert scans.relative(mine[name].grad, want[name].grad) < 1e-5, name
    torch.compiler.reset()


def only_cuda(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_cuda_graph(scans, device, backward):
    only_cuda(device)
    seq_idx = torch.tensor(DOCUMENTS, dtype=torch.int32, device=device)

    def make(seed):
        return scans.problem(2, 33, 72, 16, torch.bfloat16, device, seed=seed)

    def work(x):
        if not backward:
            with torch.no_grad():
                return list(scan(x, seq_idx))
        y, last = scan(x, seq_idx)
        return [
            y,
            last,
            *torch.autograd.grad((y, last), [x[n] for n in NAMES], (torch.ones_like(y), torch.ones_like(last))),
        ]

    static = leaves_of(make(0))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work(static)
    for seed in (1, 2):
        fresh = make(seed)
        with torch.no_grad():
            for name, value in static.items():
                value.copy_(fresh[name])
        graph.replay()
        want = work(leaves_of(fresh))
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_nothing_waits_for_the_gpu(scans, device):
    only_cuda(device)
    seq_idx = torch.tensor(DOCUMENTS, dtype=torch.int32, device=device)
    x = leaves_of(scans.problem(2, 33, 24, 16, torch.bfloat16, device))

    def work():
        y, last = scan(x, seq_idx)
        (y.float().sum() + last.sum()).backward()

    work()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_runs_on_the_current_stream(scans, device):
    only_cuda(device)
    inputs = scans.problem(2, 33, 24, 16, torch.float32, device)
    want = scans.run(scans.ours, inputs)
    late = {n: torch.full_like(v, float("nan")) for n, v in inputs.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the inputs arrive late: a kernel on another stream would read NaN
        for name, value in inputs.items():
            late[name].copy_(value)
        x = {n: late[n].requires_grad_() for n in NAMES}
        y, last = scan(x)
        found = torch.autograd.grad((y, last), list(x.values()), (late["g_y"], late["g_state"]))
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(y, want["y"]) and torch.equal(last, want["last"])
    assert all(torch.equal(g, want[f"d_{n}"]) for n, g in zip(NAMES, found, strict=True))


def test_saved_memory_is_freed(scans, device):
    only_cuda(device)
    inputs = scans.problem(2, 257, 72, 16, torch.bfloat16, device)
    scans.run(scans.ours, inputs)
    torch.cuda.synchronize()
    gc.collect()  # what a test before this one has left
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        scans.run(scans.ours, inputs)
    assert torch.cuda.memory_allocated() == before


def test_more_than_2_to_the_31_numbers(scans, device):
    """The second row lies beyond 2^30 numbers and ends beyond 2^31; alone it gives the same results and gradients."""
    only_cuda(device)
    batch, length, channels, states = 2, 1 << 19, 2056, 16
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free memory")
    made = torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=made, device=device, dtype=dtype)

    x = {
        "u": normal(batch, length, channels),
        "dt": normal(batch, length, channels).sub_(3),
        "A": -normal(channels, states, dtype=torch.float32).exp(),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels, dtype=torch.float32),
        "z": normal(batch, length, channels),
    }
    assert x["u"].numel() > 2**31
    g = normal(batch, length, channels)
    seq_idx = (torch.arange(length, device=device) // 5000).to(torch.int32).repeat(batch, 1)

    def work(x, g, seq_idx):
        for value in x.values():
            value.requires_grad_()
        y, last = scan(x, seq_idx)
        grads = torch.autograd.grad(y, list(x.values()), g)
        return {"y": y.detach(), "last": last.detach(), **{f"d_{n}": v for n, v in zip(x, grads, strict=True)}}

    per_row = ("y", "last", "d_u", "d_dt", "d_B", "d_C", "d_z")
    whole = work(x, g, seq_idx)
    whole = {n: whole[n][1:].clone() for n in per_row}  # the rest is freed
    alone = work({n: v.detach()[1:] if v.ndim == 3 else v.detach() for n, v in x.items()}, g[1:], seq_idx[1:])
    for name in per_row:
        for part in (
            (slice(0, 4096), slice(length // 2, length // 2 + 4096), slice(length - 4096, length))
            if name != "last"
            else (slice(None),)
        ):
            assert scans.relative(whole[name][:, part], alone[name][:, part]) < 4e-3, f"{name} {part}"
