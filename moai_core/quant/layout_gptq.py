"""The layout of GPTQ checkpoints, as auto-gptq, GPTQModel and transformers keep them. Of a matrix W (O, I), 4 bits:

    qweight int32 (I/8, O)      codes, eight rows of inputs in one number, the first in the lowest bits
    qzeros  int32 (G, O/8)      zero points, eight outputs in one number
    scales  fp16 (G, O)
    g_idx   int32 (I)           the group of each column

8 bits: four in a number. In version 1 ("gptq") the zero points are stored less one, so that 0 becomes 15 and readers
don't agree on what that means (auto-gptq's own: 0 again; GPTQModel's carries into the next); version 2 ("gptq_v2")
stores them as they are. moai writes symmetric matrices, where all are 8, as version 1, and others as version 2.

With desc_act a group is made of columns that are no neighbours. moai's formats can't hold that (Unfit), `decode` can.
Source: auto_gptq 0.7.1 (nn_modules/qlinear), GPTQModel 7.6.
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

METHOD = "gptq"
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
# auto-gptq and the fast kernels count in 32s.
MULTIPLE = 32


# ---- config ------------------------------------------------------------------------------------------------------


def read_config(values: Mapping[str, Any]) -> Stored:
    """Of quantize_config.json, or config.json's quantization_config. Raises CheckpointError for what can't be read."""
    bits = packing.integer(values, "bits", "w_bit")
    if bits not in packing.WIDTHS:
        raise CheckpointError(f"bits is {bits}, 4 and 8 can be read")
    name = values.get("checkpoint_format") or values.get("format") or "gptq"
    if packing.flag(values, "is_marlin_format", False):
        name = "marlin"
    if not isinstance(name, str) or name.lower() not in _VERSIONS:
        raise CheckpointError(
            f"checkpoint_format is {str(name)[:40]!r}, {' and '.join(_VERSIONS)} can be read",
            hint="kernels' own orders (marlin, bitblas) can't: take the checkpoint that they were made of",
        )
    if values.get("dynamic"):
        raise CheckpointError("dynamic gives modules settings of their own, which isn't read")
    size = packing.group_size(values, "group_size", "q_group_size")
    return Stored(bits, size, packing.flag(values, "sym", True), _VERSIONS[name.lower()])


def write_config(spec: Spec) -> dict[str, Any]:
    """What both files say of matrices of this format."""
    made = packing.stored(spec)
    return {
        "quant_method": METHOD,
        "bits": made.bits,
        "group_size": made.group_size or -1,
        "sym": made.symmetric,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.05,
        "lm_head": False,
        "checkpoint_format": next(name for name, number in _VERSIONS.items() if number == _version(spec)),
        "is_marlin_format": False,
    }


def _version(spec: Spec) -> int:
    return 1 if spec.symmetric else 2


# ---- shapes ------------------------------------------------------------------------------------------------------


def fits(spec: Spec, out: int, columns: int) -> str | None:
    """See packing.py."""
    if out % MULTIPLE or columns % MULTIPLE:
        return f"GPTQ's readers take rows and columns in multiples of {MULTIPLE}"
    return None


def size(found: Mapping[str, Any], stored: Stored) -> Stored:
    """See packing.py. found: the tensors, or what else has their shapes."""
    rows, out = packing.two_dimensional(found, "qweight")
    return stored.sized(out, rows * (32 // stored.bits))


def shapes(stored: Stored) -> packing.Shapes:
    """See packing.py. Raises CheckpointError for groups that don't divide the columns."""
    per, groups = 32 // stored.bits, stored.groups
    return {
        "qweight": ((stored.columns // per, stored.out), (torch.int32,)),
        "qzeros": ((groups, -(-stored.out // per)), (torch.int32,)),
        "scales": ((groups, stored.out), packing.FLOATS),
        "g_idx": ((stored.columns,), (torch.int32, torch.int64)),
    }


# Files without it have groups of neighbours.
OPTIONAL = ("g_idx",)


# ---- out of moai's tensors ---------------------------------------------------------------------------------------


def _made_qweight(tensors: Tensors, spec: Spec) -> Tensor:
    return packing.pack(packing.codes(tensors, spec), packing.stored(spec).bits).T.contiguous()


def _made_qzeros(tensors: Tensors, spec: Spec) -> Tensor:
    found = packing.zeros(tensors, spec).T
    # Version 1 is written for symmetric matrices alone: none is 0.
    return packing.pack(found - 1 if _version(spec) == 1 else found, packing.stored(spec).bits)


def _made_scales(tensors: Tensors, spec: Spec) -> Tensor:
    return tensors["scales"].T.contiguous()


def _made_index(tensors: Tensors, spec: Spec) -> Tensor:
    width = tensors["qweight"].shape[1] * (2 if spec.format == "int4" else 1)
    return (torch.arange(width) // (spec.group_size or width)).to(torch.int32)


MADE = {"qweight": _made_qweight, "qzeros": _made_qzeros, "scales": _made_scales, "g_idx": _made_index}


# ---- into moai's tensors -----------------------------------------------------------------------------------------


def _zeros(tensors: Tensors, stored: Stored) -> Tensor:
    """(O, G) uint8."""
    found = packing.unpack(tensors["qzeros"], stored.bits)[:, : stored.out].T
    # In version 1 the largest number is 0 less one, as auto-gptq's own product in torch has it.
    return (found + 1) & (2**stored.bits - 1) if stored.version == 1 else found


def _groups(tensors: Tensors, stored: Stored) -> Tensor:
    """(G,) the stored group of each of moai's."""
    return packing.by_group(tensors.get("g_idx"), stored)


def _qweight(tensors: Tensors, stored: Stored) -> Tensor:
    if stored.symmetric:
        packing.no_zero_points(_zeros(tensors, stored), stored.zero)
    return packing.qweight(packing.unpack(tensors["qweight"].T, stored.bits), stored.spec)


def _scales(tensors: Tensors, stored: Stored) -> Tensor:
    return packing.half(tensors["scales"].T[:, _groups(tensors, stored)].contiguous())


def _points(tensors: Tensors, stored: Stored) -> Tensor:
    return _zeros(tensors, stored)[:, _groups(tensors, stored)].to(torch.float16)


PARTS = {"qweight": _qweight, "scales": _scales, "zeros": _points}


def decode(tensors: Tensors, stored: Stored) -> Tensor:
    """(O, I) fp32, exactly the stored values, in whatever order the groups are; `stored` is `size`'s. Raises
    CheckpointError."""
    index = packing.of_columns(tensors.get("g_idx"), stored)
    scales, zeros = packing.numbers(tensors["scales"]).T, _zeros(tensors, stored).float()
    q = packing.unpack(tensors["qweight"].T, stored.bits).float()
    return q.sub_(zeros[:, index]).mul_(scales[:, index])
