"""fp8 matrices on GPUs that multiply fp8 (compute capability 8.9 on: Ada, Hopper, Blackwell), by `torch._scaled_mm`.

The inputs are rounded to e4m3 at each call, with the largest magnitude of each row as its scale (scaled_mm_ops.py), and
both scales are applied to the sums. So rounding touches the activations too (about 2.5 % a number, averaged over a
row's sum), which the exact kernel (dequantize.py) doesn't do. torch's row-wise product gives bf16.

Who makes the inputs can round them in the same pass and hand over a `Quantized` in their place
(moai_core/model/fused_fp8.py); the result is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core.quant import scaled_mm_ops
from moai_core.quant.formats import Spec

_CAPABILITY = (8, 9)
# cuBLASLt and CUTLASS read rows of 16 bytes.
ALIGNED = 16


class Quantized(NamedTuple):
    """Inputs (..., I) that are e4m3 already: codes (M, I), scales (M, 1) fp32, the shape that they had, and the type
    that a product with them has."""

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype


def why_not(spec: Spec, device: torch.device, dtype: torch.dtype) -> str | None:
    """See kernels.py."""
    if spec.format != "fp8":
        return f"it multiplies fp8 matrices, not {spec.format}"
    if device.type != "cuda":
        return f"it needs a GPU with FP8 units (compute capability 8.9 or later), not {device.type}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA's FP8 units, this torch is built for AMD's"
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has no FP8 units (compute capability {found[0]}.{found[1]}, 8.9 is the first with them)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its results are bf16, too coarse for inputs of {str(dtype).removeprefix('torch.')}"
    return None


def describe(spec: Spec, device: torch.device, dtype: torch.dtype) -> str:
    """See kernels.py."""
    return f"scaled_mm ({spec.format} weights, inputs rounded to fp8 by row, torch._scaled_mm)"


def prepare(spec: Spec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """qweight (O, I) and scales (1, O), both padded with zeros to multiples of 16 where they aren't."""
    q, scales = tensors["qweight"], tensors["scales"]
    rows, columns = -q.shape[0] % ALIGNED, -q.shape[1] % ALIGNED
    if rows or columns:
        q = F.pad(q.view(torch.uint8), (0, columns, 0, rows)).view(q.dtype)
        scales = F.pad(scales, (0, 0, 0, rows))
    return q.contiguous(), scales.reshape(1, -1).contiguous()


def linear(spec: Spec, prepared: tuple[Tensor, Tensor], x: Tensor, out: int) -> Tensor:
    """x (M, I) -> (M, O), in x's dtype."""
    if columns := prepared[0].shape[1] - x.shape[1]:
        x = F.pad(x, (0, columns))
    codes, scales = scaled_mm_ops.quantize(x)
    return product(prepared, Quantized(codes, scales, x.shape, x.dtype), out)


def product(prepared: tuple[Tensor, Tensor], x: Quantized, out: int) -> Tensor:
    """(M, O) of inputs that are rounded already; I a multiple of 16."""
    q, scales = prepared
    y = torch._scaled_mm(
        x.codes, q.t(), scale_a=x.scales, scale_b=scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return (y[:, :out] if y.shape[1] != out else y).to(x.dtype)
