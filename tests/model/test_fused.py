"""Norms, SwiGLU and the loss's chunks as torch computes them; the kernels that replace them are judged in tests/gpu."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moai_core.model import fused
from moai_core.model import loss as losses

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def relative(got, want):
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_rms_norm(dtype, size):
    x, weight = torch.randn(3, 5, size).to(dtype), (1 + torch.rand(size)).to(dtype)
    y = fused.rms_norm(x, weight, 1e-3)
    assert y.dtype == dtype and y.shape == x.shape and relative(y, norm(x, weight, 1e-3)) < TOLERANCE[dtype]
    # The result has the weight's dtype, whatever the row's.
    assert fused.rms_norm(x, weight.float(), 1e-3).dtype == torch.float32


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [torch.float32, torch.bfloat16])
def test_norm_of_the_sum_with_the_stream(stream, added):
    residual, x = torch.randn(4, 16).to(stream).requires_grad_(), torch.randn(4, 16).to(added).requires_grad_()
    weight = torch.ones(16, dtype=torch.bfloat16)
    total, y = fused.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(total, residual + x) and y.dtype == torch.bfloat16
    assert torch.equal(y, fused.rms_norm(residual + x, weight, 1e-5))
    grads = torch.autograd.grad(total.sum() + y.sum(), [residual, x])
    assert [g.dtype for g in grads] == [stream, added]
    same, alone = fused.add_rms_norm(residual, None, weight, 1e-5)
    assert same is residual and torch.equal(alone, fused.rms_norm(residual, weight, 1e-5))


@pytest.mark.parametrize("sizes", [(8, 2, 2), (5, 3), (4,)])
def test_small_norms_are_norms_of_slices(sizes):
    x, weights = torch.randn(2, 3, sum(sizes)), [torch.rand(n) for n in sizes]
    ys = fused.small_norms(x, weights, 1e-5)
    for y, part, weight in zip(ys, x.split(list(sizes), -1), weights, strict=True):
        assert y.is_contiguous() and relative(y, norm(part, weight, 1e-5)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    gate, up = (4 * torch.randn(3, 11)).to(dtype), torch.randn(3, 11).to(dtype)
    assert (
        relative(fused.swiglu(gate, up), gate.double() * torch.sigmoid(gate.double()) * up.double())
        < 2 * TOLERANCE[dtype]
    )


def test_nothing_is_usable_without_a_gpu():
    assert not fused.usable(torch.zeros(3))
    assert not fused.usable(torch.zeros(3, device="meta"))


class SoftCap(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("head", [nn.Linear, SoftCap])
def test_loss_can_be_differentiated_twice_over(head):
    """`retain_graph`: the gradients of a second backward pass are those of the first, times its own factor."""
    torch.manual_seed(0)
    head, hidden = head(8, 40), torch.randn(9, 8, requires_grad=True)
    targets = torch.arange(9)
    loss = losses.chunked_cross_entropy(hidden, targets, head)
    again = copy.deepcopy(head)
    want = F.cross_entropy(again(hidden), targets)
    for factor in (3.0, 0.0, 1.0):
        got = torch.autograd.grad(loss * factor, [hidden, *head.parameters()], retain_graph=True)
        wanted = torch.autograd.grad(want * factor, [hidden, *again.parameters()], retain_graph=True)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(got, wanted, strict=True))


def test_chunks_on_a_gpu_are_whole_tiles_of_one_size(monkeypatch):
    monkeypatch.setattr(fused, "usable", lambda *tensors: True)
    head = nn.Linear(4, 128000, bias=False, device="meta")

    def sizes(tokens, dtype=torch.bfloat16):
        hidden = torch.empty(tokens, 4, dtype=dtype)
        return [len(rows) for rows, _ in losses._chunks(hidden, torch.empty(tokens), head)]

    assert sizes(8192) == [8192] and sizes(16384) == [4096] * 4 and sizes(12000) == [3072] * 3 + [2784]
    assert sizes(8192, torch.float32) == [2048] * 4 and sizes(100) == [100]
    assert max(sizes(100_000)) * 128000 * 2 <= 2 << 30
