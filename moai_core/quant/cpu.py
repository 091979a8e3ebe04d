"""Products with int4 and int8 matrices on processors: moai's own kernels (cpu_kernels.py).

Precision: the activations of each group of (at most) 128 columns are rounded to 16-bit integers; everything after that
is exact but for the sum over groups in fp32. Against a product in float64 with the stored weights that is a relative
error of about 2.5e-5 for normally distributed inputs, at most 1e-4 whatever they are; bf16 inputs lose 60 times as much
by being bf16. A row's result is the same bits whatever rows stand beside it and for any number of threads.

Speed: one to a few rows at the speed of reading the weights (vpdpbusd and its relatives on x86, sdot on Arm), many by
the matrix unit of processors that have AMX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import cpu
from moai_core.cpu.program import Operation
from moai_core.quant.formats import Spec, unpack4

_KERNELS = "moai_core.quant.cpu_kernels"
_BLOCK = _TILE = 16
_ALIGNED = 64
_MANY = 16  # rows from which the matrix unit is faster (measured)
_TALLEST, _SECOND_CACHE = 256, 1 << 20  # rows at a time, and the bytes that their integers may take


class Prepared(NamedTuple):
    """Weights in the kernels' order. I is what the rows were padded to, a multiple of the group A."""

    weights: Tensor  # uint8, (O / 16, I / A, bytes)
    scales: Tensor  # fp16, (O / 16, I / A, 16)
    zeros: Tensor | None
    group: int


def why_not(spec: Spec, device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence, or None if inputs of this type can be multiplied there."""
    if device.type != "cpu":
        return f"it runs on the CPU only, not on {device.type}"
    if spec.format not in ("int4", "int8"):
        return f"it multiplies int4 and int8, not {spec.format}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it rounds inputs to 16 bits, and {dtype} would lose precision"
    return cpu.problem() or _processor_problem()


def describe(spec: Spec, device: torch.device, dtype: torch.dtype) -> str:
    """For `doctor` and reports."""
    found = _instructions()
    unit = " and AMX" if found.amx() is None else ""
    return f"cpu ({spec.format}, activations in 16-bit integers, {found.DOT}{unit})"


def prepare(spec: Spec, tensors: Mapping[str, Tensor]) -> Prepared:
    """A copy of the weights in blocks of 16 rows; as large as what is stored, and for whole rows as groups a little
    larger."""
    kernels = cpu.load(_KERNELS)
    int4 = spec.format == "int4"
    scales, zeros = tensors["scales"], tensors.get("zeros")
    codes = unpack4(tensors["qweight"]) if int4 else tensors["qweight"]
    columns = codes.shape[1]
    width = columns // scales.shape[1]
    group = next((a for a in (128, 64, 32) if width % a == 0), 32)
    padded = -(-columns // group) * group
    zero = kernels.ZERO4 if int4 else kernels.ZERO8
    codes = codes if int4 else (codes.view(torch.uint8) ^ zero)  # q + 128 turns the highest bit over
    repeats = padded // group // scales.shape[1]
    return Prepared(
        _blocks_of_codes(codes, padded, group, zero, 4 if int4 else 8),
        _blocks_of_scales(scales, repeats),
        None if zeros is None else _blocks_of_scales(zeros, repeats),
        group,
    )


def linear(spec: Spec, prepared: Prepared, x: Tensor, out: int) -> Tensor:
    """x (M, I) -> (M, O), in x's dtype."""
    y = torch.empty(x.shape[0], out)
    if y.numel() == 0:
        return y.to(x.dtype)
    x_ = x.to(torch.float32)
    x_ = x_ if x_.stride(1) == 1 else x_.contiguous()
    integers = Integers(prepared, x.shape[0], x.shape[1])
    for operation in (integers.made_of(x_), integers.times(prepared, y)):
        cpu.run(operation.module, operation.kernel, operation.items, operation.work, *operation.slots)
    return y.to(x.dtype)


class Integers:
    """Room for rows (M, I) as 16-bit integers, for weights that have the same groups; and the operations that fill it
    and multiply with it. They hold addresses: whoever runs them keeps this object and the tensors."""

    def __init__(self, prepared: Prepared, rows: int, columns: int) -> None:
        self.rows, self.columns, self.group = rows, columns, prepared.group
        self.groups = prepared.weights.shape[1]
        # Four-byte columns times a row of 16 tell int8 from int4.
        self.bits = prepared.weights.shape[2] // (2 * self.group)
        self.pitch = self.groups * self.group + _ALIGNED
        self.tiled = rows >= _MANY and _instructions().amx() is None
        height = -(-rows // _TILE) * _TILE if self.tiled else rows  # tiles are read whole
        self.integers = torch.empty(2, height, self.pitch, dtype=torch.int8)
        self.numbers = torch.empty(3, height, self.groups)
        self.plane = height * self.pitch

    def _numbers(self) -> tuple[int, int, int]:
        """Addresses of steps, offsets and sums."""
        first, size = self.numbers.data_ptr(), 4 * self.numbers[0].numel()
        return first, first + size, first + 2 * size

    def made_of(self, x: Tensor) -> Operation:
        """x (M, I) fp32 with adjacent columns."""
        high, kernels = self.integers.data_ptr(), cpu.load(_KERNELS)
        zero = kernels.ZERO4 if self.bits == 4 else kernels.ZERO8
        slots = (
            self.columns, self.groups, self.group, x.data_ptr(), 4 * x.stride(0), high, high + self.plane, self.pitch,
            *self._numbers(), zero,
        )  # fmt: skip
        return Operation(_KERNELS, "quantize", self.rows, 4 * self.rows * self.columns, slots)

    def times(self, prepared: Prepared, y: Tensor) -> Operation:
        """y (M, O) fp32 with adjacent columns is what is written."""
        weights, scales, zeros, group = prepared
        blocks, out = weights.shape[0], y.shape[1]
        if self.tiled:
            height = max(_TILE, min(_TALLEST, _SECOND_CACHE // (2 * self.pitch) // _TILE * _TILE))
            at_a_time = min(height, -(-self.rows // _TILE) * _TILE)
            items = -(-self.rows // at_a_time) * -(-blocks // 2)
        else:
            at_a_time = max(1, min(8, blocks // 32))
            items = -(-blocks // at_a_time)
        slots = (
            self.rows, out, self.groups, group, at_a_time, self.bits,
            weights.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
            self.integers.data_ptr(), self.plane, self.pitch, *self._numbers(), y.data_ptr(), 4 * y.stride(0),
        )  # fmt: skip
        work = self.rows * blocks * self.columns
        return Operation(_KERNELS, "tiles" if self.tiled else "rows", items, work, slots)


def _blocks_of_codes(codes: Tensor, padded: int, group: int, zero: int, bits: int) -> Tensor:
    """uint8 (O, I) -> (O / 16, G, bytes): four columns of 16 rows side by side; of int4 the next four in the high
    halves."""
    rows, columns = codes.shape
    blocks, parts = -(-rows // _BLOCK), 8 // bits
    made = torch.empty(blocks, padded // group, 2 * bits * group, dtype=torch.uint8)
    step = max(1, (1 << 24) // (padded * _BLOCK))  # blocks at a time: little memory beside the result
    for begin in range(0, blocks, step):
        some = codes[begin * _BLOCK : (begin + step) * _BLOCK]
        missing = -some.shape[0] % _BLOCK
        some = F.pad(some, (0, padded - columns, 0, missing), value=zero)
        some = some.view(-1, _BLOCK, padded // group, group // 4 // parts, parts, 4).permute(0, 2, 3, 4, 1, 5)
        some = some[:, :, :, 0] | (some[:, :, :, 1] << 4) if parts == 2 else some[:, :, :, 0]
        made[begin : begin + step] = some.reshape(some.shape[0], padded // group, -1)
    return made


def _blocks_of_scales(scales: Tensor, repeats: int) -> Tensor:
    """fp16 (O, groups) -> (O / 16, groups * repeats, 16)."""
    scales = F.pad(scales, (0, 0, 0, -scales.shape[0] % _BLOCK))
    scales = scales.view(-1, _BLOCK, scales.shape[1]).transpose(1, 2)
    return scales.repeat_interleave(repeats, 1).contiguous()


def _instructions() -> Any:
    return cpu.load("moai_core.cpu.instructions")


def _processor_problem() -> str | None:
    """What the kernels need beyond numba."""
    found = _instructions()
    if found.DOT == "generic" and found.X86:
        return "the processor has no AVX2"
    return None
