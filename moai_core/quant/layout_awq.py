"""The layout of AWQ checkpoints ("GEMM"), as autoawq, GPTQModel and transformers keep them. Of a matrix W (O, I):

    qweight int32 (I, O/8)      4-bit codes, eight outputs in one number
    qzeros  int32 (G, O/8)      zero points, likewise
    scales  fp16 (G, O)

The eight outputs 0..7 stand in the order 0 2 4 6 1 3 5 7 from the lowest bits up. There are always zero points: what
moai stores symmetrically gets 8 everywhere, and comes back with zero points, the same numbers. Left out: the orders of
other kernels (gemv, gemv_fast, exllama, marlin).
Source: autoawq 0.2.9 (modules/linear/gemm.py), GPTQModel 7.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import packing
from moai_core.quant.formats import Spec
from moai_core.quant.packing import Stored, Tensors

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BACK = tuple(ORDER.index(i) for i in range(8))
BITS = 4
MULTIPLE = 32


# ---- config ------------------------------------------------------------------------------------------------------


def read_config(values: Mapping[str, Any]) -> Stored:
    """Of config.json's quantization_config, or of autoawq's quant_config.json. Raises CheckpointError for what can't be
    read."""
    bits = packing.integer(values, "bits", "w_bit", default=BITS)
    if bits != BITS:
        raise CheckpointError(f"bits is {bits}, only 4 can be read")
    version = values.get("version") or values.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(f"version is {str(version)[:40]!r}, only 'gemm' can be read")
    return Stored(BITS, packing.group_size(values, "group_size", "q_group_size"), symmetric=False)


def write_config(spec: Spec) -> dict[str, Any]:
    """What config.json says of matrices of this format."""
    return {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": spec.group_size or -1,
        "zero_point": True,
        "version": "gemm",
    }


# ---- shapes ------------------------------------------------------------------------------------------------------


def fits(spec: Spec, out: int, columns: int) -> str | None:
    """See packing.py."""
    if spec.format != "int4":
        return f"AWQ has 4 bits, not {spec.format}"
    if out % MULTIPLE or columns % MULTIPLE:
        return f"AWQ's readers take rows and columns in multiples of {MULTIPLE}"
    return None


def size(found: Mapping[str, Any], stored: Stored) -> Stored:
    """See packing.py. found: the tensors, or what else has their shapes."""
    columns, packed = packing.two_dimensional(found, "qweight")
    return stored.sized(packed * 8, columns)


def shapes(stored: Stored) -> packing.Shapes:
    """See packing.py. Raises CheckpointError for groups that don't divide the columns."""
    return {
        "qweight": ((stored.columns, stored.out // 8), (torch.int32,)),
        "qzeros": ((stored.groups, stored.out // 8), (torch.int32,)),
        "scales": ((stored.groups, stored.out), packing.FLOATS),
    }


OPTIONAL: tuple[str, ...] = ()


# ---- out of moai's tensors ---------------------------------------------------------------------------------------


def _pack(found: Tensor) -> Tensor:
    """(R, O) -> (R, O/8) int32."""
    return packing.pack(found.reshape(len(found), -1, 8)[..., ORDER].flatten(1), BITS)


def _unpack(packed: Tensor) -> Tensor:
    """(R, O/8) int32 -> (R, O) uint8."""
    return packing.unpack(packed, BITS).view(len(packed), -1, 8)[..., _BACK].flatten(1)


def _made_qweight(tensors: Tensors, spec: Spec) -> Tensor:
    return _pack(packing.codes(tensors, _int4(spec)).T)


def _made_qzeros(tensors: Tensors, spec: Spec) -> Tensor:
    return _pack(packing.zeros(tensors, _int4(spec)).T)


def _made_scales(tensors: Tensors, spec: Spec) -> Tensor:
    return tensors["scales"].T.contiguous()


def _int4(spec: Spec) -> Spec:
    if spec.format != "int4":
        raise UsageError(f"AWQ has 4 bits, {spec.format} can't be stored so")
    return spec


MADE = {"qweight": _made_qweight, "qzeros": _made_qzeros, "scales": _made_scales}


# ---- into moai's tensors -----------------------------------------------------------------------------------------


def _qweight(tensors: Tensors, stored: Stored) -> Tensor:
    return packing.qweight(_unpack(tensors["qweight"]).T, stored.spec)


def _scales(tensors: Tensors, stored: Stored) -> Tensor:
    return packing.half(tensors["scales"].T.contiguous())


def _points(tensors: Tensors, stored: Stored) -> Tensor:
    return _unpack(tensors["qzeros"]).T.to(torch.float16).contiguous()


PARTS = {"qweight": _qweight, "scales": _scales, "zeros": _points}


def decode(tensors: Tensors, stored: Stored) -> Tensor:
    """(O, I) fp32, exactly the stored values; `stored` is `size`'s. Raises CheckpointError."""
    q = _unpack(tensors["qweight"]).T.float().reshape(stored.out, stored.groups, -1)
    scales = packing.numbers(tensors["scales"]).T
    return q.sub_(_unpack(tensors["qzeros"]).T.float()[..., None]).mul_(scales[..., None]).flatten(1)
