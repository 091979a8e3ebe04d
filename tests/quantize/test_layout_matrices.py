"""Layouts of other tools, a matrix at a time: the bits that those tools write, both ways, and what can't be read."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import layout_awq, layout_compressed, layout_gptq, packing
from moai_core.quant.formats import FORMATS, Spec, decode
from moai_core.quant.packing import Stored, Unfit

LAYOUTS = {"gptq": layout_gptq, "awq": layout_awq, "compressed-tensors": layout_compressed}
SPECS = [Spec("int4", g, s) for g in (32, 0) for s in (True, False)] + [Spec("int8", 32), Spec("int8", 0)]


def make(spec, out=64, columns=96):
    """A matrix by a formula, so that what other tools made of the same one can stand here."""
    o, i = torch.arange(out)[:, None], torch.arange(columns)[None]
    groups = columns // spec.group_size if spec.group_size else 1
    counter = torch.arange(out * groups).view(out, groups)
    kept = {"scales": ((counter % 13 + 1) * 2.0**-6).half()}
    if spec.format == "int8":
        return {"qweight": ((7 * o * i + 3 * o + i) % 255 - 127).to(torch.int8), **kept}
    if not spec.symmetric:
        kept["zeros"] = ((counter * 5) % 15 + 1).half()
    return FORMATS["int4"].pack((7 * o * i + 3 * o + i) % 16, kept)


def config(name, spec):
    return LAYOUTS[name].read_config(LAYOUTS[name].write_config(spec))


def sized(name, tensors, stored):
    return LAYOUTS[name].size(tensors, stored)


def same(one, two):
    return one.keys() == two.keys() and all(one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one)


def to_layout(layout, tensors, spec):
    """The layout's tensors of moai's."""
    return {name: layout.MADE[name](tensors, spec) for name in packing.made(layout, spec, 64, 96)}


def from_layout(layout, tensors, stored):
    """moai's tensors and format of the layout's."""
    stored = layout.size(tensors, stored)
    packing.check_shapes(tensors, layout.shapes(stored), layout.OPTIONAL)
    return {name: layout.PARTS[name](tensors, stored) for name in packing.parts(stored)}, stored.spec


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


# ---- both ways


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_there_and_back(name, spec):
    tensors = make(spec)
    if name == "awq" and spec.format == "int8":
        with pytest.raises(UsageError, match="AWQ has 4 bits"):
            to_layout(LAYOUTS[name], tensors, spec)
        return
    layout = LAYOUTS[name]
    written = to_layout(layout, tensors, spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in written.items()} == packing.made(layout, spec, 64, 96)
    stored = config(name, spec)
    back, found = from_layout(layout, written, stored)
    if name == "awq" and spec.symmetric:
        assert found == Spec("int4", spec.group_size, False)
        assert (back.pop("zeros") == 8).all()
    else:
        assert found == spec
    assert same(back, tensors)
    values = layout.decode(written, sized(name, written, stored))
    assert values.dtype == torch.float32 and torch.equal(values, decode(spec, tensors))
    again = to_layout(
        layout, {**back, **({"zeros": written["scales"].T * 0 + 8} if name == "awq" and spec.symmetric else {})}, found
    )
    assert same(again, written)


@given(st.integers(1, 5), st.integers(1, 7), st.booleans(), st.sampled_from(list(LAYOUTS)), st.integers(0, 2**31 - 1))
def test_there_and_back_of_random_matrices(groups, blocks, symmetric, name, seed):
    generator = torch.Generator().manual_seed(seed)
    spec, out, columns = Spec("int4", 32, symmetric), 32 * blocks, 32 * groups
    kept = {"scales": torch.rand(out, groups, generator=generator).half()}
    if not symmetric:
        kept["zeros"] = torch.randint(16, (out, groups), generator=generator).half()
    tensors = FORMATS["int4"].pack(torch.randint(16, (out, columns), generator=generator), kept)
    back, _ = from_layout(LAYOUTS[name], to_layout(LAYOUTS[name], tensors, spec), config(name, spec))
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize(("out", "columns"), [(33, 96), (7, 70), (1, 2)])
def test_compressed_tensors_takes_rows_and_columns_that_fill_no_number(out, columns):
    for symmetric in (True, False):
        spec = Spec("int4", 0, symmetric)
        tensors = make(spec, out, columns)
        written = to_layout(layout_compressed, tensors, spec)
        back, found = from_layout(layout_compressed, written, config("compressed-tensors", spec))
        assert found == spec and same(back, tensors)


def test_fits():
    for name, layout in LAYOUTS.items():
        assert layout.fits(Spec("int4"), 64, 128) is None
        assert (layout.fits(Spec("int4"), 60, 128) is None) == (name == "compressed-tensors")
        assert (layout.fits(Spec("int4", 0), 64, 130) is None) == (name == "compressed-tensors")


# ---- other people's bits


# What auto-gptq 0.7.1 (qlinear_cuda_old.QuantLinear.pack) made of `make`'s matrices: qweight, qzeros, scales.
AUTO_GPTQ = {
    (True, 32): ("e5e412755ea9b60d", "6ad7679ec6e044b8", "5d36212857c14a3e"),
    (True, 0): ("e5e412755ea9b60d", "e29442e61ad354e5", "06fcb3206bcf322e"),
    (False, 32): ("e5e412755ea9b60d", "a726b2f1181d1e96", "5d36212857c14a3e"),
    (False, 0): ("e5e412755ea9b60d", "772f162181330ad9", "06fcb3206bcf322e"),
}
# And autoawq 0.2.9 (WQLinear_GEMM.from_linear).
AUTO_AWQ = {
    (True, 32): ("92e71f6d7727000d", "cb9e7bc79794e2e5", "5d36212857c14a3e"),
    (True, 0): ("92e71f6d7727000d", "e8b72e0b71c772f8", "06fcb3206bcf322e"),
    (False, 32): ("92e71f6d7727000d", "2b2b3583e5276cf2", "5d36212857c14a3e"),
    (False, 0): ("92e71f6d7727000d", "d9a1fcb06dbf6f2f", "06fcb3206bcf322e"),
}


@pytest.mark.parametrize(("symmetric", "group"), AUTO_GPTQ)
def test_the_bits_of_auto_gptq(symmetric, group):
    spec = Spec("int4", group, symmetric)
    tensors = make(spec)
    written = to_layout(layout_gptq, tensors, spec)
    if not symmetric:  # moai writes version 2 then; auto-gptq knew version 1 alone
        zeros = tensors["zeros"].to(torch.int32).T - 1
        written["qzeros"] = sum(zeros[:, i::8] << (4 * i) for i in range(8)).to(torch.int32)
    assert tuple(digest(written[n]) for n in ("qweight", "qzeros", "scales")) == AUTO_GPTQ[symmetric, group]
    theirs = {"bits": 4, "group_size": group or -1, "sym": symmetric, "desc_act": False, "damp_percent": 0.01}
    back, found = from_layout(layout_gptq, written, layout_gptq.read_config(theirs))
    assert found == spec and same(back, tensors)


@pytest.mark.parametrize(("symmetric", "group"), AUTO_AWQ)
def test_the_bits_of_autoawq(symmetric, group):
    spec = Spec("int4", group, symmetric)
    written = to_layout(layout_awq, make(spec), spec)
    assert tuple(digest(written[n]) for n in ("qweight", "qzeros", "scales")) == AUTO_AWQ[symmetric, group]
    for theirs in (
        {"quant_method": "awq", "zero_point": True, "group_size": group or -1, "bits": 4, "version": "gemm"},
        {"zero_point": True, "q_group_size": group or -1, "w_bit": 4, "version": "GEMM"},
    ):
        back, found = from_layout(layout_awq, written, layout_awq.read_config(theirs))
        assert found == Spec("int4", group, False) and torch.equal(decode(found, back), decode(spec, make(spec)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("out", [64, 33])
def test_compressed_tensors_reads_and_writes_the_same(spec, out):
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensors = make(spec, out)
    values = decode(spec, tensors)
    arguments = quantization.QuantizationArgs(**layout_compressed.write_config(spec))
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    written = to_layout(layout_compressed, tensors, spec)
    exact = {**written, "weight_scale": written["weight_scale"].float()}
    assert torch.equal(theirs.PackedQuantizationCompressor.decompress(exact, scheme)["weight"], values)
    state = {"weight": values, "weight_scale": tensors["scales"].float()}
    if not spec.symmetric:
        state["weight_zero_point"] = (tensors["zeros"] - 8).to(torch.int8)
    made = theirs.PackedQuantizationCompressor.compress(state, scheme)
    assert same({n: made[n] for n in exact}, exact)
    back, found = from_layout(layout_compressed, {n: made[n] for n in exact}, config("compressed-tensors", spec))
    assert found == spec and same(back, tensors)


def test_zero_points_of_version_1():
    """They are stored less one; 0 less one is what auto-gptq's product makes of it, 0 again."""
    spec = Spec("int4", 32, False)
    tensors = make(spec)
    tensors["zeros"][0, 0] = 0
    two = to_layout(layout_gptq, tensors, spec)
    one = {**two, "qzeros": two["qzeros"].clone()}
    codes = packing.unpack(two["qzeros"], 4)
    one["qzeros"] = packing.pack((codes - 1) & 15, 4)
    for written, version in ((one, "gptq"), (two, "gptq_v2")):
        stored = layout_gptq.read_config({"bits": 4, "group_size": 32, "sym": False, "checkpoint_format": version})
        assert same(from_layout(layout_gptq, written, stored)[0], tensors)
    assert layout_gptq.write_config(spec)["checkpoint_format"] == "gptq_v2"
    assert layout_gptq.write_config(Spec("int4"))["checkpoint_format"] == "gptq"


# ---- groups in another order


def gptq(symmetric=True):
    spec = Spec("int4", 32, symmetric)
    return to_layout(layout_gptq, make(spec), spec), config("gptq", spec), spec


def test_groups_that_stand_in_another_order_are_read():
    """g_idx may number groups of neighbours as it likes: the scales then stand in that order."""
    for symmetric in (True, False):
        written, stored, spec = gptq(symmetric)
        order = torch.tensor([2, 0, 1])
        moved = {**written, "g_idx": order.repeat_interleave(32).int()}
        for name in ("scales", "qzeros"):
            moved[name] = torch.empty_like(written[name])
            moved[name][order] = written[name]
        assert same(from_layout(layout_gptq, moved, stored)[0], make(spec))
        assert torch.equal(layout_gptq.decode(moved, sized("gptq", moved, stored)), decode(spec, make(spec)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_columns_that_are_no_neighbours_are_decoded_but_not_held(symmetric):
    written, stored, spec = gptq(symmetric)
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(96, generator=generator) // 32
    moved = {**written, "g_idx": index.int()}
    with pytest.raises(Unfit, match=r"not of neighbouring columns \(desc_act\)"):
        from_layout(layout_gptq, moved, stored)
    tensors = make(spec)
    q = packing.codes(tensors, spec).double()
    zeros = tensors["zeros"].double() if not symmetric else torch.full((64, 3), 8.0).double()
    expected = (q - zeros[:, index]) * tensors["scales"].double()[:, index]
    assert torch.equal(layout_gptq.decode(moved, sized("gptq", moved, stored)).double(), expected)
    compressed = to_layout(layout_compressed, tensors, spec) | {"weight_g_idx": index.int()}
    stored = config("compressed-tensors", spec)
    with pytest.raises(Unfit, match="neighbouring"):
        from_layout(layout_compressed, compressed, stored)
    values = layout_compressed.decode(compressed, sized("compressed-tensors", compressed, stored))
    assert torch.equal(values.double(), expected)


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (Stored(4, 16, True), "groups of 16 columns, moai has 32, 64, 128, 256 and whole rows"),
        (Stored(8, 32, False), "8 bits with zero points"),
    ],
)
def test_other_groups_and_widths_are_decoded_but_not_held(stored, why):
    per, groups = 32 // stored.bits, 96 // stored.group_size
    generator = torch.Generator().manual_seed(0)
    written = {
        "qweight": torch.randint(-(2**31), 2**31, (96 // per, 64), generator=generator).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, 64 // per), generator=generator).int(),
        "scales": torch.rand(groups, 64, generator=generator).half(),
    }
    with pytest.raises(Unfit, match=why):
        from_layout(layout_gptq, written, stored)
    values = layout_gptq.decode(written, layout_gptq.size(written, stored))
    mask = 2**stored.bits - 1
    for o, i in ((0, 0), (63, 95), (17, 42)):
        q = (int(written["qweight"][i // per, o]) >> (stored.bits * (i % per))) & mask
        g = i // stored.group_size
        z = ((int(written["qzeros"][g, o // per]) >> (stored.bits * (o % per))) + 1) & mask
        assert float(values[o, i]) == pytest.approx((q - z) * float(written["scales"][g, o]), rel=1e-6)


def test_scales_that_fp16_does_not_hold():
    written, stored, spec = gptq()
    held = {**written, "scales": written["scales"].to(torch.bfloat16)}
    assert same(from_layout(layout_gptq, held, stored)[0], make(spec))
    fine = {**written, "scales": written["scales"].float() * (1 + 2**-20)}
    with pytest.raises(Unfit, match="scales in float32 that fp16 doesn't hold"):
        from_layout(layout_gptq, fine, stored)
    assert torch.equal(layout_gptq.decode(fine, sized("gptq", fine, stored)), decode(spec, make(spec)) * (1 + 2**-20))


def test_zero_points_that_were_trained_stay_with_moai():
    spec = Spec("int4", 32, False)
    for bad in (7.5, -1.0, 16.0, float("nan")):
        tensors = make(spec)
        tensors["zeros"][3, 1] = bad
        for layout in LAYOUTS.values():
            with pytest.raises(UsageError, match=r"a zero point of .* can't be stored in this layout"):
                to_layout(layout, tensors, spec)
    with pytest.raises(UsageError, match="nf4 can't be stored in this layout, int4 and int8 can"):
        layout_gptq.write_config(Spec("nf4", 0))


# ---- hostile files


def broken():
    """(layout, its tensors and Stored, what is wrong, the message)"""
    for name in LAYOUTS:
        spec = Spec("int4", 32, False)
        good, stored = to_layout(LAYOUTS[name], make(spec), spec), config(name, spec)
        q, s, z = (
            ("weight_packed", "weight_scale", "weight_zero_point")
            if name == "compressed-tensors"
            else ("qweight", "scales", "qzeros")
        )
        for part in (q, s, z):
            yield name, {n: t for n, t in good.items() if n != part}, stored, f"{part} is missing"
        yield name, good | {q: good[q][:-1]}, stored, "has the shape|don't divide|weight_shape is"
        yield name, good | {q: good[q].flatten()}, stored, f"{q} has the shape .*, expected that of a matrix"
        yield name, good | {q: good[q][:0]}, stored, "expected that of a matrix"
        yield name, good | {q: good[q].long()}, stored, f"{q} has the type int64, expected int32"
        yield name, good | {s: good[s][:, :-1]}, stored, f"{s} has the shape .*, expected"
        yield name, good | {s: good[s].int()}, stored, f"{s} has the type int32"
        yield name, good | {z: good[z][:-1]}, stored, f"{z} has the shape"
        yield name, good | {s: good[s] * float("nan")}, stored, "scales hold NaN"
        yield name, good | {s: good[s] * float("inf")}, stored, "scales hold NaN"
        yield name, good | {"evil": good[q]}, stored, "evil has no place in this layout"
        yield name, good, Stored(4, 36, False), "groups of 36 don't divide 96 columns"
    written, stored, spec = gptq()
    for bad in (-1, 3, 2**31 - 1):
        index = written["g_idx"].clone()
        index[5] = bad
        yield "gptq", written | {"g_idx": index}, stored, f"g_idx holds {bad}, there are groups 0 to 2"
        compressed = to_layout(layout_compressed, make(spec), spec) | {"weight_g_idx": index}
        yield "compressed-tensors", compressed, config("compressed-tensors", spec), f"g_idx holds {bad}"
    yield "gptq", written | {"g_idx": written["g_idx"][:-1]}, stored, "g_idx has the shape"
    yield (
        "gptq",
        written | {"qzeros": written["qzeros"] + 1},
        stored,
        "a zero point is 9, that of every symmetric group is 8",
    )
    good = to_layout(layout_compressed, make(spec), spec)
    stored = config("compressed-tensors", spec)
    for shape in ([64, 97], [64, 88], [64, -96], [65, 96], [2**62, 96]):
        yield "compressed-tensors", good | {"weight_shape": torch.tensor(shape)}, stored, "weight_shape is"
    yield "compressed-tensors", good | {"weight_shape": torch.tensor([64.0, 96.0])}, stored, "two whole numbers"
    eight = to_layout(layout_gptq, make(Spec("int8", 32)), Spec("int8", 32))
    eight["qweight"][0, 0] &= -256
    yield "gptq", eight, config("gptq", Spec("int8", 32)), "holds the integer -128"


@pytest.mark.parametrize("case", range(len(list(broken()))))
def test_what_is_broken_is_said_in_one_line(case):
    name, tensors, stored, message = list(broken())[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        from_layout(LAYOUTS[name], tensors, stored)
    assert "\n" not in caught.value.message and caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("gptq", {"bits": 3, "group_size": 128}, "bits is 3, 4 and 8 can be read"),
        ("gptq", {"group_size": 128}, "bits is missing"),
        ("gptq", {"bits": "4", "group_size": 128}, "bits must be a whole number"),
        ("gptq", {"bits": 4}, "group_size is missing"),
        ("gptq", {"bits": 4, "group_size": 0}, r"group_size must be -1 or above 0 \(got 0\)"),
        ("gptq", {"bits": 4, "group_size": 128, "sym": "yes"}, "sym must be true or false"),
        ("gptq", {"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 4, "group_size": 128, "is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 4, "group_size": 128, "dynamic": {"-:x": {}}}, "dynamic gives modules settings"),
        ("awq", {"bits": 8, "group_size": 128}, "bits is 8, only 4 can be read"),
        ("awq", {"bits": 4, "group_size": 128, "version": "gemv"}, "version is 'gemv', only 'gemm'"),
        ("awq", {"bits": 4, "group_size": 128, "version": 7}, "version is '7'"),
        ("compressed-tensors", {"num_bits": 4, "type": "float", "strategy": "group"}, "integers of 4 and 8"),
        ("compressed-tensors", {"num_bits": 4, "type": "int", "strategy": "tensor"}, "strategy is 'tensor'"),
        ("compressed-tensors", {"num_bits": 4, "strategy": "group"}, "group_size is missing"),
    ],
)  # fmt: skip
def test_configs_that_can_not_be_read(name, values, message):
    with pytest.raises(CheckpointError, match=message):
        LAYOUTS[name].read_config(values)
