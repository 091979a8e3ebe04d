"""Position-wise feed-forward: SwiGLU (Shazeer, arXiv 2002.05202), names as in Jamba. A mixture of experts will stand
beside it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moai_core.model.configuration import MoaiMambaConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: MoaiMambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_residual = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, H) -> (B, L, H)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
