"""How quantized numbers are stored: a `Spec` says which format a matrix has, `FORMATS` holds what each can do.

A format knows nothing of how its numbers were chosen (rounding, GPTQ, AWQ, training: moai_core/quantize) nor of who
multiplies with them (kernels.py): saving, loading, generating and exporting know formats only. Tensors are stored row
by row as (out, in), without any device's interleaving, so that a file is the same everywhere.

A matrix W (O, I) with groups of g columns is stored as

    int4  qweight uint8 (O, I/2), the even column in the low half; scales fp16 (O, I/g); zeros fp16 (O, I/g) unless
          symmetric.                              Value: (q - zero) * scale, q 0..15, zero 8 if symmetric
    int8  qweight int8 (O, I), scales fp16 (O, I/g).                  Value: q * scale, q -127..127

A group is g neighbouring columns of a row that share a scale; g = 0 stands for the whole row. Scales are fp16, as in
the layouts that other tools read (GPTQ, AWQ), and a value is exact in fp32. Floating-point formats: fp8.py, fp4.py,
bnb.py. Left out: anything below 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moai_core.errors import UsageError

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

GROUPS = (32, 64, 128, 256)
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of fp16, subnormal numbers included


@dataclass(frozen=True)
class Spec:
    """How one matrix is stored. group_size: columns that share a scale, 0 for the whole row."""

    format: str
    group_size: int = 128
    symmetric: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {"format": self.format, "group_size": self.group_size, "symmetric": self.symmetric}

    @staticmethod
    def from_dict(values: Any) -> Spec:
        """Raises UsageError for what is no such dictionary or names an unknown format."""
        known = {"format", "group_size", "symmetric"}
        if not isinstance(values, Mapping) or not set(values) <= known or "format" not in values:
            raise UsageError(f"a quantized module needs format, group_size and symmetric (got {str(values)[:80]})")
        spec = Spec(**values)
        if not isinstance(spec.format, str) or spec.format not in FORMATS:
            raise UsageError(f"unknown format {str(spec.format)[:40]!r}", hint=f"formats: {', '.join(FORMATS)}")
        if not isinstance(spec.group_size, int) or isinstance(spec.group_size, bool) or spec.group_size < 0:
            raise UsageError(f"group_size must be an integer >= 0 (got {str(spec.group_size)[:40]})")
        if not isinstance(spec.symmetric, bool):
            raise UsageError(f"symmetric must be true or false (got {str(spec.symmetric)[:40]})")
        return spec


class Format(Protocol):
    """What a format offers. O rows, I columns; W (O, I)."""

    name: str
    # The bits of one number, scales aside.
    bits: int
    # Whether some of the rows can be decoded without the others, as an embedding's are.
    by_rows: bool

    def check(self, spec: Spec, out: int, columns: int) -> None:
        """Raises UsageError where a matrix of this shape can't be stored so."""

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        """Names, shapes and types of what is stored; each has a row of W a row (or no dimension at all)."""

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest, with scales that just reach the smallest and the largest number of each group."""

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        """(O, I) fp32, exactly the stored values. Takes any subset of the rows where `by_rows`."""


def groups(spec: Spec, columns: int) -> int:
    """How many scales a row of so many columns has."""
    return columns // spec.group_size if spec.group_size else 1


def grouped(spec: Spec, weight: Tensor) -> Tensor:
    """(O, I) -> (O, I/g, g), a view."""
    return weight.reshape(weight.shape[0], groups(spec, weight.shape[1]), -1)


def check_groups(spec: Spec, columns: int, allowed: tuple[int, ...] = GROUPS) -> None:
    """Raises UsageError for a group size that isn't known or doesn't divide the columns."""
    if spec.group_size and spec.group_size not in allowed:
        raise UsageError(
            f"group size must be one of {', '.join(map(str, allowed))} (got {spec.group_size})", hint="0: the whole row"
        )
    if spec.group_size and columns % spec.group_size:
        fitting = [g for g in allowed if columns % g == 0]
        raise UsageError(
            f"group size {spec.group_size} doesn't divide {columns} columns",
            hint=f"{', '.join(map(str, fitting))} would" if fitting else "0 takes the whole row as one group",
        )


def half(scales: Tensor) -> Tensor:
    """Scales as fp16; none that wasn't 0 becomes 0, so that no group is lost. Raises UsageError beyond fp16."""
    if scales.numel() and not float(scales.abs().max()) <= LARGEST:
        raise UsageError(f"a scale of {float(scales.abs().max()):.3g} doesn't fit fp16: the weights are too large")
    return rounded(scales)


def rounded(scales: Tensor) -> Tensor:
    """`half` without its look at the numbers, which a GPU would have to be waited for."""
    least = torch.full_like(scales, SMALLEST).copysign(scales)
    return torch.where((scales != 0) & (scales.abs() < SMALLEST), least, scales).to(torch.float16)


def pack4(codes: Tensor) -> Tensor:
    """(O, I) integers 0..15 -> (O, I/2) uint8, the even column in the low half."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack4(packed: Tensor) -> Tensor:
    """(O, I/2) uint8 -> (O, I) uint8 of 0..15."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


class Int4:
    """Group-wise 4-bit integers."""

    name, bits, by_rows = "int4", 4, True

    def check(self, spec: Spec, out: int, columns: int) -> None:
        check_groups(spec, columns)
        if columns % 2:
            raise UsageError(f"int4 needs an even number of columns (got {columns})")

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        scales = ((out, groups(spec, columns)), torch.float16)
        layout: Layout = {"qweight": ((out, columns // 2), torch.uint8), "scales": scales}
        return layout if spec.symmetric else {**layout, "zeros": scales}

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        """Symmetric: the codes 1..15 reach the largest number of both signs, 0 (that is -8) one that is larger still.
        Asymmetric: 0..15 from the smallest to the largest number, with 0 among them."""
        w = grouped(spec, weight.float())
        high, low = w.amax(-1).clamp(min=0), w.amin(-1).clamp(max=0)
        if spec.symmetric:
            return self.encode_with(spec, weight, half(torch.maximum(high / 7, -low / 8)))
        scales = half((high - low) / 15)
        zeros = torch.where(scales > 0, torch.round(-low / scales.float()), 0).clamp(0, 15)
        return self.encode_with(spec, weight, scales, zeros)

    def encode_with(self, spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest codes under given scales, and zeros where the spec is not symmetric, (O, I/g) each."""
        scales = scales.to(torch.float16)
        kept = {"scales": scales} if zeros is None else {"scales": scales, "zeros": zeros.to(torch.float16)}
        return self.pack(codes4(grouped(spec, weight.float()), scales, kept.get("zeros")).flatten(1), kept)

    def pack(self, codes: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors of codes (O, I) 0..15, and `kept`: the scales and zeros."""
        return {"qweight": pack4(codes), **kept}

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        q = grouped(spec, unpack4(tensors["qweight"])).float()
        zeros = tensors["zeros"].float()[..., None] if "zeros" in tensors else 8.0
        return ((q - zeros) * tensors["scales"].float()[..., None]).flatten(1)


def codes4(w: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The codes, fp32 integers 0..15, nearest to w (O, G, g) fp32 under scales and zeros (O, G), 8 where none.
    A scale of 0 gives the code that stands for 0. Also what fake quantization computes (fake.py): the same bits."""
    zero = 8.0 if zeros is None else zeros.float()[..., None]
    scale = scales.float()[..., None]
    return torch.where(scale != 0, torch.round(w / scale + zero), zero).clamp(0, 15)


class Int8:
    """8-bit integers by row, or by group."""

    name, bits, by_rows = "int8", 8, True

    def check(self, spec: Spec, out: int, columns: int) -> None:
        check_groups(spec, columns)
        if not spec.symmetric:
            raise UsageError("int8 is symmetric")

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        return {
            "qweight": ((out, columns), torch.int8),
            "scales": ((out, groups(spec, columns)), torch.float16),
        }

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        return self.encode_with(spec, weight, half(grouped(spec, weight.float()).abs().amax(-1) / 127))

    def encode_with(self, spec: Spec, weight: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The nearest codes under given scales (O, I/g)."""
        scales = scales.to(torch.float16)
        return {"qweight": codes8(grouped(spec, weight.float()), scales).flatten(1).to(torch.int8), "scales": scales}

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        q = grouped(spec, tensors["qweight"]).float()
        return (q * tensors["scales"].float()[..., None]).flatten(1)


def codes8(w: Tensor, scales: Tensor) -> Tensor:
    """The codes, fp32 integers -127..127, nearest to w (O, G, g) fp32 under scales (O, G)."""
    scale = scales.float()[..., None]
    return torch.where(scale != 0, torch.round(w / scale), 0).clamp(-127, 127)


FORMATS: dict[str, Format] = {"int4": Int4(), "int8": Int8()}


def decode(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
    """(O, I) fp32, exactly the stored values."""
    return FORMATS[spec.format].decode(spec, tensors)
