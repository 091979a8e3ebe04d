"""fp8: 8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa, no infinity), one fp32 scale a row.

A matrix W (O, I) is stored as

    qweight float8_e4m3fn (O, I), scales fp32 (O, 1).                 Value: q * scale, |q| <= 448

GPUs from compute capability 8.9 on multiply such matrices natively (scaled_mm.py); elsewhere it is a way to store.
Rows, not the whole matrix, share a scale: that costs nothing in the product and keeps rows of small weights exact.
Left out: e5m2 (for gradients), scales by group. Source: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moai_core.errors import UsageError
from moai_core.quant.formats import Layout, Spec

LARGEST = 448.0


def finite(weight: Tensor) -> Tensor:
    """`weight` in fp32. Raises UsageError where it holds NaN or infinity, which no scale fits."""
    weight = weight.float()
    if not torch.isfinite(weight).all():
        count = int((~torch.isfinite(weight)).sum())
        raise UsageError(f"{count} of {weight.numel()} weights are NaN or infinite, so they can't be quantized")
    return weight


class Fp8:
    """e4m3 with a scale a row."""

    name, bits, by_rows = "fp8", 8, True

    def check(self, spec: Spec, out: int, columns: int) -> None:
        """See formats.Format."""
        plain(spec, "one scale a row")

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        """See formats.Format."""
        return {"qweight": ((out, columns), torch.float8_e4m3fn), "scales": ((out, 1), torch.float32)}

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        """The largest number of each row becomes 448; a row of zeros gets a scale of one."""
        weight = finite(weight)
        scales = weight.abs().amax(-1, keepdim=True) / LARGEST
        # Below the normal numbers of fp32 the quotient would lose its digits: such a row is zeros.
        return self.encode_with(spec, weight, torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales))

    def encode_with(self, spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest numbers (ties to even) under given scales (O, 1) > 0; what is beyond 448 becomes 448."""
        assert zeros is None, "fp8 has no zero points"
        scales = scales.float()
        q = (weight.float() / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"qweight": q, "scales": scales}

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        """See formats.Format."""
        return tensors["qweight"].float() * tensors["scales"]


def plain(spec: Spec, scales: str) -> None:
    """Raises UsageError for a spec with groups or zero points, which a format with `scales` of its own doesn't have."""
    if spec.group_size:
        raise UsageError(f"{spec.format} has {scales}: group_size must be 0 (got {spec.group_size})")
    if not spec.symmetric:
        raise UsageError(f"{spec.format} is symmetric")
