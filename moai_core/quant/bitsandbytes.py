"""nf4 and bnb8 matrices multiplied by the bitsandbytes package, where it is installed.

nf4: its fused 4-bit product, which decodes in the kernel. bnb8: LLM.int8 (arXiv 2208.07339): inputs are rounded to int8
by row, but those columns whose largest magnitude is 6 or more are multiplied in 16 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from moai_core.quant import bnb
from moai_core.quant.formats import Spec

_FORMATS = ("nf4", "nf4_double", "bnb8")
_DEVICES = ("cuda", "cpu", "xpu")
# LLM.int8's outliers, the paper's threshold.
_THRESHOLD = 6.0


@cache
def _version() -> str | None:
    try:
        return version("bitsandbytes")
    except PackageNotFoundError:
        return None


@cache
def _package() -> Any:
    """bitsandbytes, without its advice to fetch a kernel from the hub."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        log.setLevel(level)
    return bitsandbytes


def why_not(spec: Spec, device: torch.device, dtype: torch.dtype) -> str | None:
    """See kernels.py."""
    if spec.format not in _FORMATS:
        return f"it multiplies {', '.join(_FORMATS)}, not {spec.format}"
    if _version() is None:
        return "the package bitsandbytes isn't installed (pip install 'moai[quant]')"
    if device.type not in _DEVICES:
        return f"it runs on {', '.join(_DEVICES)}, not on {device.type}"
    types = (torch.float16, torch.bfloat16) if spec.format == "bnb8" else (torch.float16, torch.bfloat16, torch.float32)
    if dtype not in types:
        return f"{spec.format} takes inputs of 16 bits there, not {str(dtype).removeprefix('torch.')}"
    return None


def describe(spec: Spec, device: torch.device, dtype: torch.dtype) -> str:
    """See kernels.py."""
    how = "LLM.int8, inputs rounded to int8" if spec.format == "bnb8" else str(dtype).removeprefix("torch.")
    return f"bitsandbytes {_version()} ({spec.format}, {how})"


def prepare(spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors and the tables that bitsandbytes keeps beside them."""
    prepared = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if spec.format != "bnb8":
        prepared["code"] = bnb.nf4_table(tensors["qweight"].device)
    if spec.format == "nf4_double":
        prepared["nested_code"] = bnb.dynamic_table().to(tensors["qweight"].device)
    return prepared


def linear(spec: Spec, prepared: Mapping[str, Tensor], x: Tensor, out: int) -> Tensor:
    """x (M, I) -> (M, O), in x's dtype."""
    package = _package()
    if spec.format == "bnb8":
        return _int8(prepared, x)
    # Made at each call: it carries the type of this call's result.
    state = quant_state(prepared, out, x.dtype)
    return package.matmul_4bit(x.contiguous(), prepared["qweight"].view(-1, 1), quant_state=state)


def quant_state(prepared: Mapping[str, Tensor], out: int, dtype: torch.dtype) -> Any:
    """bitsandbytes' description of an nf4 matrix with `out` rows whose products have the type `dtype`."""
    QuantState = _package().functional.QuantState
    absmax = prepared["absmax"].view(-1)
    nested = None
    if "nested_absmax" in prepared:
        nested = QuantState(
            absmax=prepared["nested_absmax"],
            code=prepared["nested_code"],
            blocksize=bnb.NESTED_BLOCK,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=absmax,
        shape=torch.Size((out, prepared["qweight"].numel() * 2 // out)),
        code=prepared["code"],
        blocksize=bnb.BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=prepared.get("nested_offset"),
        state2=nested,
    )


def _int8(prepared: Mapping[str, Tensor], x: Tensor) -> Tensor:
    codes, row_scales, outliers = _package().functional.int8_vectorwise_quant(
        x.to(torch.float16).contiguous(), threshold=_THRESHOLD
    )
    y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, codes, prepared["qweight"], row_scales, prepared["SCB"], outliers, None
    )
    return y.to(x.dtype)
