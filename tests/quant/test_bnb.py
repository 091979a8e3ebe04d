"""nf4 and bnb8: the bits that bitsandbytes stores, decoded without it; and its products."""

from __future__ import annotations

import pytest
import torch

from moai_core.errors import UsageError
from moai_core.quant import bitsandbytes as kernel
from moai_core.quant import bnb
from moai_core.quant.formats import FORMATS, Spec
from moai_core.quant.linear import QuantEmbedding

SPECS = {"nf4": Spec("nf4", 0), "nf4_double": Spec("nf4_double", 0), "bnb8": Spec("bnb8", 0)}
SHAPES = [(48, 192), (7, 64), (130, 704)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes.functional")


def weight(shape, *, seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 0, shape[0])[:, None]
    w[0, :64] = 0
    return w


def test_tables(functional):
    assert torch.equal(bnb.dynamic_table(), functional.create_dynamic_map())
    assert torch.equal(bnb.nf4_table(CPU), functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_bits(shape, functional):
    w = weight(shape)
    ours = FORMATS["nf4"].encode(SPECS["nf4"], w)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.view(shape[0], -1), ours["qweight"])
    assert torch.equal(state.absmax.view(shape[0], -1), ours["absmax"])
    assert torch.equal(functional.dequantize_4bit(packed, state), FORMATS["nf4"].decode(SPECS["nf4"], ours))


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_double_decodes_their_bits_and_makes_them(shape, functional):
    w = weight(shape)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = {
        "qweight": packed.view(shape[0], -1),
        "absmax": state.absmax.view(shape[0], -1),
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset,
    }
    format, spec = FORMATS["nf4_double"], SPECS["nf4_double"]
    assert {n: (tuple(t.shape), t.dtype) for n, t in theirs.items()} == format.tensors(spec, *shape)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.allclose(format.decode(spec, theirs), expected, rtol=1e-6, atol=0)
    ours = format.encode(spec, w)
    for name in ("qweight", "nested_absmax", "nested_offset"):
        assert torch.equal(ours[name], theirs[name]), name
    # A scale in the very middle of two of the table's numbers may go to either.
    apart = (ours["absmax"].int() - theirs["absmax"].int()).abs()
    assert apart.max() <= 1 and apart.sum() <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_bnb8_bits(shape, functional):
    w = weight(shape).half()
    ours = FORMATS["bnb8"].encode(SPECS["bnb8"], w)
    q, scb, _ = functional.int8_vectorwise_quant(w)
    assert torch.equal(q, ours["qweight"]) and torch.equal(scb, ours["SCB"])
    assert torch.equal(functional.int8_vectorwise_dequant(q, scb), FORMATS["bnb8"].decode(SPECS["bnb8"], ours))


def test_what_the_layers_of_bitsandbytes_hold_can_be_loaded(functional):
    """Linear4bit's and Linear8bitLt's state dicts have our tensors under other names."""
    nn = pytest.importorskip("bitsandbytes.nn")
    w = weight((96, 128))
    layer = nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight = nn.Params4bit(w, quant_type="nf4", compress_statistics=False)
    held = layer.to("cpu").state_dict()
    ours = FORMATS["nf4"].encode(SPECS["nf4"], w)
    assert torch.equal(held["weight"].view(96, 64), ours["qweight"])
    assert torch.equal(held["weight.absmax"].view(96, 2), ours["absmax"])
    assert torch.equal(held["weight.quant_map"], bnb.nf4_table(CPU))


@pytest.mark.parametrize("name", SPECS)
def test_what_is_stored(name):
    spec, format = SPECS[name], FORMATS[name]
    w = weight((48, 192))
    stored = format.encode(spec, w)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == format.tensors(spec, 48, 192)
    made = format.decode(spec, stored)
    assert made.dtype == torch.float32
    by_row = (made - w).norm(dim=-1)[1:] / w.norm(dim=-1)[1:]
    # Scales that are rounded to 8 bits under one offset are as exact as the largest of them.
    error = (made - w).norm() / w.norm() if name == "nf4_double" else by_row.max()
    assert error < (0.012 if name == "bnb8" else 0.12)
    # Offset and rounding of the scales of scales leave a block of zeros where it is: the table has a zero.
    assert torch.equal(made[0, :64], torch.zeros(64))
    if format.by_rows:
        assert torch.equal(format.decode(spec, {n: t[5:7] for n, t in stored.items()}), made[5:7])


@pytest.mark.parametrize("name", SPECS)
def test_wrong_specs_shapes_and_weights_are_refused(name):
    format, spec = FORMATS[name], SPECS[name]
    with pytest.raises(UsageError, match=r"group_size must be 0 \(got 128\)"):
        format.check(Spec(name, 128), 8, 256)
    with pytest.raises(UsageError, match="symmetric"):
        format.check(Spec(name, 0, symmetric=False), 8, 256)
    if name != "bnb8":
        with pytest.raises(UsageError, match="blocks of 64 don't divide 96 columns"):
            format.check(spec, 8, 96)
    with pytest.raises(UsageError, match="NaN or infinite"):
        format.encode(spec, torch.full((2, 64), torch.nan))


def test_an_embedding_takes_formats_whose_rows_stand_alone():
    ids = torch.tensor([[5, 0], [47, 5]])
    for name, spec in SPECS.items():
        if name == "nf4_double":
            with pytest.raises(UsageError, match="nf4_double can't be an embedding"):
                QuantEmbedding(48, 192, spec)
            continue
        layer, w = QuantEmbedding(48, 192, spec), weight((48, 192))
        layer.load_state_dict(FORMATS[name].encode(spec, w))
        assert torch.equal(layer(ids), layer.weight_values()[ids])


# ---- the kernel


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product(name, dtype, functional):
    spec, format = SPECS[name], FORMATS[name]
    stored = format.encode(spec, weight((48, 192), seed=1))
    exact = format.decode(spec, stored).double()
    if why := kernel.why_not(spec, CPU, dtype):
        assert name == "bnb8" and "16 bits" in why
        return
    prepared = kernel.prepare(spec, stored)
    for rows in (1, 5, 33):
        x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows)).to(dtype)
        x[:, 3] *= 20  # an outlier of LLM.int8
        y = kernel.linear(spec, prepared, x, 48)
        expected = x.double() @ exact.T
        assert y.dtype == dtype and y.shape == (rows, 48)
        limit = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
        assert (y.double() - expected).norm() < (0.015 if name == "bnb8" else limit) * expected.norm()


def test_it_says_why_it_can_not(monkeypatch):
    assert "not int4" in kernel.why_not(Spec("int4"), CPU, torch.float32)
    assert "not on mps" in kernel.why_not(SPECS["nf4"], torch.device("mps"), torch.float32)
    monkeypatch.setattr(kernel, "_version", lambda: None)
    for spec in SPECS.values():
        why = kernel.why_not(spec, CPU, torch.bfloat16)
        assert why == "the package bitsandbytes isn't installed (pip install 'moai[quant]')"
