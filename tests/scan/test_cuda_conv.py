"""What the GPU's convolution and one-token steps decide without a GPU: refusals, shapes and dtypes of results, copies of
tensors that the kernels can't read as they are. Their numbers: tests/gpu/test_conv_kernels.py.
"""

from __future__ import annotations

import pytest
import torch

from moai_core.scan import cuda_conv, cuda_step


def test_refusals_say_what_would_be_right():
    assert all(cuda_conv.why_not(4096, width) is None for width in range(2, 9))
    assert "multiple of 8" in cuda_conv.why_not(12, 4) and "12" in cuda_conv.why_not(12, 4)
    for width in (1, 9):
        assert f"2 to 8 wide (this model's is {width})" in cuda_conv.why_not(8, width)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [False, True])
def test_results_have_the_shapes_and_dtypes_of_their_tensors(state, weight_dtype):
    u = torch.empty(2, 9, 32, dtype=torch.bfloat16, device="meta")[..., :16]
    weight, bias = (torch.empty(*shape, dtype=weight_dtype, device="meta") for shape in ((16, 1, 4), (16,)))
    first = torch.empty(2, 16, 3, dtype=torch.float32, device="meta") if state else None
    y, last = cuda_conv.conv(u, weight, bias, state=first)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((2, 9, 16), torch.bfloat16, True)
    assert (last.shape, last.dtype) == ((2, 16, 3), torch.bfloat16)
    first = None if first is None else first.to(u.dtype)
    grads = torch.ops.moai.conv_backward(u, weight, bias, first, None, torch.empty_like(y), None)
    assert [g.dtype for g in grads] == [u.dtype, weight_dtype, weight_dtype, u.dtype]
    assert [tuple(g.shape) for g in grads] == [(2, 9, 16), (16, 1, 4), (16,), (2, 16, 3) if state else (0,)]


def test_steps_have_the_shapes_and_dtypes_of_their_tensors():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    y, last = cuda_conv.conv_step(meta(3, 16), meta(16, 1, 4), None, meta(3, 16, 3))
    assert (y.shape, y.dtype, last.shape, last.dtype) == ((3, 16), torch.bfloat16, (3, 16, 3), torch.bfloat16)
    wide = torch.float32
    inputs = (
        meta(3, 16),
        meta(3, 16, dtype=wide),
        meta(16, 8, dtype=wide),
        meta(3, 8),
        meta(3, 8),
        None,
        meta(3, 16),
        None,
    )
    y, last = cuda_step.step(*inputs, meta(3, 16, 8, dtype=wide))
    assert (y.shape, y.dtype, last.shape, last.dtype) == ((3, 16), torch.bfloat16, (3, 16, 8), wide)


def test_only_what_the_kernels_cant_read_is_copied():
    wide = torch.randn(2, 5, 40)
    for kept in (wide, wide[..., :16], wide[:, 1:, 8:24], wide[:, ::2, :16]):
        assert cuda_conv.rows(kept) is kept
    for x in (wide[..., 1:17], wide[..., ::2], wide.transpose(1, 2)[..., :4], torch.randn(2, 5, 18)[..., :16]):
        copy = cuda_conv.rows(x)
        assert torch.equal(copy, x) and copy.stride(-1) == 1
        assert copy.data_ptr() % 16 == 0 and all(stride * 4 % 16 == 0 for stride in copy.stride()[:2])
    flat = torch.randn(33)
    assert cuda_conv.solid(None) is None and cuda_conv.solid(flat) is flat
    moved = cuda_conv.solid(flat[1:])
    assert torch.equal(moved, flat[1:]) and moved.data_ptr() % 16 == 0
