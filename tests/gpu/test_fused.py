"""Norms, SwiGLU and cross-entropy on a CUDA GPU against float64, with NaN in memory that a kernel has to fill. Run on a
machine with one: `pytest -m gpu tests/gpu/test_fused.py`.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moai_core import cuda
from moai_core.model import fused
from moai_core.model import loss as losses

pytestmark = pytest.mark.gpu

B, H, S = torch.bfloat16, torch.float16, torch.float32
# A result rounded once: 2^-9 at most, 2^-10 or so on average; fp32 sums.
TOLERANCE = {S: 2e-6, B: 3.5e-3, H: 5e-4}


@pytest.fixture(autouse=True)
def _can_run(device):
    if reason := cuda.why_not(device):
        pytest.skip(reason)


def random(device, *shape, dtype=S, scale=1.0, seed=None):
    generator = torch.Generator().manual_seed(sum(shape) if seed is None else seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def leaf(x, dtype=None):
    return x.detach().to(x.dtype if dtype is None else dtype).requires_grad_()


def judge(found, wanted, factor=1.0):
    """Relative norm error within what one rounding to the result's dtype allows."""
    for got, want in zip(found, wanted, strict=True):
        error = float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-300))
        assert got.shape == want.shape and error <= factor * TOLERANCE[got.dtype], (error, got.dtype, tuple(got.shape))


def norm(x, weight, eps):
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# shape, dtypes of the stream, of what is added, of the weight
NORMS = [
    ((8, 2048), B, B, B), ((700, 2048), S, B, B), ((3, 5, 5120), B, B, B), ((9, 128), S, B, B), ((2, 16384), S, S, S),
    ((6, 97), B, S, S), ((130, 64), B, B, S), ((1, 16), H, H, H), ((700, 8), B, B, B), ((2, 4099), H, H, S), ((33, 24), B, B, B),
]  # fmt: skip


@pytest.mark.parametrize("shape, stream, added, kind", NORMS)
def test_norm_of_the_sum(device, poisoned, shape, stream, added, kind):
    residual = leaf(random(device, *shape, dtype=stream, scale=3.0))
    x = leaf(random(device, *shape, dtype=added, seed=1))
    weight = leaf(1 + random(device, shape[-1], dtype=kind, scale=0.3))
    with poisoned():
        total, y = fused.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(total, residual.detach() + x.detach()) and y.dtype == kind
    t64, w64 = leaf(total, torch.float64), leaf(weight, torch.float64)
    y64 = norm(t64, w64, 1e-5)
    judge([y], [y64])
    d_y, d_total = torch.randn_like(y), torch.randn_like(total)
    for outputs, given in (((total, y), (d_total, d_y)), ((y,), (d_y,))):
        with poisoned():
            got = torch.autograd.grad(outputs, [residual, x, weight], given, retain_graph=True)
        outputs64 = (t64 * 1, y64) if len(given) == 2 else (y64,)
        d64, dw64 = torch.autograd.grad(outputs64, [t64, w64], [g.double() for g in given], retain_graph=True)
        assert [g.dtype for g in got] == [stream, added, kind]
        judge(got, [d64, d64, dw64], factor=1.5)
    (only,) = torch.autograd.grad(total, x, d_total)
    assert torch.equal(only, d_total.to(added))


@pytest.mark.parametrize("shape, stream, added, kind", NORMS)
def test_norm_alone_of_rows_that_lie_apart(device, poisoned, shape, stream, added, kind):
    x = leaf(random(device, *shape[:-1], shape[-1] + 16, dtype=stream)[..., : shape[-1]])
    weight = leaf(1 + random(device, shape[-1], dtype=kind, scale=0.3))
    with poisoned():
        y = fused.rms_norm(x, weight, 1e-6)
    x64, w64 = leaf(x, torch.float64), leaf(weight, torch.float64)
    y64 = norm(x64, w64, 1e-6)
    judge([y], [y64])
    d_y = torch.randn_like(y)
    with poisoned():
        got = torch.autograd.grad(y, [x, weight], d_y)
    judge(got, torch.autograd.grad(y64, [x64, w64], d_y.double()), factor=1.5)


def test_the_same_norm_again_has_the_same_bits(device):
    """Selective checkpointing computes the norm of the kept sum in place of the norm that came with it."""
    residual, x = random(device, 64, 2048, dtype=B), random(device, 64, 2048, dtype=B, seed=5)
    weight = random(device, 2048, dtype=B, seed=6)
    total, y = fused.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(fused.rms_norm(total, weight, 1e-5), y)


def test_norms_of_extreme_rows(device):
    x = torch.zeros(3, 64, device=device)
    x[1], x[2] = 1e18, 1e-20
    y = fused.rms_norm(x, torch.ones(64, device=device), 1e-5)
    judge([y[1], y[2]], [torch.ones(64, device=device).double(), x[2].double() / 1e-5**0.5])
    assert y[0].eq(0).all()


@pytest.mark.parametrize("rows", [1, 37, 5000])
@pytest.mark.parametrize("sizes", [(128, 16, 16), (320, 16, 16), (256, 128, 128), (7, 5, 5)])
@pytest.mark.parametrize("added, kind", [(B, B), (B, S), (S, S)])
def test_three_small_norms(device, poisoned, rows, sizes, added, kind):
    if rows == 5000 and (kind != B or device.type != "cuda"):
        pytest.skip("one large case is enough")
    x = leaf(random(device, 1, rows, sum(sizes), dtype=added))
    weights = [leaf(1 + random(device, n, dtype=kind, scale=0.3)) for n in sizes]
    with poisoned():
        ys = fused.small_norms(x, weights, 1e-5)
    x64, w64 = leaf(x, torch.float64), [leaf(w, torch.float64) for w in weights]
    ys64 = [norm(part, w, 1e-5) for part, w in zip(x64.split(list(sizes), -1), w64, strict=True)]
    assert all(y.is_contiguous() for y in ys)
    judge(ys, ys64)
    d_ys = [torch.randn_like(y) for y in ys]
    with poisoned():
        got = torch.autograd.grad(ys, [x, *weights], d_ys)
    judge(got, torch.autograd.grad(ys64, [x64, *w64], [d.double() for d in d_ys]), factor=1.5)


@pytest.mark.parametrize("shape", [(64, 5632), (1, 1), (3, 7, 11)])
@pytest.mark.parametrize("dtype", [B, H, S])
def test_swiglu(device, poisoned, shape, dtype):
    gate, up = leaf(random(device, *shape, dtype=dtype, scale=4.0)), leaf(random(device, *shape, dtype=dtype, seed=3))
    with torch.no_grad():
        gate.view(-1)[-1], gate.view(-1)[0] = 300.0, -60000.0
    with poisoned():
        out = fused.swiglu(gate, up)
    gate64, up64 = leaf(gate, torch.float64), leaf(up, torch.float64)
    out64 = F.silu(gate64) * up64
    judge([out], [out64])
    d_out = torch.randn_like(out)
    with poisoned():
        got = torch.autograd.grad(out, [gate, up], d_out)
    judge(got, torch.autograd.grad(out64, [gate64, up64], d_out.double()))


@pytest.mark.parametrize("rows, vocabulary", [(5, 128000), (1, 97), (4, 32000), (7, 50257), (6, 8)])
@pytest.mark.parametrize("dtype", [B, H, S])
@pytest.mark.parametrize("scale", [None, 0.125])
def test_cross_entropy(device, poisoned, rows, vocabulary, dtype, scale):
    logits = random(device, rows, vocabulary, dtype=dtype, scale=3.0)
    logits[0, vocabulary // 2] = 40.0
    targets = torch.arange(rows, device=device) % vocabulary
    if vocabulary > 97:
        logits[-1, 50:90] = -float("inf")
        targets[1], targets[2] = losses.IGNORED, vocabulary - 1
    l64 = leaf(logits, torch.float64)
    want = F.cross_entropy(l64, targets, reduction="none", ignore_index=losses.IGNORED)
    (d64,) = torch.autograd.grad(want.sum() * (scale or 1.0), l64)
    before = logits.clone()
    with poisoned():
        read = fused.cross_entropy(logits, targets)
        assert torch.equal(before, logits)
        wrote = fused.cross_entropy_gradient(
            logits, targets, None if scale is None else torch.tensor(scale, device=device)
        )
    assert torch.equal(read, wrote) and float((read - want.detach()).norm() / want.detach().norm()) < 1e-6
    judge([logits], [d64])


def test_cross_entropy_of_no_target_and_of_none_that_exists(device):
    logits = random(device, 4, 64)
    targets = torch.tensor([64, -1, 3, losses.IGNORED], device=device)
    assert fused.cross_entropy(logits, targets).isnan().tolist() == [True, True, False, False]
    logits[2, 7] = float("nan")
    assert fused.cross_entropy(logits, targets)[2].isnan()
    assert fused.cross_entropy_gradient(logits, torch.full_like(targets, losses.IGNORED), None).eq(0).all()
    assert logits.eq(0).all()


class SoftCap(nn.Linear):
    """Autograd needs its result again: it must not be overwritten."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class Adapted(nn.Module):
    def __init__(self, *size):
        super().__init__()
        self.out_features = size[1]
        self.base, self.down, self.up = nn.Linear(*size), nn.Linear(size[0], 4), nn.Linear(4, size[1])
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


matrix = functools.partial(nn.Linear, bias=False)


@pytest.mark.parametrize("head", [matrix, nn.Linear, SoftCap, Adapted], ids=["matrix", "bias", "cap", "adapted"])
@pytest.mark.parametrize("dtype", [S, B])
@pytest.mark.parametrize("rows", [1 << 20, 200, 48, 16], ids=["one chunk", "small", "few chunks", "many chunks"])
def test_loss_through_a_head(device, poisoned, monkeypatch, head, dtype, rows):
    monkeypatch.setattr(losses, "_CHUNK", {"cuda": 1, "fused": rows * 200 * dtype.itemsize // 2})
    monkeypatch.setattr(losses, "_SMALL", 33 * 200 * dtype.itemsize)
    calls = []
    monkeypatch.setattr(
        losses, "_gradients_of_matrix", lambda *a, f=losses._gradients_of_matrix: calls.append(0) or f(*a)
    )
    torch.manual_seed(0)
    head = head(24, 200).to(device, dtype)
    head64, hidden = copy.deepcopy(head).double(), leaf(random(device, 130, 24, dtype=dtype))
    targets = torch.arange(130, device=device) % 200
    targets[::3] = losses.IGNORED
    hidden64 = leaf(hidden, torch.float64)
    want = F.cross_entropy(head64(hidden64), targets, ignore_index=losses.IGNORED)
    with poisoned():
        got = losses.chunked_cross_entropy(hidden, targets, head)
    assert len(calls) == (
        {1 << 20: 1, 200: 3, 48: 3}.get(rows, 0) if type(head) is nn.Linear and head.bias is None else 0
    )
    limit = 3e-6 if dtype == S else 1.2e-2
    assert float((got - want).detach().abs() / want.detach()) < limit
    parameters, parameters64 = ([p for p in h.parameters() if p.requires_grad] for h in (head, head64))
    for factor in (1.0, 3.0):
        found = torch.autograd.grad(got * factor, [hidden, *parameters], retain_graph=True)
        wanted = torch.autograd.grad(want * factor, [hidden64, *parameters64], retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            assert float((a - b).norm() / b.norm()) < limit
    with torch.no_grad():
        assert float((losses.chunked_cross_entropy(hidden, targets, head) - want).abs() / want) < limit


def everything(device):
    """(a function that runs every operator forward and backward, its inputs)"""
    head = nn.Linear(256, 1000, bias=False).to(device, B)
    inputs = [leaf(random(device, 300, 256, dtype=B, seed=i)) for i in range(2)]
    weights = [leaf(1 + random(device, n, dtype=B, scale=0.3)) for n in (256, 224, 16, 16)]
    targets = torch.arange(300, device=device)

    def run(residual, x, *weights):
        total, y = fused.add_rms_norm(residual, x, weights[0], 1e-5)
        a, b, c = fused.small_norms(fused.swiglu(y, total), list(weights[1:]), 1e-5)
        return fused.rms_norm(torch.cat([a, b, c], -1) + total, weights[0], 1e-5)

    def step():
        loss = losses.chunked_cross_entropy(run(*inputs, *weights), targets, head)
        return [loss, *torch.autograd.grad(loss, [*inputs, *weights, head.weight])]

    return run, step, [*inputs, *weights]


def test_twice_the_same_run_has_the_same_bits(device):
    _, step, _ = everything(device)
    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_operators_keep_the_rules_of_torch(device):
    def new(*shape, dtype=S):
        return random(device, *shape, dtype=dtype).requires_grad_()

    ops, check = torch.ops.moai, torch.library.opcheck
    check(ops.rms_norm, (new(3, 24), new(24), 1e-5, S))
    check(ops.add_rms_norm, (new(3, 24), new(3, 24, dtype=B), new(24), 1e-5, S))
    check(ops.small_norms, (new(3, 24), new(8), new(12), new(4), 1e-5))
    check(ops.swiglu, (new(3, 24), new(3, 24)))
    targets = torch.tensor([1, 2, -100], device=device)
    check(ops.cross_entropy, (random(device, 3, 24), targets))
    check(ops.cross_entropy_gradient, (random(device, 3, 24), targets, torch.tensor(0.5, device=device)))


def test_compiles_without_a_break(device):
    run, _, inputs = everything(device)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got, want = compiled(*inputs), run(*inputs)
    assert torch.equal(got, want)
    grads = (torch.autograd.grad(y, inputs, torch.ones_like(y)) for y in (got, want))
    # Gradients that arrive over several ways may be added in another order.
    assert all(float((a - b).norm() / b.norm()) < 4e-3 for a, b in zip(*grads, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_synchronisation_and_cuda_graphs(device):
    _, step, _ = everything(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = step()
    for value in got:
        value.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    # A matrix product may be divided in another way there.
    assert all(float((a - b).detach().norm() / b.detach().norm()) < 4e-3 for a, b in zip(got, want, strict=True))
