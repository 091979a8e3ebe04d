"""Adapter to the CUDA kernels of the packages mamba_ssm and causal_conv1d, when they are installed.

Why: until a kernel of moai's own covers a GPU, theirs is the fastest Mamba-1 scan there is. A whole chunk starts from a
zero state there and knows no packed documents, so such calls are refused with the reason and go to another backend; one
token at a time takes a state. Leaves out the gradient of the final state, which theirs ignores: it is returned
detached.

Source: mamba_ssm 2.3 `ops/selective_scan_interface.py` and `ops/triton/selective_state_update.py`, causal_conv1d 1.7
`causal_conv1d_interface.py`. Their layout is channel-first, (B, I, L).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# What an operation needs: the module that holds the function, its name, and the compiled module below it, if any.
_NEEDS = {
    "scan": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "selective_scan_cuda"),
    "step": ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update", None),
    "conv": ("causal_conv1d", "causal_conv1d_fn", "causal_conv1d_cuda"),
    "conv_step": ("causal_conv1d", "causal_conv1d_update", "causal_conv1d_cuda"),
}


def why_not(
    device: torch.device,
    dtype: torch.dtype,
    *,
    op: str = "scan",
    I: int = 64,
    N: int = 16,
    K: int = 4,
    state: bool = False,
    seq_idx: bool = False,
) -> str | None:
    """Why these packages can't do such a call, or None; what the call needs comes before what isn't installed."""
    if device.type != "cuda":
        return f"it runs on CUDA only, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes float32, bfloat16 and float16, not {dtype}"
    if op in ("scan", "step") and N > 256:
        return f"its kernel holds at most 256 states a channel (this model has {N})"
    if op in ("conv", "conv_step") and not 2 <= K <= 4:
        return f"its convolution is 2 to 4 wide (this model's is {K})"
    if op in ("scan", "conv") and seq_idx:
        return "it can't begin anew inside a row, which packed documents and padding need"
    if op in ("scan", "conv") and state:
        return "it starts every chunk from a zero state, and this call continues one"
    return _missing(op)


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.scan`; the state returned is detached."""
    assert state is None and seq_idx is None, "refused by why_not"
    turned = [None if x is None else x.to(u.dtype).transpose(1, 2) for x in (u, dt, B, C, z)]
    u_, dt_, B_, C_, z_ = turned
    y, last = _function("scan")(
        u_, dt_, A, B_, C_, D, z=z_, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    return y.transpose(1, 2), last.detach().float()


def conv(
    u: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.conv`."""
    assert state is None and seq_idx is None, "refused by why_not"
    past, length = weight.shape[-1] - 1, u.shape[1]
    y = _function("conv")(
        u.transpose(1, 2), weight[:, 0].to(u.dtype), None if bias is None else bias.to(u.dtype), activation="silu"
    )
    last = torch.nn.functional.pad(u[:, max(0, length - past) :].transpose(1, 2), (max(0, past - length), 0))
    return y.transpose(1, 2), last


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
    """See `moai_core.scan.step`."""
    state = state.clone()  # theirs writes into it
    y = _function("step")(state, u, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=True)
    return y.to(u.dtype), state


def conv_step(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `moai_core.scan.conv_step`."""
    state = state.to(u.dtype, copy=True)  # theirs writes into it
    bias = None if bias is None else bias.to(u.dtype)
    return _function("conv_step")(u, state, weight[:, 0].to(u.dtype), bias, activation="silu"), state


@cache
def _missing(op: str) -> str | None:
    module, function, compiled = _NEEDS[op]
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} isn't installed (pip install 'moai[cuda]')"
    if compiled and importlib.util.find_spec(compiled) is None:
        return (
            f"the installed {package} was built without its CUDA kernel ({compiled}); since July 2026 a default "
            "install of mamba_ssm leaves it out: set MAMBA_KEEP_CUDA_BUILD=TRUE and install it again"
        )
    try:
        getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        return f"{package} can't be imported ({error})"
    return None


@cache
def _function(op: str) -> Callable[..., Any]:
    module, function, _ = _NEEDS[op]
    return getattr(importlib.import_module(module), function)
