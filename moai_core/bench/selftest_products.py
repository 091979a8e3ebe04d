"""The part of `moai doctor` about quantized matrices: who multiplies with each format here, and whether the numbers are
right.

Every format gets a random matrix with an odd number of rows, and few and many rows of inputs; the result is compared
with float64 arithmetic on the stored values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from moai_core.quant import kernels
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quant.linear import QuantLinear

Finding = dict[str, Any]
OUT, COLUMNS, ROWS = 131, 512, (1, 5, 70)
# Relative norm error that is allowed: the rounding of the inputs' type, and what a kernel rounds by design (fp8 and
# LLM.int8 round the activations to 8 bits).
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 3e-3}
ROUGH, COARSE = ("scaled_mm", "bitsandbytes"), 6e-2
_GROUPED = ("int4",)


def products(name: str, seed: int) -> Iterator[Finding]:
    """Every format on a device: the kernel that multiplies, what it says of itself, why those before it don't, and its
    relative norm error `forward` against float64."""
    where = torch.device(name)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    for format in FORMATS:
        spec = Spec(format, 128 if format in _GROUPED else 0)
        reasons = dict(kernels.explain(spec, where, dtype))
        kernel = next(kernel for kernel, reason in reasons.items() if reason is None)
        allowed = COARSE if kernel in ROUGH else TOLERANCE[dtype]
        error, why = _error(spec, where, dtype, seed)
        yield {
            "device": name,
            "dtype": str(dtype).removeprefix("torch."),
            "operation": f"product {format}",
            "format": format,
            "backend": kernel,
            "description": kernels.describe(spec, where, dtype),
            "why_not": {k: reason for k, reason in reasons.items() if reason},
            "forward": error,
            "tolerance": allowed,
            "ok": why is None and error <= allowed,
            "why": why,
        }


def _error(spec: Spec, where: torch.device, dtype: torch.dtype, seed: int) -> tuple[float, str | None]:
    random = torch.Generator().manual_seed(seed)
    try:
        tensors = FORMATS[spec.format].encode(spec, torch.randn(OUT, COLUMNS, generator=random) * 0.05)
        weight = decode(spec, tensors).double()
        layer = QuantLinear(COLUMNS, OUT, spec)
        layer.load_state_dict(tensors)
        layer.to(where)
        worst = 0.0
        for rows in ROWS:
            x = torch.randn(rows, COLUMNS, generator=random).to(dtype)
            got, want = layer(x.to(where)).double().cpu(), x.double() @ weight.T
            error = float((got - want).norm() / want.norm())
            worst = max(worst, error if error == error else math.inf)  # a NaN is no number to compare
        return worst, None
    except Exception as exc:
        # A kernel that can't even run is what this command is there to find.
        return math.inf, f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
