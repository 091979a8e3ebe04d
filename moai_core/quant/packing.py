"""What the layouts of other tools share: integers packed into int32, and the description of one of their matrices.

A layout (layout_gptq.py, layout_awq.py, layout_compressed.py) stores the same numbers as moai's int4 or int8 in another
order. Each module has

    METHOD                     its name in config.json's quantization_config
    read_config(values)        a Stored, from that entry
    write_config(spec)         such an entry
    fits(spec, out, columns)   why it can't store a matrix, or None
    size(found, stored)        the Stored of one matrix, whose out and columns are known then
    shapes(stored)             {name: (shape, types)} of what it stores; those in OPTIONAL may be missing
    MADE                       {name: function(tensors, spec)}: the layout's tensors of moai's
    PARTS                      {name: function(tensors, stored)}: moai's tensors of the layout's, the same numbers bit
                               for bit. With a mapping that loads a tensor when asked for it, few are in memory at once
    decode(tensors, stored)    (O, I) fp32, also of what moai's formats can't hold

Source of each: the docstrings there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moai_core.errors import CheckpointError, UsageError
from moai_core.quant.formats import GROUPS, Layout, Spec, pack4, unpack4

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
# Of scales; what fp16 doesn't hold exactly can be decoded alone.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = {4: "int4", 8: "int8"}


class Unfit(CheckpointError):
    """moai's formats can't hold a matrix as it is stored; its values can be decoded all the same."""


@dataclass(frozen=True)
class Stored:
    """How a matrix is stored. group_size 0: the whole row. version: of the layout, where it has several. out, columns:
    the matrix's, where a certain one is meant."""

    bits: int
    group_size: int
    symmetric: bool
    version: int = 1
    out: int = 0
    columns: int = 0

    @property
    def spec(self) -> Spec:
        """moai's name for it. Raises Unfit where it has none."""
        if self.group_size and self.group_size not in GROUPS:
            raise Unfit(f"groups of {self.group_size} columns, moai has {', '.join(map(str, GROUPS))} and whole rows")
        if self.bits == 8 and not self.symmetric:
            raise Unfit("8 bits with zero points, moai's int8 has none")
        return Spec(WIDTHS[self.bits], self.group_size, self.symmetric)

    @property
    def zero(self) -> int:
        """The code of 0 in a symmetric matrix."""
        return 1 << (self.bits - 1)

    @property
    def groups(self) -> int:
        """How many scales a row has. Raises CheckpointError where the groups don't divide the columns."""
        if self.group_size and self.columns % self.group_size:
            raise CheckpointError(f"groups of {self.group_size} don't divide {self.columns} columns")
        return self.columns // self.group_size if self.group_size else 1

    def sized(self, out: int, columns: int) -> Stored:
        """That of a certain matrix."""
        return replace(self, out=out, columns=columns)


def stored(spec: Spec) -> Stored:
    """How a matrix of moai's format is stored elsewhere. Raises UsageError for a format that only moai has."""
    for bits, name in WIDTHS.items():
        if spec.format == name:
            return Stored(bits, spec.group_size, spec.symmetric)
    raise UsageError(f"{spec.format} can't be stored in this layout, {' and '.join(WIDTHS.values())} can")


# ---- integers ----------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """(R, n) integers below 2^bits -> (R, n * bits / 32) int32, the first in the lowest bits; zeros fill the last."""
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % (32 // bits)))
    packed = pack4(codes) if bits == 4 else codes
    # torch runs on little-endian machines only: four bytes in a row are an int32 from its lowest byte up.
    return packed.flatten().view(torch.int32).view(len(packed), -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(R, k) int32 -> (R, k * 32 / bits) uint8."""
    raw = packed.flatten().view(torch.uint8).view(len(packed), -1)
    return unpack4(raw) if bits == 4 else raw


def codes(tensors: Tensors, spec: Spec) -> Tensor:
    """(O, I) uint8 codes of moai's tensors, counted from 0."""
    q = tensors["qweight"]
    return unpack4(q) if spec.format == "int4" else (q.to(torch.int16) + 128).to(torch.uint8)


def qweight(found: Tensor, spec: Spec) -> Tensor:
    """moai's qweight of codes (O, I) uint8 counted from 0. Raises Unfit for an int8 of -128."""
    if spec.format == "int4":
        return pack4(found)
    if bool((found == 0).any()):
        raise Unfit("holds the integer -128, moai's int8 ends at -127")
    return (found.to(torch.int16) - 128).to(torch.int8)


def zeros(tensors: Tensors, spec: Spec) -> Tensor:
    """(O, G) uint8 zero points of moai's tensors. Raises UsageError for one that is no whole number 0..15."""
    if "zeros" not in tensors:
        return torch.full(tensors["scales"].shape, stored(spec).zero, dtype=torch.uint8)
    found = tensors["zeros"].float()
    whole = found.round().clamp(0, 15)
    if bool((whole != found).any()):
        bad = float(found[whole != found][0])
        raise UsageError(
            f"a zero point of {bad:g} can't be stored in this layout, whole numbers from 0 to 15 can",
            hint="zero points that were trained are kept by --format moai alone",
        )
    return whole.to(torch.uint8)


# ---- checks of what others wrote ---------------------------------------------------------------------------------


def integer(values: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of the fields `names` that is there, a whole number. Raises CheckpointError."""
    for name in names:
        if name in values:
            value = values[name]
            if not isinstance(value, int) or isinstance(value, bool):
                raise CheckpointError(f"{name} must be a whole number (got {str(value)[:40]!r})")
            return value
    if default is None:
        raise CheckpointError(f"{names[0]} is missing")
    return default


def flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    """A field that is true or false. Raises CheckpointError."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} must be true or false (got {str(value)[:40]!r})")
    return value


def group_size(values: Mapping[str, Any], *names: str) -> int:
    """The group size, where -1 means a whole row (0 here). Raises CheckpointError."""
    size = integer(values, *names)
    if size != -1 and not 0 < size < 1 << 24:
        raise CheckpointError(f"{names[0]} must be -1 or above 0 (got {size})")
    return max(size, 0)


def numbers(scales: Tensor) -> Tensor:
    """Scales in fp32. Raises CheckpointError for NaN and infinity."""
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError("the scales hold NaN or infinite numbers")
    return scales.float()


def half(scales: Tensor) -> Tensor:
    """Scales as fp16. Raises CheckpointError for NaN and infinity, Unfit where fp16 doesn't hold them exactly."""
    made = numbers(scales).to(torch.float16)
    if scales.dtype != torch.float16 and not torch.equal(made.to(scales.dtype), scales):
        raise Unfit(f"scales in {_name(scales.dtype)} that fp16 doesn't hold")
    return made


def no_zero_points(found: Tensor, zero: int) -> None:
    """Raises CheckpointError where zero points of a matrix that is called symmetric aren't all `zero`."""
    if bool((found != zero).any()):
        bad = int(found[found != zero][0])
        raise CheckpointError(f"a zero point is {bad}, that of every symmetric group is {zero}")


def by_group(index: Tensor | None, stored: Stored) -> Tensor:
    """(G,) the stored group of each of moai's groups, which are of neighbouring columns, from that of each column
    (None: they are neighbours).

    Raises CheckpointError for one that doesn't exist, Unfit where neighbours belong to different groups (act-order).
    """
    if index is None:
        return torch.arange(stored.groups)
    check_index(index, stored.groups)
    blocks = index.long().view(stored.groups, -1)
    if bool((blocks != blocks[:, :1]).any()):
        raise Unfit("the groups (g_idx) are not of neighbouring columns (desc_act)")
    return blocks[:, 0]


def of_columns(index: Tensor | None, stored: Stored) -> Tensor:
    """(I,) int64, the stored group of each column; None: a group's columns are neighbours. Raises CheckpointError for a
    group that doesn't exist."""
    if index is None:
        return torch.arange(stored.columns) // (stored.group_size or stored.columns)
    check_index(index, stored.groups)
    return index.long()


def check_index(index: Tensor, groups: int) -> None:
    """Raises CheckpointError for a column of a group that doesn't exist."""
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        bad = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise CheckpointError(f"g_idx holds {bad}, there are groups 0 to {groups - 1}")


def check_shapes(found: Mapping[str, Any], wanted: Shapes, optional: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError where a tensor (or what else has its shape and dtype) is missing, of another shape, of a
    type that isn't among `wanted`'s, or has no place there."""
    for name, (shape, types) in wanted.items():
        if name not in found:
            if name in optional:
                continue
            raise CheckpointError(f"{name} is missing (shape {list(shape)})")
        if tuple(found[name].shape) != shape:
            raise CheckpointError(f"{name} has the shape {list(found[name].shape)}, expected {list(shape)}")
        if found[name].dtype not in types:
            names = " or ".join(map(_name, types))
            raise CheckpointError(f"{name} has the type {_name(found[name].dtype)}, expected {names}")
    if extra := [name for name in found if name not in wanted]:
        raise CheckpointError(f"{extra[0][:40]} has no place in this layout")


def two_dimensional(found: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The shape of a tensor. Raises CheckpointError where it is missing or no matrix."""
    if name not in found:
        raise CheckpointError(f"{name} is missing")
    shape = tuple(found[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{name} has the shape {list(shape)}, expected that of a matrix")
    return shape[0], shape[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- whole matrices ----------------------------------------------------------------------------------------------


def parts(stored: Stored) -> tuple[str, ...]:
    """The names of moai's tensors. Raises Unfit."""
    return ("qweight", "scales") if stored.spec.symmetric else ("qweight", "scales", "zeros")


def made(layout: Any, spec: Spec, out: int, columns: int) -> Layout:
    """{name: (shape, type)} of what a layout's module makes of a matrix (out, columns) of moai's."""
    shapes = layout.shapes(stored(spec).sized(out, columns)).items()
    return {name: (shape, types[0]) for name, (shape, types) in shapes if name in layout.MADE}
