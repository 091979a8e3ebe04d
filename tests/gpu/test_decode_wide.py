"""Products of wide batches against float64: sums of slices of K, by the kernel for every GPU and by Hopper's own two."""

from __future__ import annotations

import pytest
import torch

from moai_core.generation import decode, decode_stream, decode_wide
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


def arranged(x, tiles, vectors):
    """x (M, K) in the order in which decode_stream.cu reads it beside a weight of `vectors` times fewer bits than 16."""
    pairs = {
        1: [(0, 1), (2, 3), (4, 5), (6, 7)], 2: [(0, 2), (1, 3), (4, 6), (5, 7)], 4: [(0, 4), (1, 5), (2, 6), (3, 7)],
    }[vectors]  # fmt: skip
    rows, columns = x.shape
    # 8 columns, 8 rows of the batch, row, column
    out = torch.full((columns // 8, tiles, 8, 8), float("nan"), dtype=x.dtype)
    row = torch.arange(rows)
    for piece in range(columns // 8):
        p = piece % (4 * vectors)
        product = piece // (4 * vectors) * 2 * vectors + 2 * (p % vectors)
        for word, pair in enumerate(pairs):
            # A 16-bit weight takes 8 columns beside each other, others one word of a piece at a time.
            half, at = (piece, word) if vectors == 1 else (2 * product + word, p // vectors)
            for i, column in enumerate(pair):
                out[half, row // 8, row % 8, 2 * at + i] = x[:, piece * 8 + column]
    return out


STREAMS = [
    ("none", 0, B, 1024, 2048),
    ("none", 0, H, 1032, 352),
    ("int4", 128, B, 1024, 1408),
    ("int4", 256, H, 1096, 768),
    ("int8", 0, B, 1104, 704),
    ("fp8", 0, B, 1024, 832),
]


@pytest.mark.parametrize("width", [2, 9, 64])
@pytest.mark.parametrize("form, group, dtype, rows, columns", STREAMS)
def test_sums_of_a_stream(device, poisoned, form, group, dtype, rows, columns, width):
    """Rows of no whole tile, K of no whole units."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    m, values = stored(device, form, group, dtype, rows, columns, 0)
    assert decode_stream.takes(m, dtype)
    x = torch.randn(width, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    with poisoned():
        sums = torch.empty(decode_stream.slices_of(m), width, rows, device=device)
    decode.run([decode_stream.sums(m, arranged(x, *decode_stream.arrangement(m, width)).to(device), sums)])
    wanted = x.double() @ values.T
    error = float((sums.double().sum(0).cpu() - wanted).norm() / wanted.norm())
    assert error < 5e-6, error
