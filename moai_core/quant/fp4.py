"""fp4: 4-bit floating point (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) with a scale a block of columns.

A matrix W (O, I) is stored as

    nvfp4  qweight uint8 (O, I/2), the even column in the low half; scales float8_e4m3fn (O, I/16); scale fp32 (),
           that of the whole matrix.                                  Value: q * (scales * scale)
    mxfp4  qweight likewise; scales uint8 (O, I/32), the e8m0 exponent: s stands for 2^(s - 127), 255 for NaN.
                                                                      Value: q * 2^(s - 127)

A code is a sign (8), two bits of exponent and one of mantissa. Weights alone are fp4, as activations are not rounded:
moai decodes them and multiplies in the activations' type on every device. On GPUs before Blackwell there is no other
way, they have no FP4 units; `note` says so. Sources: OCP Microscaling Formats (MX) 1.0; NVFP4 as in NVIDIA's Blackwell.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from moai_core.errors import UsageError
from moai_core.quant.formats import Layout, Spec, pack4, unpack4
from moai_core.quant.fp8 import LARGEST as LARGEST_FP8
from moai_core.quant.fp8 import finite, plain

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = VALUES[-1]
_MIDDLES = tuple((a + b) / 2 for a, b in itertools.pairwise(VALUES))
# e8m0: 2^-127 to 2^127; fp32 has no normal number below 2^-126, and a scale there would only make zeros.
_BIAS, _LOWEST, _HIGHEST = 127, 1, 254
_BLACKWELL = (10, 0)


NAMES = ("nvfp4", "mxfp4")


def to_codes(values: Tensor) -> Tensor:
    """The nearest e2m1 codes (uint8 0..15) of fp32 `values`, ties to the even mantissa, beyond 6 to 6."""
    magnitude = values.abs()
    middles = torch.tensor(_MIDDLES, device=values.device)
    below = torch.bucketize(magnitude, middles)
    # On a middle the two searches differ by one, and of two neighbours one code is even.
    code = torch.where(below % 2 == 0, below, torch.bucketize(magnitude, middles, right=True))
    return (code + 8 * torch.signbit(values)).to(torch.uint8)


def from_codes(codes: Tensor) -> Tensor:
    """fp32 values of e2m1 codes 0..15."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=codes.device)
    return table[codes.int()]


def note(device: torch.device | str) -> str:
    """What fp4 means on this device, for reports: one sentence."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _BLACKWELL:
        return "fp4 is a storage format here: FP4 units multiply FP4 by FP4, moai's activations are wider"
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "a processor"
        if device.type == "cpu"
        else device.type
    )
    return f"fp4 is a storage format here: {name} has no FP4 units, the weights are decoded for each product"


class _Fp4:
    """What both block formats share."""

    bits, by_rows = 4, True
    name: str
    block: int

    def check(self, spec: Spec, out: int, columns: int) -> None:
        """See formats.Format."""
        plain(spec, f"blocks of {self.block}")
        if columns % self.block:
            raise UsageError(f"{self.name}'s blocks of {self.block} don't divide {columns} columns")

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        """See formats.Format."""
        blocks = (out, columns // self.block)
        return {"qweight": ((out, columns // 2), torch.uint8), "scales": (blocks, self._scales)}

    _scales: torch.dtype

    def _blocks(self, weight: Tensor) -> Tensor:
        """(O, I) -> (O, I/g, g)."""
        return weight.reshape(weight.shape[0], -1, self.block)

    def _codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Codes (O, I) of a weight under fp32 scales (O, I/g), of which 0 makes zeros."""
        scales = scales[..., None]
        return to_codes(torch.where(scales > 0, self._blocks(weight) / scales, 0.0)).flatten(1)

    def _values(self, tensors: Mapping[str, Tensor], scales: Tensor) -> Tensor:
        return (self._blocks(from_codes(unpack4(tensors["qweight"]))) * scales[..., None]).flatten(1)


class NvFp4(_Fp4):
    """Blocks of 16 with fp8 scales under one fp32 scale."""

    name, block, _scales = "nvfp4", 16, torch.float8_e4m3fn

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        """See formats.Format."""
        return {**super().tensors(spec, out, columns), "scale": ((), torch.float32)}

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        """The matrix's largest number gets the largest scale, 448, and the largest code; each block's largest number
        the scale nearest to a sixth of it."""
        weight = finite(weight)
        largest = self._blocks(weight).abs().amax(-1) / LARGEST
        scale = weight.abs().max() / (LARGEST * LARGEST_FP8)
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
        return self.encode_with(spec, weight, largest, scale=scale)

    def encode_with(
        self, spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, *, scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The nearest codes under given scales (O, I/16), which are rounded to what is stored: multiples by an e4m3
        number of `scale` (), by default such that the largest is exact."""
        assert zeros is None, "fp4 has no zero points"
        scales = scales.float()
        scale = scales.max() / LARGEST_FP8 if scale is None else scale.float()
        stored = (scales / scale).clamp(max=LARGEST_FP8).to(torch.float8_e4m3fn)
        return {
            "qweight": pack4(self._codes(weight.float(), stored.float() * scale)),
            "scales": stored,
            "scale": scale.reshape(()),
        }

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        """See formats.Format."""
        return self._values(tensors, tensors["scales"].float() * tensors["scale"])


class MxFp4(_Fp4):
    """Blocks of 32 whose scales are powers of two."""

    name, block, _scales = "mxfp4", 32, torch.uint8

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        """Of the two powers of two around a sixth of a block's largest number, the one with the smaller squared error
        (the standard takes the smaller one and cuts what is beyond 6)."""
        weight = finite(weight)
        largest = self._blocks(weight).abs().amax(-1)
        exponent = torch.frexp(largest).exponent - 1  # largest = m * 2^exponent, 1 <= m < 2
        # The standard's: 6 = 1.5 * 2^2 is the largest code.
        low = torch.where(largest > 0, exponent - 2 + _BIAS, _BIAS).clamp(_LOWEST, _HIGHEST)
        high = (low + 1).clamp(max=_HIGHEST)
        # As multiples of the scale, whose squares fp32 holds whatever the weights' size is.
        errors = [self._error(weight, scales) / powers(low)[..., None] for scales in (low, high)]
        errors = [error.square().sum(-1) for error in errors]
        return self.encode_with(spec, weight, torch.where(errors[0] <= errors[1], low, high).to(torch.uint8))

    def encode_with(self, spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest codes under given scales: uint8 exponents (O, I/32)."""
        assert zeros is None, "fp4 has no zero points"
        assert scales.dtype == torch.uint8, "mxfp4's scales are exponents"
        return {"qweight": pack4(self._codes(weight.float(), powers(scales))), "scales": scales}

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        """See formats.Format."""
        return self._values(tensors, powers(tensors["scales"]))

    def _error(self, weight: Tensor, scales: Tensor) -> Tensor:
        """What each block (O, I/32, 32) misses."""
        scale = powers(scales)
        made = self._blocks(from_codes(self._codes(weight, scale))) * scale[..., None]
        return made - self._blocks(weight)


def powers(exponents: Tensor) -> Tensor:
    """fp32 values of e8m0 scales (uint8): 2^(s - 127), NaN for 255."""
    # An e8m0 scale is fp32's field of exponents; that of 0 would be fp32's zero, that of 255 its infinity.
    values = (exponents.int() << 23).view(torch.float32)
    values = torch.where(exponents == 0, 2.0**-_BIAS, values)
    return torch.where(exponents == 255, torch.nan, values)
