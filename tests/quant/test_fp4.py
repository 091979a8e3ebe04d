"""fp4: e2m1 codes and their block scales against the formats' definitions and, where installed, other people's code."""

from __future__ import annotations

import itertools

import pytest
import torch

from moai_core.errors import UsageError
from moai_core.quant import fp4
from moai_core.quant.formats import FORMATS, Spec, unpack4

SPECS = {"nvfp4": Spec("nvfp4", 0), "mxfp4": Spec("mxfp4", 0)}


def weight(rows=24, columns=192, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 0, rows)[:, None]


def definition(code):
    """The value of an e2m1 code: sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = (-1) ** (code >> 3), (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def test_codes_are_those_of_the_standard():
    assert fp4.from_codes(torch.arange(16)).tolist() == [definition(code) for code in range(16)]


def test_every_number_gets_the_nearest_code_and_a_tie_the_even_one():
    steps = torch.arange(-64, 65) / 8  # all ties are among them
    codes = fp4.to_codes(steps.float()).tolist()
    for value, code in zip(steps.tolist(), codes, strict=True):
        best = min(abs(value - definition(other)) for other in range(16))
        assert abs(value - definition(code)) == best
        rivals = [c for c in range(16) if abs(value - definition(c)) == best and (c >> 3) == (code >> 3)]
        assert len(rivals) == 1 or code % 2 == 0, (value, code)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_stored(name):
    spec, format = SPECS[name], FORMATS[name]
    w = weight()
    stored = format.encode(spec, w)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == format.tensors(spec, *w.shape)
    made = format.decode(spec, stored)
    assert made.dtype == torch.float32 and made.shape == w.shape
    error = (made - w).norm(dim=-1) / w.norm(dim=-1)
    assert error.min() > 0.05 and error.max() < 0.13, "small rows are as exact as large ones"
    rows = {n: t[5:7] if t.dim() else t for n, t in stored.items()}
    assert torch.equal(format.decode(spec, rows), made[5:7])
    if name == "nvfp4":
        scale = stored["scale"]
        again = format.encode_with(spec, made, stored["scales"].float() * scale, scale=scale)
    else:
        again = format.encode_with(spec, made, stored["scales"])
    assert torch.equal(format.decode(spec, again), made)


def test_nvfp4_by_hand():
    """A block of 16 whose largest number is 3 beside one whose largest is 6: scales 448 and 224 of 6/448/6."""
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1], w[0, 16], w[0, 17] = 6.0, -1.0, 3.0, 0.25
    stored = FORMATS["nvfp4"].encode(SPECS["nvfp4"], w)
    assert stored["scales"].float().tolist() == [[448.0, 224.0]]
    assert float(stored["scale"]) == pytest.approx(1 / 448)
    assert unpack4(stored["qweight"])[0, [0, 1, 2, 16, 17]].tolist() == [7, 10, 0, 7, 1]
    assert torch.allclose(FORMATS["nvfp4"].decode(SPECS["nvfp4"], stored), w, rtol=1e-6)


def test_mxfp4_by_hand():
    w = torch.zeros(1, 64)
    w[0, 0], w[0, 1], w[0, 32] = 6.0, -1.5, 2.0**-20
    stored = FORMATS["mxfp4"].encode(SPECS["mxfp4"], w)
    assert stored["scales"].tolist() == [[127, 127 - 22]]
    assert torch.equal(FORMATS["mxfp4"].decode(SPECS["mxfp4"], stored), w)
    assert fp4.powers(torch.tensor([1, 127, 254], dtype=torch.uint8)).tolist() == [2.0**-126, 1.0, 2.0**127]
    assert float(fp4.powers(torch.tensor([0], dtype=torch.uint8)).double()) == 2.0**-127
    assert fp4.powers(torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_mxfp4_takes_the_better_of_two_powers():
    w = weight(seed=3)
    format, spec = FORMATS["mxfp4"], SPECS["mxfp4"]
    stored = format.encode(spec, w)

    def errors(scales):
        made = format.decode(spec, format.encode_with(spec, w, scales))
        return (made - w).double().square().view(24, -1, 32).sum(-1)

    mine = errors(stored["scales"])
    for shift in (-1, 1):
        assert (mine <= errors(stored["scales"] + shift) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", SPECS)
def test_zeros_tiny_and_huge_weights(name):
    spec, format = SPECS[name], FORMATS[name]
    assert torch.equal(format.decode(spec, format.encode(spec, torch.zeros(2, 64))), torch.zeros(2, 64))
    for size in (1e-30, 1e30):
        w = weight(2, 64) * size
        made = format.decode(spec, format.encode(spec, w))
        error, largest = (made.double() - w.double()).norm(), w.double().norm()
        assert torch.isfinite(made).all() and 0.05 * largest < error < 0.13 * largest
    w = torch.zeros(2, 64)
    w[0, 0], w[1, 40] = 1.0, 1e-30  # a block far below the largest vanishes, or not, but is never wrong
    assert (format.decode(spec, format.encode(spec, w)) - w).abs().max() < 1e-6
    with pytest.raises(UsageError, match="NaN or infinite"):
        format.encode(spec, w / 0)


@pytest.mark.parametrize("name", SPECS)
def test_shapes_and_groups_that_do_not_fit_are_refused(name):
    spec, format = SPECS[name], FORMATS[name]
    with pytest.raises(UsageError, match=r"blocks of \d+ don't divide 40 columns"):
        format.check(spec, 8, 40)
    with pytest.raises(UsageError, match=r"group_size must be 0 \(got 128\)"):
        format.check(Spec(name, 128), 8, 256)
    with pytest.raises(UsageError, match="symmetric"):
        format.check(Spec(name, 0, symmetric=False), 8, 256)


def test_the_note_says_that_it_is_a_storage_format(monkeypatch):
    assert "storage format" in fp4.note("cpu") and "no FP4 units" in fp4.note("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert "NVIDIA H100 has no FP4 units" in fp4.note("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "storage format" in fp4.note("cuda") and "no FP4 units" not in fp4.note("cuda")


# ---- other people's code


def test_compressed_tensors_reads_the_codes():
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    w = weight()
    stored = FORMATS["nvfp4"].encode(SPECS["nvfp4"], w)
    values = nvfp4.unpack_fp4_from_uint8(stored["qweight"], *w.shape, dtype=torch.float32)
    assert torch.equal(values, fp4.from_codes(unpack4(stored["qweight"])))
    assert torch.equal(nvfp4.pack_fp4_to_uint8(values), stored["qweight"])


@pytest.mark.parametrize("seed", range(3))
def test_torchao_makes_the_same_bits(seed):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = weight(seed=seed)
    theirs = nv.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=nv.per_tensor_amax_to_scale(w.abs().max()))
    ours = FORMATS["nvfp4"].encode(SPECS["nvfp4"], w)
    assert torch.equal(theirs.qdata, ours["qweight"])
    assert torch.equal(theirs.scale.view(torch.uint8), ours["scales"].view(torch.uint8))
    assert torch.equal(theirs.dequantize(torch.float32), FORMATS["nvfp4"].decode(SPECS["nvfp4"], ours))
    scales, codes = mx.to_mx(w, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
    ours = FORMATS["mxfp4"].encode_with(SPECS["mxfp4"], w, scales.view(torch.uint8))
    assert torch.equal(codes.view(torch.uint8), ours["qweight"])
    theirs = mx.MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(theirs, FORMATS["mxfp4"].decode(SPECS["mxfp4"], ours))


def test_every_code_under_every_exponent_is_exact():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    for exponent, code in itertools.product((1, 100, 254 - 3), range(16)):
        stored = {"qweight": packed, "scales": torch.tensor([[exponent]], dtype=torch.uint8)}
        value = float(FORMATS["mxfp4"].decode(SPECS["mxfp4"], stored)[0, code])
        assert value == definition(code) * 2.0 ** (exponent - 127)
