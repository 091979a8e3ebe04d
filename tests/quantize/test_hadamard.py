"""The rotation of activations: exact against the dense matrix, undone on the weight side, and it does spread outliers."""

from __future__ import annotations

import pytest
import torch

from moai_core.quant import hadamard

# The inner and feed-forward widths of the presets, 768 = 3 * 256, small and odd ones.
SIZES = [4096, 8192, 10240, 5632, 6016, 9728, 768, 12, 20, 28, 2, 1, 7, 64, 128, 2048]


def dense(size):
    """T from its definition: Hartley's matrix as bf16 holds it, times Sylvester's by recursion."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    power, h = size // odd, torch.ones(1, 1, dtype=torch.float64)
    while len(h) < power:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    angle = 2 * torch.pi * torch.outer(torch.arange(odd), torch.arange(odd)).double() / odd
    cas = ((angle.cos() + angle.sin()) / odd**0.5).to(torch.bfloat16).double()
    return torch.kron(cas, h / 2 ** ((power.bit_length() - 1) // 2))


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_dense_matrix(size):
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    rotated = hadamard.OnlineHadamard(size)(x)
    if size <= 2048:
        T = dense(size)
        torch.testing.assert_close(rotated, x @ T, rtol=1e-10, atol=1e-10)
        weight = x[0]
        torch.testing.assert_close(hadamard.fold(weight), torch.linalg.solve(T, weight.T).T, rtol=1e-10, atol=1e-10)
    # Nearly orthogonal: lengths are kept, up to a factor of sqrt(2) for odd powers of two and to bf16's rounding.
    factor = 2 if (size & -size).bit_length() % 2 == 0 else 1
    assert (rotated.norm() ** 2 / x.norm() ** 2 / factor).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_folded_undoes_it(size):
    make = torch.Generator().manual_seed(size)
    x, weight = (torch.randn(4, size, generator=make, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(hadamard.apply(x) @ hadamard.fold(weight).T, x @ weight.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hadamard.unfold(hadamard.fold(weight)), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [4096, 5632, 6016])
def test_is_one_matrix_in_every_type(size, dtype):
    x = torch.randn(8, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = hadamard.apply(x.double())
    error = (hadamard.apply(x).double() - exact).norm() / exact.norm()
    # No more than the rounding of two or three passes' results.
    assert hadamard.apply(x).dtype == dtype and error < 2 * torch.finfo(dtype).eps


def test_moments_are_those_of_the_rotated_inputs():
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = hadamard.apply(x)
    torch.testing.assert_close(hadamard.moments(x.T @ x), y.T @ y)


def test_outliers_are_spread_and_gradients_flow():
    x = torch.randn(16, 5632, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 17] *= 300
    y = hadamard.apply(x)
    assert y.abs().max() / y.square().mean().sqrt() < 0.2 * x.abs().max() / x.square().mean().sqrt()
    small = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard.apply, (small,))


def test_sizes_without_a_cheap_rotation_are_told():
    assert hadamard.why_not(5632) is None and "257" in str(hadamard.why_not(514))
