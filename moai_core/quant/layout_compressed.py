"""The layout `pack-quantized` of compressed-tensors, which llm-compressor writes and vLLM reads. Of a matrix W (O, I):

    weight_packed     int32 (O, I/8)    codes of 4 bits, eight columns in one number, the first in the lowest bits;
                                        8 bits: four. A last number that isn't full is filled with zeros
    weight_scale      (O, G)            fp16, bf16 or fp32
    weight_shape      int64 (2)         O and I
    weight_zero_point int32 (O/8, G)    where zero points are asymmetric: eight rows in one number
    weight_g_idx      int32 (I)         the group of each column, where they are no neighbours

compressed-tensors counts codes and zero points from -8 to 7 (-128 to 127) and packs them plus 8 (128): what is packed
are moai's codes. Left out: its other formats, several layouts in one file, activations that are quantized as well.
Source: compressed-tensors 0.19 (compressors/pack_quantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moai_core.errors import CheckpointError
from moai_core.quant import packing
from moai_core.quant.formats import Spec
from moai_core.quant.packing import Stored, Tensors

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
_STRATEGIES = ("group", "channel")


# ---- config ------------------------------------------------------------------------------------------------------


def read_config(values: Mapping[str, Any]) -> Stored:
    """Of the `weights` of one of quantization_config's config_groups. Raises CheckpointError for what can't be read."""
    bits, kind = packing.integer(values, "num_bits"), values.get("type", "int")
    if bits not in packing.WIDTHS or kind != "int":
        raise CheckpointError(f"weights of {bits} bits and type {str(kind)[:20]!r}; integers of 4 and 8 can be read")
    strategy = values.get("strategy")
    if strategy not in _STRATEGIES:
        raise CheckpointError(f"strategy is {str(strategy)[:40]!r}, {' and '.join(_STRATEGIES)} can be read")
    size = packing.group_size(values, "group_size") if strategy == "group" else 0
    return Stored(bits, size, packing.flag(values, "symmetric", True))


def write_config(spec: Spec) -> dict[str, Any]:
    """The `weights` of a config group."""
    made = packing.stored(spec)
    return {
        "num_bits": made.bits,
        "type": "int",
        "symmetric": made.symmetric,
        "strategy": "group" if made.group_size else "channel",
        "group_size": made.group_size or None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


# ---- shapes ------------------------------------------------------------------------------------------------------


def fits(spec: Spec, out: int, columns: int) -> str | None:
    """See packing.py: it stores every shape."""
    return None


def size(found: Mapping[str, Any], stored: Stored) -> Stored:
    """See packing.py. found: the tensors; of weight_shape the numbers are read."""
    out, words = packing.two_dimensional(found, "weight_packed")
    if "weight_shape" not in found:
        raise CheckpointError("weight_shape is missing (shape [2])")
    shape = found["weight_shape"]
    if tuple(shape.shape) != (2,) or shape.dtype.is_floating_point:
        raise CheckpointError(f"weight_shape has the shape {list(shape.shape)}, expected two whole numbers")
    said, per = shape.tolist(), 32 // stored.bits
    if said[0] != out or not (words - 1) * per < said[1] <= words * per:
        raise CheckpointError(f"weight_shape is {said}, weight_packed has the shape {[out, words]}")
    return stored.sized(out, said[1])


def shapes(stored: Stored) -> packing.Shapes:
    """See packing.py. Raises CheckpointError for groups that don't divide the columns."""
    per = 32 // stored.bits
    wanted: dict[str, Any] = {
        "weight_packed": ((stored.out, -(-stored.columns // per)), (torch.int32,)),
        "weight_scale": ((stored.out, stored.groups), packing.FLOATS),
        "weight_shape": ((2,), (torch.int64, torch.int32)),
    }
    if not stored.symmetric:
        wanted["weight_zero_point"] = ((-(-stored.out // per), stored.groups), (torch.int32,))
    return {**wanted, "weight_g_idx": ((stored.columns,), (torch.int32, torch.int64))}


OPTIONAL = ("weight_g_idx",)


# ---- out of moai's tensors ---------------------------------------------------------------------------------------


def _made_packed(tensors: Tensors, spec: Spec) -> Tensor:
    return packing.pack(packing.codes(tensors, spec), packing.stored(spec).bits)


def _made_scale(tensors: Tensors, spec: Spec) -> Tensor:
    return tensors["scales"]


def _made_shape(tensors: Tensors, spec: Spec) -> Tensor:
    q = tensors["qweight"]
    return torch.tensor([q.shape[0], q.shape[1] * (2 if spec.format == "int4" else 1)])


def _made_zero_point(tensors: Tensors, spec: Spec) -> Tensor:
    return packing.pack(packing.zeros(tensors, spec).T, packing.stored(spec).bits).T.contiguous()


MADE = {
    "weight_packed": _made_packed,
    "weight_scale": _made_scale,
    "weight_shape": _made_shape,
    "weight_zero_point": _made_zero_point,
}


# ---- into moai's tensors -----------------------------------------------------------------------------------------


def _codes(tensors: Tensors, stored: Stored) -> Tensor:
    return packing.unpack(tensors["weight_packed"], stored.bits)[:, : stored.columns]


def _zeros(tensors: Tensors, stored: Stored) -> Tensor:
    """(O, G) uint8."""
    return packing.unpack(tensors["weight_zero_point"].T, stored.bits)[:, : stored.out].T


def _groups(tensors: Tensors, stored: Stored) -> Tensor:
    return packing.by_group(tensors.get("weight_g_idx"), stored)


def _qweight(tensors: Tensors, stored: Stored) -> Tensor:
    return packing.qweight(_codes(tensors, stored), stored.spec)


def _scales(tensors: Tensors, stored: Stored) -> Tensor:
    return packing.half(tensors["weight_scale"][:, _groups(tensors, stored)])


def _points(tensors: Tensors, stored: Stored) -> Tensor:
    return _zeros(tensors, stored)[:, _groups(tensors, stored)].to(torch.float16)


PARTS = {"qweight": _qweight, "scales": _scales, "zeros": _points}


def decode(tensors: Tensors, stored: Stored) -> Tensor:
    """(O, I) fp32, exactly the stored values, in whatever order the groups are; `stored` is `size`'s. Raises
    CheckpointError."""
    index = packing.of_columns(tensors.get("weight_g_idx"), stored)
    scales = packing.numbers(tensors["weight_scale"])
    q = _codes(tensors, stored).float()
    q = q.sub_(stored.zero) if stored.symmetric else q.sub_(_zeros(tensors, stored).float()[:, index])
    return q.mul_(scales[:, index])
