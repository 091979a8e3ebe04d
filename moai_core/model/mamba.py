"""The Mamba-1 mixer (Gu and Dao, arXiv 2312.00752, section 3), with Jamba's optional norms on dt, B and C (arXiv
2403.19887).

Letters: B batch, L tokens, H hidden, I inner width, N state, K convolution width, R time-step rank. dt, B, C, A_log,
D, z as in the paper. Every projection is called, never read through `.weight`, so that quantized and adapted layers
work in its place. The bias of dt is a parameter of its own, added inside the scan, and `dt_proj` is a plain matrix.
Given a `Recomputed` input, the mixer keeps for the backward pass only xz, x_proj's small results, the scan's states and
y; u and dt are made again (recompute.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moai_core import scan as kernels
from moai_core.model import fused, products
from moai_core.model.configuration import MoaiMambaConfig
from moai_core.model.norm import RMSNorm
from moai_core.model.products import Projected
from moai_core.model.recompute import Recomputed, call, repeatable, split_halves, tensor_of
from moai_core.quant.scaled_mm import Quantized
from moai_core.scan import cuda_conv

LayerState = tuple[Tensor, Tensor]

# The time step starts log-uniform in this range (paper, section 3.6), never below the floor.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


class MambaMixer(nn.Module):
    """H -> 2I, causal convolution, selective scan, gate, I -> H."""

    # The recurrence multiplies these thousands of times over; half precision would change the model.
    _FP32 = ("A_log", "D", "dt_bias")
    conv_scale: Tensor | None

    def __init__(self, config: MoaiMambaConfig) -> None:
        super().__init__()
        hidden, inner, state, rank = (
            config.hidden_size,
            config.inner_size,
            config.state_size,
            int(config.time_step_rank or 1),
        )
        self.split = [rank, state, state]
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel_size, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.norms, eps = config.dt_bc_norm, float(config.dt_bc_norm_eps or config.rms_norm_eps)
        if self.norms:
            self.dt_layernorm, self.b_layernorm, self.c_layernorm = (RMSNorm(n, eps) for n in self.split)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        # A quantized model may scale u after the convolution (moai_core/quantize/awq.py): powers of two, (I,). With
        # dt, B and C as they were the scan is linear in u, so y and the SSM state are scaled by the same vector.
        scaled = bool((config.quantization or {}).get("conv_scale"))
        self.register_buffer("conv_scale", torch.ones(inner) if scaled else None)
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        self.out_proj.writes_residual = True  # type: ignore[assignment]

    def forward(
        self,
        x: Tensor | Recomputed | Projected | Quantized,
        state: LayerState | None,
        seq_idx: Tensor | None,
        backend: str,
        onto: Tensor | None = None,
    ) -> tuple[Tensor | None, LayerState]:
        """x (B, L, H), or in_proj's result of it, state as in MoaiState.layers, seq_idx (B, L) int32 with padding (-1)
        only at the end of a row.

        Returns the output (B, L, H), or None where it was added `onto` a tensor (products.add_product), and the state
        after the last real token.
        """
        if state is not None and not torch.is_grad_enabled() and tensor_of(x).shape[1] == 1 and seq_idx is None:
            y, state = self._step(tensor_of(x), state, backend)
            return self._out(y, onto), state
        conv_state, ssm_state = state if state is not None else (None, None)
        keep = x.keep if isinstance(x, Projected) else not isinstance(x, Recomputed)
        xz = x.results[0] if isinstance(x, Projected) else call(self.in_proj, x)
        u, z, conv_state = self._conv(xz, conv_state, seq_idx, backend, keep=keep)
        u, dt, B, C = self._select(u, ssm_state, seq_idx, backend)
        options = {"state": ssm_state, "seq_idx": seq_idx, "backend": backend}
        y, ssm_state = call(kernels.scan, u, dt, self.A(), B, C, self.D, z, self.dt_bias, **options)
        return self._out(y, onto), (conv_state, ssm_state)

    def _out(self, y: Tensor, onto: Tensor | None) -> Tensor | None:
        if onto is None:
            return self.out_proj(y)  # type: ignore[no-any-return]
        products.add_product(onto, y, self.out_proj)
        return None

    def _step(self, x: Tensor, state: LayerState, backend: str) -> tuple[Tensor, LayerState]:
        u, z = self.in_proj(x[:, 0]).chunk(2, dim=-1)
        u, conv_state = kernels.conv_step(u, self.conv1d.weight, self.conv1d.bias, state[0], backend=backend)
        u = self._scaled(u)
        u, dt, B, C = self._select(u, state[1], None, backend)
        y, ssm_state = kernels.step(u, dt, self.A(), B, C, self.D, z, self.dt_bias, state[1], backend=backend)
        return y[:, None], (conv_state, ssm_state)

    def _conv(
        self, xz: Tensor, state: Tensor | None, seq_idx: Tensor | None, backend: str, *, keep: bool
    ) -> tuple[Tensor | Recomputed, Tensor, Tensor]:
        """The convolution's result u (B, L, I), the gate z, and the convolution's new state."""

        def run(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            # Weights are read from the module at each call: a sharded one has others in the backward pass.
            weight, bias = self.conv1d.weight, self.conv1d.bias
            y, new = kernels.conv(x, weight, bias, state=state, seq_idx=seq_idx, backend=backend)
            return self._scaled(y), new

        if torch.is_grad_enabled() and self._own_kernels("conv", xz, state, seq_idx, backend):
            weight, bias = self.conv1d.weight, self.conv1d.bias
            u, new, z = cuda_conv.conv_of_half(xz, weight, bias, state=state, seq_idx=seq_idx)
            u = self._scaled(u)
        else:
            x, z = split_halves(xz)
            u, new = run(x, state)
        if keep:
            return u, z, new
        x, state = xz.detach().chunk(2, dim=-1)[0], None if state is None else state.detach()
        return Recomputed(u, lambda: run(x, state)[0]), z, new

    def _own_kernels(self, op: str, x: Tensor, state: Tensor | None, seq_idx: Tensor | None, backend: str) -> bool:
        """Whether moai's CUDA kernels will do such a call."""
        if torch.compiler.is_compiling():
            return False
        (inner, states), width = self.A_log.shape, self.conv1d.weight.shape[-1]
        size = {"I": inner, "N": states} if op == "scan" else {"I": inner, "K": width}
        given = {"state": state is not None, "seq_idx": seq_idx is not None}
        return kernels.pick(x.device, x.dtype, backend=backend, op=op, **size, **given) is kernels.cuda

    def _scaled(self, u: Tensor) -> Tensor:
        return u if self.conv_scale is None else u * self.conv_scale.to(u.dtype)

    def _select(
        self, u: Tensor | Recomputed, state: Tensor | None, seq_idx: Tensor | None, backend: str
    ) -> tuple[Any, Any, Tensor, Tensor]:
        """u for the scan, and its input-dependent parameters: raw dt (..., I), made again if u is, B and C (..., N)."""
        raw = tensor_of(u)
        if products.fusable(raw, self.x_proj) and self._own_kernels("scan", raw, state, seq_idx, backend):
            # That scan returns the gradient of u as memory of its own.
            mixed, u = products.product_beside(u, self.x_proj)
        else:
            mixed = call(self.x_proj, u)
        if self.norms:
            weights: list[Tensor] = [norm.weight for norm in (self.dt_layernorm, self.b_layernorm, self.c_layernorm)]
            rank, B, C = fused.small_norms(mixed, weights, self.dt_layernorm.eps)
        else:
            rank, B, C = mixed.split(self.split, dim=-1)
        dt = self.dt_proj(rank)
        if isinstance(u, Recomputed) and repeatable(self.dt_proj):
            rank = rank.detach()
            dt = Recomputed(dt, lambda: self.dt_proj(rank))
        return u, dt, B, C

    def A(self) -> Tensor:
        """(I, N) fp32, negative."""
        return -torch.exp(self.A_log)

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts like any module, but never takes A_log, D and dt_bias below fp32."""
        before = {name: getattr(self, name).data for name in self._FP32}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype in (torch.bfloat16, torch.float16):
                new.data = old.to(device=new.device, dtype=torch.float32)
        return self


def dt_bias_init(size: int, device: torch.device) -> Tensor:
    """(size,) fp32 with softplus(dt_bias) log-uniform in [DT_MIN, DT_MAX]."""
    dt = torch.exp(torch.rand(size, device=device) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN)).clamp(
        min=DT_FLOOR
    )
    # The inverse of softplus, in the form that stays exact for small dt: log(e^dt - 1) = dt + log(1 - e^-dt).
    return dt + torch.log(-torch.expm1(-dt))
