"""The numbers of bitsandbytes, as plain tensors: nf4 (4-bit NormalFloat) and bnb8 (the rows of LLM.int8).

A matrix W (O, I) is stored as

    nf4         qweight uint8 (O, I/2), the even column in the HIGH half; absmax fp32 (O, I/64).
                                                            Value: TABLE[q] * absmax of its block of 64
    nf4_double  qweight likewise; absmax uint8 (O, I/64) that are themselves quantized in blocks of 256 over all rows:
                nested_absmax fp32 (ceil(O*I/64 / 256)), nested_offset fp32 ().
                                                            absmax = DYNAMIC[absmax] * nested_absmax + nested_offset
    bnb8        qweight int8 (O, I), SCB fp32 (O).          Value: q * SCB / 127

These are what `Linear4bit` and `Linear8bitLt` keep, without the JSON and the tables that bitsandbytes stores beside
them: both are constants. Encoding and decoding are our own, so that such models are made and read where bitsandbytes
is not installed; bitsandbytes.py multiplies with it. Left out: bitsandbytes' fp4, other block sizes.
Sources: QLoRA, arXiv 2305.14314 (nf4, double quantization); LLM.int8(), arXiv 2208.07339; 8-bit Optimizers via
Block-wise Quantization, arXiv 2110.02861 (the dynamic table).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from moai_core.errors import UsageError
from moai_core.quant.formats import Layout, Spec
from moai_core.quant.fp8 import finite, plain

BLOCK, NESTED_BLOCK = 64, 256
# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: 8 negative numbers, 8 from 0 on.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_TINY = 1e-38


@cache
def dynamic_table() -> Tensor:
    """(256,) fp32, ascending: bitsandbytes' signed "dynamic" numbers. The leading zero bits of a code choose a power of
    ten, the rest a fraction: 2^i fractions, midpoints of equal parts of [0.1, 1], with 10^(i - 6)."""
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        found += [sign * value for value in (10.0 ** (i - 6) * middles).tolist() for sign in (1, -1)]
    return torch.tensor(sorted(found))


def nf4_table(device: torch.device) -> Tensor:
    """(16,) fp32, ascending."""
    return torch.tensor(NF4, device=device)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8 indices of the numbers of an ascending table that are nearest to `values`; in the middle the lower one."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2).to(torch.uint8)


class Nf4:
    """4-bit NormalFloat in blocks of 64."""

    name, bits, by_rows = "nf4", 4, True

    def check(self, spec: Spec, out: int, columns: int) -> None:
        """See formats.Format."""
        plain(spec, f"blocks of {BLOCK}")
        if columns % BLOCK:
            raise UsageError(f"{self.name}'s blocks of {BLOCK} don't divide {columns} columns")

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        """See formats.Format."""
        return {
            "qweight": ((out, columns // 2), torch.uint8),
            "absmax": ((out, columns // BLOCK), torch.float32),
        }

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        """The largest magnitude of each block becomes 1 or -1."""
        weight = finite(weight)
        return self.encode_with(spec, weight, _blocks(weight).abs().amax(-1))

    def encode_with(self, spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest codes under given block scales (O, I/64)."""
        assert zeros is None, "nf4 has no zero points"
        codes = self._codes(weight, scales.float())
        return {"qweight": (codes[:, 0::2] << 4) | codes[:, 1::2], "absmax": scales.float()}

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        """See formats.Format."""
        packed = tensors["qweight"]
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)
        return (_blocks(nf4_table(packed.device)[codes.int()]) * self.scales(tensors)[..., None]).flatten(1)

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(O, I/64) fp32."""
        return tensors["absmax"]

    def _codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        # A product with the inverse, as bitsandbytes has it: a division would round some codes elsewhere.
        scaled = _blocks(weight.float()) * (1.0 / scales.clamp(min=_TINY))[..., None]
        return nearest(scaled.clamp(-1, 1), nf4_table(weight.device)).flatten(1)


class Nf4Double(Nf4):
    """nf4 whose block scales are stored in 8 bits."""

    name = "nf4_double"
    # Blocks of scales run over the rows' ends: a row alone can't be decoded, so an embedding can't be stored so.
    by_rows = False

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        """See formats.Format."""
        count = out * (columns // BLOCK)
        return {
            "qweight": ((out, columns // 2), torch.uint8),
            "absmax": ((out, columns // BLOCK), torch.uint8),
            "nested_absmax": ((-(-count // NESTED_BLOCK),), torch.float32),
            "nested_offset": ((), torch.float32),
        }

    def encode_with(self, spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """The codes are those under the exact scales, as in bitsandbytes; the scales are rounded afterwards."""
        plain = super().encode_with(spec, weight, scales, zeros)
        offset = scales.float().mean()
        flat = scales.float().flatten() - offset
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        largest = padded.abs().amax(-1)
        scaled = (padded * (1.0 / largest.clamp(min=_TINY))[:, None]).clamp(-1, 1)
        codes = nearest(scaled, dynamic_table().to(scaled.device)).flatten()[: len(flat)]
        return {
            "qweight": plain["qweight"],
            "absmax": codes.view(scales.shape),
            "nested_absmax": largest,
            "nested_offset": offset,
        }

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(O, I/64) fp32."""
        codes = tensors["absmax"]
        nested = tensors["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: codes.numel()].view(codes.shape)
        return dynamic_table().to(codes.device)[codes.int()] * nested + tensors["nested_offset"]


class Bnb8:
    """8-bit integers by row."""

    name, bits, by_rows = "bnb8", 8, True

    def check(self, spec: Spec, out: int, columns: int) -> None:
        """See formats.Format."""
        plain(spec, "one scale a row")

    def tensors(self, spec: Spec, out: int, columns: int) -> Layout:
        """See formats.Format."""
        return {"qweight": ((out, columns), torch.int8), "SCB": ((out,), torch.float32)}

    def encode(self, spec: Spec, weight: Tensor) -> dict[str, Tensor]:
        """The largest magnitude of each row becomes 127."""
        weight = finite(weight)
        return self.encode_with(spec, weight, weight.abs().amax(-1))

    def encode_with(self, spec: Spec, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest codes under given largest magnitudes of the rows, (O,) or (O, 1)."""
        assert zeros is None, "bnb8 has no zero points"
        scb = scales.float().reshape(-1)
        inverse = torch.where(scb > _TINY, 127.0 / scb, 0.0)
        q = torch.round(weight.float() * inverse[:, None]).clamp(-127, 127).to(torch.int8)
        return {"qweight": q, "SCB": scb}

    def decode(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
        """See formats.Format."""
        # bitsandbytes multiplies with this constant, too.
        return tensors["qweight"].float() * tensors["SCB"][:, None] * (1.0 / 127.0)


def _blocks(values: Tensor) -> Tensor:
    """(O, I) -> (O, I/64, 64)."""
    return values.reshape(values.shape[0], -1, BLOCK)
