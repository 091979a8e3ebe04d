"""Formats against numpy's arithmetic in float64: what is stored, how well it rounds, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moai_core.errors import UsageError
from moai_core.quant import formats
from moai_core.quant.formats import FORMATS, Spec

SPECS = [
    Spec("int4", 32), Spec("int4", 64), Spec("int4", 128), Spec("int4", 0), Spec("int4", 64, False), Spec("int4", 0, False),
    Spec("int8", 0), Spec("int8", 128),
]  # fmt: skip


def value(spec, tensors):
    """The table of formats.py once more, in float64."""
    t = {name: tensor.numpy() for name, tensor in tensors.items()}
    if spec.format == "int4":
        q = np.empty((t["qweight"].shape[0], t["qweight"].shape[1] * 2))
        q[:, 0::2], q[:, 1::2] = t["qweight"] % 16, t["qweight"] // 16
    else:
        q = t["qweight"].astype(np.float64)
    size = q.shape[1] // t["scales"].shape[1]
    zero = (
        t["zeros"].astype(np.float64)
        if "zeros" in t
        else np.full(t["scales"].shape, 8.0 if spec.format == "int4" else 0.0)
    )
    return (q - zero.repeat(size, 1)) * t["scales"].astype(np.float64).repeat(size, 1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_rounding(spec, rows):
    weight = torch.randn(rows, 384, dtype=torch.float64).float() * torch.rand(rows, 1) * 3
    kind = FORMATS[spec.format]
    kind.check(spec, rows, 384)
    tensors = kind.encode(spec, weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == kind.tensors(spec, rows, 384)
    exact = value(spec, tensors)
    assert np.array_equal(kind.decode(spec, tensors).double().numpy(), exact), "values are exact in fp32"
    size = spec.group_size or 384
    step = tensors["scales"].double().numpy().repeat(size, 1)
    error = np.abs(exact - weight.double().numpy())
    # Half a step, and what a scale rounded to fp16 cuts off at the ends.
    assert (error <= step * 0.5 + np.abs(exact) * 2**-10 + 1e-9).all()
    # Encoding what a format can hold under the same scales gives it back.
    again = kind.encode_with(
        spec, kind.decode(spec, tensors), *(tensors[n] for n in ("scales", "zeros") if n in tensors)
    )
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_uses_the_whole_range():
    w = torch.tensor([[-8.0, 7.0, 0.4, 0.6] * 8])
    assert formats.decode(Spec("int4", 0), FORMATS["int4"].encode(Spec("int4", 0), w)).tolist() == [
        [-8.0, 7.0, 0.0, 1.0] * 8
    ]
    w = torch.tensor([[0.0, 15.0, 3.0, 4.0] * 8])
    spec = Spec("int4", 32, False)
    assert torch.equal(formats.decode(spec, FORMATS["int4"].encode(spec, w)), w)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zeros_tiny_and_subset_of_rows(spec):
    weight = torch.zeros(3, 128)
    weight[1, :] = 1e-12
    weight[2, 5] = -4.0
    tensors = FORMATS[spec.format].encode(spec, weight)
    values = formats.decode(spec, tensors)
    assert torch.isfinite(values).all() and not values[0].any()
    assert abs(values[2, 5] + 4) < 4e-3
    picked = formats.decode(spec, {name: tensor[[2, 0]] for name, tensor in tensors.items()})
    assert torch.equal(picked, values[[2, 0]])


def test_refusals():
    with pytest.raises(UsageError, match="group size 128 doesn't divide 96 columns") as caught:
        FORMATS["int4"].check(Spec("int4", 128), 4, 96)
    assert "32 would" in caught.value.hint
    with pytest.raises(UsageError, match="group size must be one of 32, 64, 128, 256 \\(got 48\\)"):
        FORMATS["int4"].check(Spec("int4", 48), 4, 96)
    with pytest.raises(UsageError, match="doesn't fit fp16"):
        FORMATS["int8"].encode(Spec("int8", 0), torch.full((1, 32), 1e9))
    for bad in (None, [], {"format": "int5"}, {"format": "int4", "group_size": -1}, {"format": "int4", "bits": 4},
                {"format": "int4", "symmetric": 1}, {"group_size": 3}):  # fmt: skip
        with pytest.raises(UsageError):
            Spec.from_dict(bad)
    assert Spec.from_dict(Spec("int4", 64, False).to_dict()) == Spec("int4", 64, False)
