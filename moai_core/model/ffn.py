"""Position-wise feed-forward: SwiGLU (Shazeer, arXiv 2002.05202), names as in Jamba. A mixture of experts will stand
beside it.
"""

from __future__ import annotations

from torch import Tensor, nn

from moai_core.model import fused, fused_fp8, products
from moai_core.model.configuration import MoaiMambaConfig
from moai_core.model.products import Projected
from moai_core.model.recompute import Recomputed, call, tensor_of
from moai_core.quant.scaled_mm import Quantized


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: MoaiMambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_residual = True  # type: ignore[assignment]

    def forward(self, x: Tensor | Recomputed | Projected | Quantized, onto: Tensor | None = None) -> Tensor | None:
        """x (B, L, H), or gate and up made of it -> (B, L, H), or None where that was added `onto` a tensor
        (products.add_product). Given a `Recomputed`, keeps only gate and up for the backward pass.
        """
        if isinstance(x, Projected):
            gate, up = x.results
            if products.fusable(gate, self.down_proj):
                return products.swiglu_product(gate, up, self.down_proj, x.keep)
        else:
            gate, up = call(self.gate_proj, x), call(self.up_proj, x)
        if fused_fp8.ready((self.down_proj,), gate, up):
            return self.down_proj(fused_fp8.swiglu(gate, up))
        product: Tensor | Recomputed = fused.swiglu(gate, up)
        if onto is not None:
            products.add_product(onto, tensor_of(product), self.down_proj)
            return None
        if isinstance(x, Recomputed) or (isinstance(x, Projected) and not x.keep):
            gate, up = gate.detach(), up.detach()
            product = Recomputed(tensor_of(product), lambda: fused.swiglu(gate, up))
        return call(self.down_proj, product)
