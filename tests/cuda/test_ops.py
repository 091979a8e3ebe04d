"""Operators registered with little host time: gradients, what is saved, changes in place, compiled graphs."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import Function

from moai_core.cuda import ops

entered = []


class _Square(Function):
    @staticmethod
    def forward(ctx, x, factor):
        entered.append(factor)
        with ops.below():
            y = square(x, factor)
        ctx.factor = factor
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, d):
        (x,) = ctx.saved_tensors
        return double(x, 2 * ctx.factor) * d, None


def _run_square(x, factor):
    return ops.dense(x).copy_(x * x * factor)


def _run_double(x, factor):
    return ops.dense(x).copy_(x * factor)


def _run_halve(x):
    x.mul_(0.5)
    return x.new_zeros(1)


square = ops.define("test_square(Tensor x, float factor) -> Tensor", _run_square, lambda x, _: ops.dense(x), _Square)
double = ops.define("test_double(Tensor x, float factor) -> Tensor", _run_double, lambda x, _: ops.dense(x))
halve = ops.define("test_halve(Tensor(a!) x) -> Tensor", _run_halve, lambda x: x.new_empty(1))


def test_only_what_needs_a_gradient_enters_autograd():
    x = torch.randn(3, 4)
    entered.clear()
    assert torch.equal(square(x, 2.0), 2 * x * x)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not square(leaf, 2.0).requires_grad
    with torch.inference_mode():
        assert square(leaf, 2.0).is_inference()
    assert not entered
    square(leaf, 2.0).sum().backward()
    assert entered == [2.0]
    assert torch.equal(leaf.grad, 4 * x)


def test_second_derivatives_are_refused():
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(square(x, 1.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"test_double\.default has no derivative"):
        grad.sum().backward()


def test_hooks_see_what_is_saved():
    x, seen = torch.randn(3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        square(x, 1.0)
    assert seen == [x.data_ptr()]


def test_changes_in_place_are_counted():
    x = torch.randn(3)
    before = x._version
    halve(x)
    assert x._version > before
    leaf = torch.randn(3, requires_grad=True)
    y = leaf * 1
    z = y.square()  # saves y
    with torch.no_grad():
        halve(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_torch_s_own_checks():
    torch.library.opcheck(square, (torch.randn(3, 4, requires_grad=True), 2.0))
    torch.library.opcheck(square, (torch.randn(3, 4, requires_grad=True).t(), 2.0))
    torch.library.opcheck(halve, (torch.randn(3, 4),))


def test_compiles_without_a_break():
    def work(x):
        return (square(x * 2, 3.0) + 1).sum()

    mine = torch.randn(5, requires_grad=True)
    want = mine.detach().clone().requires_grad_()
    torch.compile(work, fullgraph=True, backend="aot_eager")(mine).backward()
    work(want).backward()
    assert torch.equal(mine.grad, want.grad)
    torch.compiler.reset()


def test_fresh_memory_is_contiguous():
    x = torch.empty(4, 6, dtype=torch.bfloat16).t()
    y = ops.dense(x, torch.float32)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, torch.float32, True)
    assert ops.dense(x).dtype == torch.bfloat16
