"""The exact multiplication: the stored values as numbers of x's type, then an ordinary matrix product.

It works for every format on every device and is what the others are compared with. It is slow where one token is
decoded (every weight is written out and read again), so nobody gets it without being told (kernels.describe).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core.quant.formats import Spec, decode


def why_not(spec: Spec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Never refuses."""
    return None


def describe(spec: Spec, device: torch.device, dtype: torch.dtype) -> str:
    """For `doctor` and reports."""
    return f"exact: {spec.format} decoded at each call, then a product in {str(dtype).removeprefix('torch.')}"


def prepare(spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are."""
    return dict(tensors)


def linear(spec: Spec, prepared: Mapping[str, Tensor], x: Tensor, out: int) -> Tensor:
    """x (M, I) -> (M, O), in x's dtype."""
    return F.linear(x, decode(spec, prepared).to(x.dtype))
