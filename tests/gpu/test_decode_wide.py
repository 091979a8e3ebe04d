"""Products of wide batches against float64: sums of slices of K, by the kernel for every GPU and by Hopper's own."""

from __future__ import annotations

import pytest
import torch

from moai_core.generation import decode, decode_wide
from moai_core.generation.decode_kernels import Matrix
from moai_core.quant.formats import FORMATS, Spec
from moai_core.quant.formats import decode as values_of

pytestmark = pytest.mark.gpu

B, H = torch.bfloat16, torch.float16
NAMES = {"int4": "Int4", "int8": "Int8", "fp8": "Fp8"}
# format, group, type of x, rows of W (1024 at least for Hopper's), columns, a second weight.
CASES = [
    ("none", 0, B, 1024, 2048, False),
    ("none", 0, B, 1032, 1184, True),
    ("none", 0, H, 1090, 352, False),
    ("none", 0, B, 40, 4096, False),
    ("int4", 128, B, 1024, 1408, True),
    ("int4", 256, B, 1037, 768, False),
    ("int4", 128, H, 1024, 640, False),
    ("int8", 0, B, 1100, 704, True),
    ("fp8", 0, B, 1024, 832, False),
]


def stored(device, form, group, dtype, rows, columns, seed):
    """(weight as the kernels read it, its values in float64)."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if form == "none":
        kept = weight.to(dtype)
        return Matrix("Plain", 0, rows, columns, kept.to(device)), kept.double()
    spec = Spec(form, group, True)
    held = FORMATS[form].encode(spec, weight)
    made = Matrix(NAMES[form], group, rows, columns, held["qweight"].to(device), held["scales"].to(device))
    return made, values_of(spec, held).double()


@pytest.mark.parametrize("hopper", [True, False], ids=["hopper", "any"])
@pytest.mark.parametrize("width", [9, 32, 64])
@pytest.mark.parametrize("form, group, dtype, rows, columns, pair", CASES)
def test_sums_of_a_product(device, poisoned, monkeypatch, form, group, dtype, rows, columns, pair, width, hopper):
    if hopper and device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    if not hopper:
        monkeypatch.setattr(decode_wide, "_hopper", lambda _: False)
    first, values = stored(device, form, group, dtype, rows, columns, 0)
    second, others = stored(device, form, group, dtype, rows, columns, 1) if pair else (None, None)
    assert decode_wide.fits(first, dtype)
    x = torch.randn(width, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = values if others is None else torch.cat([values, others])
    with poisoned():
        sums = torch.empty(decode_wide.slices_of(first, 1 + pair), width, len(whole), device=device)
    decode.run([decode_wide.product(first, x.to(device), sums, second=second)])
    wanted = x.double() @ whole.T
    error = float((sums.double().sum(0).cpu() - wanted).norm() / wanted.norm())
    assert error < 5e-6, error


@pytest.mark.parametrize("width", [9, 64])
@pytest.mark.parametrize(
    "form, dtype, rows, columns", [("none", B, 1100, 3232), ("int8", B, 2100, 1664), ("int4", H, 1024, 1408)]
)
def test_the_product_of_a_head(device, poisoned, monkeypatch, form, dtype, rows, columns, width):
    """K of several parts, and of the last part's tiles one team has none."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setattr(decode_wide, "HEADS", ("Plain", "Int8", "Int4"))
    m, values = stored(device, form, 128 if form == "int4" else 0, dtype, rows, columns, 0)
    assert decode_wide.stores(m, dtype)
    x = torch.randn(width, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    with poisoned():
        out = torch.empty(width, rows, device=device, dtype=dtype)
    decode.run([decode_wide.product(m, x.to(device), out)])
    wanted = x.double() @ values.T
    error = float((out.double().cpu() - wanted).norm() / wanted.norm())
    assert error < (2e-3 if dtype == B else 3e-4), error
