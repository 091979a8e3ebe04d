"""The scan of one token a row on NVIDIA GPUs, for generation: `cuda/step.cu` as a PyTorch operator.

bfloat16, float16 and float32 in and out, float32 states and arithmetic. Forward only: where gradients are needed the
scan over a chunk of one token gives them. Nothing waits for the GPU, so a CUDA graph can hold it.
"""

from __future__ import annotations

from torch import Tensor

from moai_core import cuda
from moai_core.cuda import ops
from moai_core.scan import reference
from moai_core.scan.cuda_conv import solid

STATES = (8, 16, 32, 64, 128)

_THREADS = 128  # as in step.cu
# Beyond as many threads as fill a large GPU a few times over, each takes several rows.
_ENOUGH_THREADS = 1 << 20


def step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.step`; N one of `STATES`. Has no gradient."""
    if u.numel() == 0:
        return reference.step(u, dt, A, B, C, D, z, dt_bias, state)
    dtype = u.dtype
    if any(x is not None and x.dtype != dtype for x in (dt, B, C, z)):  # rare: all in the one that loses nothing
        u, dt, B, C = (x.float() for x in (u, dt, B, C))
        z = None if z is None else z.float()
    D, dt_bias = (None if x is None else x.float() for x in (D, dt_bias))
    y, last = scan_step(u, dt, A.float(), B, C, D, z, dt_bias, state.float())
    return y.to(dtype), last


def _step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y (B, I), new state (B, I, N) fp32). u, dt, B, C and z in one dtype, the others fp32."""
    batch, channels = u.shape
    states = A.shape[1]
    y, last = ops.dense(u), ops.dense(state)
    u, dt, B, C = (_dense(x) for x in (u, dt, B, C))
    z = None if z is None else _dense(z)
    A, D, dt_bias, state = (solid(x) for x in (A, D, dt_bias, state))
    threads = channels * states // 4
    turns = min(batch, max(1, _ENOUGH_THREADS // threads), 65535)
    cuda.kernel("step.cu", "scan_step", u.device, T=cuda.TYPES[u.dtype], N=states)(
        (-(-threads // _THREADS), turns, 1), _THREADS, u, dt, A, B, C, D, z, dt_bias, state, y, last, batch, channels,
        *(0 if x is None else x.stride(0) for x in (u, dt, z, B, C)),
    )  # fmt: skip
    return y, last


def _dense(x: Tensor) -> Tensor:
    """x (B, width) whose rows are dense, wherever they begin."""
    return x if x.stride(-1) == 1 else x.contiguous()


scan_step = ops.define(
    "scan_step(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor state)"
    " -> (Tensor, Tensor)",
    _step,
    lambda u, dt, A, B, C, D, z, dt_bias, state: (ops.dense(u), ops.dense(state)),
)
