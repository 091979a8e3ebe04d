"""A rotation of a matrix product's inputs that spreads outliers over all channels, at log-linear cost.

    y W^T = (y T) (W T^-T)^T:  T is applied to the activations as they come, T^-T to the weights once and for all.

T of size n = odd * 2^k is the Kronecker product of two matrices with entries of (nearly) one size: Sylvester's Hadamard
matrix of size 2^k, applied in passes of at most 64 (each a small matrix product), and for n that is no power of two
the discrete Hartley transform cas(2 pi i j / odd), orthogonal and symmetric for every size. (Hadamard matrices exist
for multiples of four only, and the least that fits is large: 44 for 5632 = 11 * 512, 188 for 6016 = 47 * 128.) Entries
are powers of two, or are rounded to bf16 before T is inverted: T is the same matrix in every type, and nothing is lost
but the rounding of the activations. It follows from the size alone; config.json names the modules that have one.
Source: QuaRot, arXiv 2404.00456; MambaQuant, arXiv 2501.13484 (out_proj's input).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

_WIDEST = 6  # a pass multiplies by at most 2^6
_LARGEST_ODD = 256  # beyond, fp16 would lose digits of the smallest entries


class OnlineHadamard(nn.Module):
    """x (..., size) -> x T, in x's dtype. No parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) in any floating dtype; differentiable."""
        return apply(x)

    def extra_repr(self) -> str:
        return str(self.size)


def why_not(size: int) -> str | None:
    """Why there is no cheap rotation of this size, or None."""
    odd = size // (size & -size)
    return None if odd <= _LARGEST_ODD else f"{size} = {odd} * {size // odd}, and {odd} is too large an odd factor"


def apply(x: Tensor) -> Tensor:
    """x (..., n) -> x T."""
    return _transform(x, inverse=False)


def fold(weight: Tensor) -> Tensor:
    """weight (O, n) -> W T^-T, what stands for W behind the rotation; computed in fp64, in weight's dtype."""
    return _transform(weight.double(), inverse=True).to(weight.dtype)


def unfold(weight: Tensor) -> Tensor:
    """The inverse of `fold`: W T^T."""
    wide = weight.double()
    odd, bits = _split(wide.shape[-1])
    if odd > 1:
        wide = torch.matmul(_hartley(odd, torch.float64, wide.device), wide.reshape(-1, odd, 1 << bits))
    return _sylvester(wide.reshape(weight.shape), bits).to(weight.dtype)


def moments(second: Tensor) -> Tensor:
    """The second moments (n, n) of x T from those of x: T^T M T."""
    return apply(apply(second.double()).T.contiguous()).to(second.dtype)


def _transform(x: Tensor, *, inverse: bool) -> Tensor:
    """x T, or x T^-T."""
    size = x.shape[-1]
    odd, bits = _split(size)
    y = x.reshape(-1, size)
    if odd > 1:
        mix = _inverse(odd, x.device) if inverse else _hartley(odd, x.dtype, x.device)
        # Rows of `y` as (odd, 2^k) matrices Y: x T is M^T Y S, and x T^-T is M^-1 Y S^-1.
        y = torch.matmul(mix if inverse else mix.T, y.reshape(-1, odd, 1 << bits)).reshape(-1, size)
    y = _sylvester(y, bits)
    if inverse and bits % 2:
        y = y / 2  # S S = 2 where an odd power of two has no exact root
    return y.reshape(x.shape)


def _split(size: int) -> tuple[int, int]:
    power = size & -size
    return size // power, power.bit_length() - 1


def _sylvester(x: Tensor, bits: int) -> Tensor:
    """Rows (..., odd * 2^k) times I (x) S with S = H / 2^floor(k/2), H Sylvester's matrix of size 2^k."""
    shape, behind, left = x.shape, 1, bits
    passes = -(-bits // _WIDEST)
    for number in range(passes, 0, -1):
        width = -(-left // number)
        # Each pass divides by a power of two near its root, so that numbers keep their size in half precision.
        done = bits - left
        shift = (done + width) // 2 - done // 2
        h = _hadamard(width, shift, x.dtype, x.device)
        if behind == 1:
            x = (x.reshape(-1, 1 << width) @ h).reshape(shape)
        else:
            x = torch.matmul(h, x.reshape(-1, 1 << width, behind)).reshape(shape)
        behind <<= width
        left -= width
    return x


@lru_cache(maxsize=64)
def _hadamard(bits: int, shift: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept and used again where gradients are wanted
        h = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(bits):
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return (h / 2**shift).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _hartley(odd: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(odd, odd): orthogonal up to its rounding to bf16, and the same numbers in every dtype."""
    with torch.inference_mode(False):
        at = torch.arange(odd, dtype=torch.float64)
        angle = 2 * math.pi / odd * (at[:, None] * at % odd)
        exact = (angle.cos() + angle.sin()) / math.sqrt(odd)
        return exact.to(torch.bfloat16).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _inverse(odd: int, device: torch.device) -> Tensor:
    return torch.linalg.inv(_hartley(odd, torch.float64, torch.device("cpu"))).to(device)
