"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), computed in fp32 whatever the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moai_core.model import fused


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis; returns the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) in any floating dtype."""
        return fused.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
