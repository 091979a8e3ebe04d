"""The scan backend "cuda" against the float64 reference: results, final state and every gradient.

Inputs are rounded to the type under test first, so that the tolerance is the backend's alone: relative norm error of
1e-5 or twice that of a plain fp32 loop, 4e-3 in 16 bits. All memory that the backend allocates is poisoned with NaN,
and so is whatever stands at padding.
"""

from __future__ import annotations

import pytest
import torch

from moai_core.errors import UsageError

pytestmark = pytest.mark.gpu

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EXTRAS = ("D", "z", "dt_bias", "state")


def ids(value):
    return str(value).removeprefix("torch.").replace(", ", "x").strip("()")


# (batch, tokens, channels, states): every length near a border of a power of two, each number of states, odd channels.
SHAPES = [
    (1, 1, 8, 8), (5, 2, 24, 16), (2, 7, 40, 32), (5, 15, 64, 16), (1, 16, 96, 64), (2, 17, 136, 16), (2, 31, 24, 128),
    (1, 32, 1024, 16), (2, 33, 64, 8), (3, 63, 40, 16), (1, 64, 96, 32), (2, 65, 136, 64), (4, 100, 24, 16),
    (1, 257, 64, 16), (2, 1000, 40, 16),
]  # fmt: skip
# Enough rows and channels that the GPU is full: the states of a channel are divided otherwise.
WIDE = [
    (2, 40, 1600, 16),
    (5, 33, 1344, 16),
    (5, 18, 2720, 16),
    (7, 33, 4096, 16),
    (1, 261, 4096, 16),
    (2, 150, 4096, 16),
    (1, 133, 4096, 64),
    (2, 19, 1600, 64),
    (7, 17, 4096, 64),
    (5, 260, 4096, 16),  # backward, segments of a row wait for one another
]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(scans, device, shape, dtype):
    number = SHAPES.index(shape)
    if dtype == FP16 and (shape[3] != 16 or shape[1] > 300):
        pytest.skip("16-bit types differ in their conversions alone")
    if scans.small and (shape[1] > 300 or shape[2] > 200 or dtype == FP16):
        pytest.skip("too slow here")
    # Each optional input is there and missing, in every combination; a missing z is a kernel of its own, so for N 16.
    choice = number + (5 if dtype == BF16 else 0)
    without = [name for k, name in enumerate(EXTRAS) if choice >> k & 1 and (name != "z" or shape[3] == 16)]
    scans.check(scans.problem(*shape, dtype, device, seed=number, without=without), dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=ids)
@pytest.mark.parametrize("shape", WIDE, ids=ids)
def test_equals_the_reference_when_the_gpu_is_full(scans, device, shape, dtype):
    if scans.small:
        pytest.skip("too slow here")
    if dtype == FP32 and shape[3] == 64:
        pytest.skip("covered in 16 bits")
    batch, length = shape[:2]
    seq_idx = (torch.arange(length) // 7).to(torch.int32).repeat(batch, 1).to(device)
    seq_idx[0, -3:] = -1
    scans.check(scans.problem(*shape, dtype, device, seed=1, seq_idx=seq_idx), dtype, seq_idx)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=ids)
@pytest.mark.parametrize("decay", [None, -1e-6, -16.0], ids=["A-mixed", "A-near-0", "A-fast"])
@pytest.mark.parametrize("bias", [None, -20.0, 20.0], ids=["dt-mixed", "dt-near-0", "dt-large"])
def test_steps_and_decays_at_their_ends(scans, device, dtype, decay, bias):
    seq_idx = torch.tensor(
        [[0] * 50, [0] * 20 + [1] * 13 + [2] * 17, [0] * 44 + [-1] * 6], dtype=torch.int32, device=device
    )
    inputs = scans.problem(3, 50, 40, 16, dtype, device, seed=2, bias=bias, decay=decay, seq_idx=seq_idx)
    scans.check(inputs, dtype, seq_idx)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=ids)
@pytest.mark.parametrize(
    "decay, bias", [(-16.0, 2.0), (-16.0, None), (None, None), (None, 2.0), (-0.01, -3.0)], ids=str
)
def test_states_that_forget_within_a_segment_and_states_that_do_not(scans, device, decay, bias, dtype):
    length = 300 if scans.small else 900
    seq_idx = torch.stack([torch.zeros(length), torch.arange(length) // 170, torch.arange(length) // 13]).int()
    seq_idx[0, 100:140] = -1
    seq_idx = seq_idx.to(device)
    inputs = scans.problem(3, length, 40, 16, dtype, device, seed=14, bias=bias, decay=decay, seq_idx=seq_idx)
    inputs["u"][:, : length // 2] *= 100  # what is forgotten was larger than what stays
    inputs["g_y"][:, length // 2 :] *= 100
    scans.check(inputs, dtype, seq_idx)


def test_gates_and_inputs_of_any_size(scans, device):
    inputs = scans.problem(2, 40, 64, 16, FP32, device, seed=3)
    inputs["z"] *= torch.tensor([0.0, 1e-3, 20, 100], device=device).repeat(16)
    inputs["u"] *= torch.tensor([1e4, 1, 1e-4, 0], device=device).repeat_interleave(16)
    inputs["dt"][:, ::5] = 30.0
    inputs["dt"][:, 1::5] = -60.0
    scans.check(inputs, FP32)


def rows_of_documents(length):
    """Document numbers with a reset, or padding, at every kind of position; one row each. Time may be cut every 80, or
    in chunks of a power of two.
    """
    t = torch.arange(length)
    zero = torch.zeros(length, dtype=torch.long)
    random = torch.Generator().manual_seed(0)
    grows = (torch.rand(length, generator=random) < 0.2) * torch.randint(1, 4, (length,), generator=random)
    middle = (t >= 20) & (t < 25)
    long = (t >= 10) & (t < 55)
    rows = {
        "one document": zero,
        "a first number above 0": zero + 7,
        "reset at the second token": t.clamp(max=1),
        "reset at the last token": (t == length - 1).long(),
        "reset at every token": t,
        "resets at borders of 16": t // 16,
        "resets behind borders of 16": (t + 15) // 16,
        "resets before borders of 16": (t + 1) // 16,
        "resets at borders of 8": t // 8,
        "resets at borders of 64": t // 64,
        "random, with gaps": grows.cumsum(0) + 3,
        "padding at the end": torch.where(t >= length - 17, -1, t // 9),
        "padding at the start": torch.where(t < 5, -1, 3 + t // 30),
        "long padding at the start": torch.where(t < 37, -1, 2),
        "padding inside a document": torch.where(middle, -1, 4),
        "padding before a reset": torch.where(middle, -1, (t >= 25).long()),
        "padding before a reset, and one inside": torch.where(middle, -1, (t >= 23).long()),
        "long padding inside a document": torch.where(long, -1, 1),
        "long padding before a reset": torch.where(long, -1, t // 50),
        "nothing but padding": zero - 1,
        "every second token is padding": torch.where(t % 2 == 1, -1, t // 6),
        "padding at the start, then a reset at every token": torch.where(t < 18, -5, t),
        "one token in the middle": torch.where(t == 33, 2, -1),
        "the first token alone": torch.where(t == 0, 0, -1),
        "the last token alone": torch.where(t == length - 1, 9, -1),
        "resets at borders of 80": t // 80,
        "resets before borders of 80": (t + 1) // 80,
        "resets behind borders of 80": (t + 79) // 80,
        "padding over a border of 80, inside a document": torch.where((t >= 75) & (t < 170), -1, 2),
        "padding over a border of 80, before a reset": torch.where((t >= 70) & (t < 81), -1, t // 75),
        "padding up to a border of 80, then a reset": torch.where((t >= 33) & (t < 80), -1, t // 80),
        "padding up to behind the last border": torch.where(t < 161, -1, t // 164),
    }
    return list(rows), torch.stack(list(rows.values())).to(torch.int32)


@pytest.mark.parametrize("state", [True, False], ids=["continued", "begun"])
@pytest.mark.parametrize("dtype, states", [(FP32, 16), (BF16, 16), (FP32, 64), (FP16, 16)], ids=ids)
@pytest.mark.parametrize("length", [70, 200])
def test_documents_and_padding_at_every_kind_of_position(scans, device, length, dtype, states, state):
    if length == 200 and state != (dtype == FP32):
        pytest.skip("covered by the shorter rows")
    if scans.small and (states != 16 or dtype == FP16):
        pytest.skip("too slow here")
    names, seq_idx = rows_of_documents(length)
    seq_idx = seq_idx.to(device)
    without = () if state else ("state", "D")
    inputs = scans.problem(*seq_idx.shape, 40, states, dtype, device, seed=4, seq_idx=seq_idx, without=without)
    found, wanted = scans.check(inputs, dtype, seq_idx)
    # A wrong token drowns in the norm of 30 rows, so each row is judged too. Padding is exactly 0.
    pad = seq_idx < 0
    limit = 2e-5 if dtype == FP32 else 8e-3
    for name in ("y", "last", "d_u", "d_dt", "d_B", "d_C", "d_z", "d_state"):
        if name in found:
            bad = [
                f"{n}: {e:.1e}"
                for n, e in zip(names, scans.relative(found[name], wanted[name], 0).tolist(), strict=True)
                if not e <= limit
            ]
            assert not bad, f"{name}: {bad}"
            assert found[name].shape[1] != pad.shape[1] or (found[name][pad] == 0).all(), f"{name} isn't 0 at padding"
    assert not state or torch.equal(
        found["last"][names.index("nothing but padding")], inputs["state"][names.index("nothing but padding")]
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=ids)
def test_many_documents_in_long_rows(scans, device, dtype):
    length = 300 if scans.small else 800
    random = torch.Generator().manual_seed(1)
    grows = (torch.rand(3, length, generator=random) < 0.02).cumsum(1)
    padded = torch.rand(3, length // 10, generator=random).repeat_interleave(10, 1) < 0.1
    grows[2] = 0  # one document, whose state lives through all of it
    seq_idx = torch.where(padded, -1, grows).to(torch.int32).to(device)
    inputs = scans.problem(3, length, 24, 16, dtype, device, seed=13, bias=-5.0, seq_idx=seq_idx)
    scans.check(inputs, dtype, seq_idx)


def views(inputs, shift):
    """The same numbers as views: u and z halves of one tensor, B and C slices of a wider one, `shift` numbers in."""
    batch, length, channels = inputs["u"].shape
    states = inputs["B"].shape[2]
    uz = torch.cat([inputs["u"], inputs["z"]], -1)
    wide = inputs["B"].new_full((batch, length, 2 * states + shift + 5), 7.0)
    wide[:, :, shift : shift + 2 * states] = torch.cat([inputs["B"], inputs["C"]], -1)
    early = inputs["dt"].transpose(0, 1).contiguous().transpose(0, 1)  # time is the outer dimension
    B, C = wide[:, :, shift : shift + 2 * states].chunk(2, -1)
    u, z = uz.chunk(2, -1)
    assert not (u.is_contiguous() or early.is_contiguous() or B.is_contiguous()) and channels > 1
    return {**inputs, "u": u, "z": z, "B": B, "C": C, "dt": early}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=ids)
@pytest.mark.parametrize("shift", [0, 8, 16, 3], ids=lambda n: f"shift-{n}")
def test_views_give_the_same_bits(scans, device, dtype, shift):
    inputs = scans.problem(2, 37, 72, 16, dtype, device, seed=5)
    want = scans.run(scans.ours, inputs)
    got = scans.run(scans.ours, views(inputs, shift))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_other_strides_give_the_same_bits(scans, device):
    inputs = scans.problem(2, 20, 40, 16, FP32, device, seed=6)
    for name in ("A", "state", "g_state"):  # the last two dimensions are swapped in memory
        inputs[name] = inputs[name].mT.contiguous().mT
    inputs["g_y"] = torch.ones((), device=device).expand(2, 20, 40)
    inputs["u"] = torch.cat([inputs["u"]] * 2, 1)[:, ::2]
    inputs["B"] = inputs["B"][:1].expand(2, -1, -1)
    inputs["D"] = torch.stack([inputs["D"]] * 3, 1)[:, 1]
    want = scans.run(scans.ours, {n: x.contiguous() for n, x in inputs.items()})
    got = scans.run(scans.ours, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_states_in_fp32_beside_16_bit_inputs(scans, device):
    inputs = scans.problem(2, 40, 64, 16, BF16, device, seed=7)
    inputs["B"], inputs["C"] = inputs["B"].float() * 1.001, inputs["C"].float() * 1.001
    scans.check(inputs, BF16)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=ids)
def test_the_same_bits_every_time(scans, device, dtype):
    shape = (1, 33, 72, 16) if scans.small else (5, 300, 1024, 16)
    inputs = scans.problem(*shape, dtype, device, seed=8)
    first = scans.run(scans.ours, inputs)
    for _ in range(1 if scans.small else 4):
        again = scans.run(scans.ours, inputs)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_same_bits_with_and_without_gradients(scans, device):
    inputs = scans.problem(2, 35, 40, 16, BF16, device, seed=9)
    want = scans.run(scans.ours, inputs)
    tensors = [inputs[n] for n in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    with torch.no_grad():
        y, last = scans.ours(*tensors, state=inputs["state"])
    assert torch.equal(y, want["y"]) and torch.equal(last, want["last"])
    assert not y.requires_grad


def test_gradients_of_one_input_or_of_one_result_alone(scans, device):
    inputs = scans.problem(2, 35, 40, 16, FP32, device, seed=10)
    want = scans.run(scans.ours, inputs)
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
    for name in names:
        x = {n: inputs[n].detach().requires_grad_(n == name) for n in names}
        state = x.pop("state")
        y, last = scans.ours(*x.values(), state=state)
        leaf = state if name == "state" else x[name]
        (got,) = torch.autograd.grad((y, last), leaf, (inputs["g_y"], inputs["g_state"]))
        assert torch.equal(got, want[f"d_{name}"]), name
    # Only the final state has a gradient, then only y: their sum is the gradient through both.
    total = {}
    for part in ("g_y", "g_state"):
        x = {n: inputs[n].detach().requires_grad_() for n in names}
        state = x.pop("state")
        y, last = scans.ours(*x.values(), state=state)
        result = y if part == "g_y" else last
        for n, g in zip(
            names, torch.autograd.grad(result, [*x.values(), state], inputs[part], allow_unused=True), strict=True
        ):
            total[n] = total.get(n, 0) + (0 if g is None else g)
    for n in names:
        assert scans.relative(total[n], want[f"d_{n}"]) < 1e-5, n


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=ids)
@pytest.mark.parametrize("cuts", [[35, 35], [1, 16, 15, 17, 1, 20], [64, 6], [3] * 23 + [1]], ids=ids)
def test_chunks_through_the_state_equal_the_whole(scans, device, dtype, cuts):
    """Results and gradients, the latter flowing back through the states."""
    seq_idx = torch.zeros(2, 70, dtype=torch.int32, device=device)
    seq_idx[1, 10:19] = -1  # padding belongs to no document, so that it may stand at a cut
    inputs = scans.problem(2, 70, 40, 16, dtype, device, seed=11, seq_idx=seq_idx)

    def chunked(u, dt, A, B, C, D, z, dt_bias, *, state, seq_idx):
        ys = []
        for parts in zip(*(x.split(cuts, 1) for x in (u, dt, B, C, z, seq_idx)), strict=True):
            u_, dt_, B_, C_, z_, numbers = parts
            y, state = scans.ours(u_, dt_, A, B_, C_, D, z_, dt_bias, state=state, seq_idx=numbers)
            ys.append(y)
        return torch.cat(ys, 1), state

    scans.check(inputs, dtype, seq_idx, chunked)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=ids)
@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 24, 16), (3, 136, 64), (2, 1024, 128), (64, 40, 32)], ids=ids)
def test_a_step_equals_a_scan_of_one_token(scans, device, shape, dtype):
    from moai_core import scan

    batch, channels, states = shape
    without = [name for k, name in enumerate(EXTRAS[:3]) if batch >> k & 1]
    inputs = scans.problem(batch, 3, channels, states, dtype, device, seed=12, without=without)
    state, wanted = inputs["state"], inputs["state"].double()
    given = state.clone()
    for t in range(3):
        now = {n: None if inputs[n] is None else inputs[n][:, t] for n in ("u", "dt", "B", "C", "z")}
        wide = {n: None if inputs[n] is None else inputs[n].double() for n in ("A", "D", "dt_bias")}
        with torch.no_grad(), scans.poisoned():
            # One token of a longer tensor, so rows lie apart.
            y, new = scan.step(
                now["u"],
                now["dt"],
                inputs["A"],
                now["B"],
                now["C"],
                inputs["D"],
                now["z"],
                inputs["dt_bias"],
                state,
                backend="cuda",
            )
        want, wanted = scans.reference(
            *(None if x is None else x.double()[:, None] if x.ndim == 2 and x is not wide["A"] else x
              for x in (now["u"], now["dt"], wide["A"], now["B"], now["C"], wide["D"], now["z"], wide["dt_bias"])),
            state=wanted,
        )  # fmt: skip
        assert y.dtype == dtype and new.dtype == FP32 and y.shape == now["u"].shape
        assert scans.relative(y, want[:, 0]) < (1e-5 if dtype == FP32 else 4e-3)
        assert scans.relative(new, wanted) < 1e-5
        if t == 0:
            assert torch.equal(state, given), "the step changed the state that it was given"
        state = new


@pytest.mark.parametrize("shape", [(2, 0, 16, 8), (0, 5, 16, 8)], ids=ids)
def test_nothing_to_scan(scans, device, shape):
    x = scans.problem(*shape, FP32, device)
    state = x["state"].requires_grad_()
    y, last = scans.ours(x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"], x["z"], x["dt_bias"], state=state)
    assert y.shape == shape[:3] and torch.equal(last, state)
    (got,) = torch.autograd.grad(last, state, x["g_state"])
    assert torch.equal(got, x["g_state"])


def test_what_the_kernels_cannot_do_is_refused(scans, device):
    for shape, dtype, why in [
        ((1, 4, 12, 16), FP32, "multiple of 8"),
        ((1, 4, 16, 5), FP32, "states"),
        ((1, 4, 16, 16), torch.float64, "float64"),
    ]:
        inputs = scans.problem(*shape, dtype, device, without=("g_y", "g_state"))
        tensors = [inputs[n] for n in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")]
        with pytest.raises(UsageError, match=why):
            scans.ours(*tensors, state=inputs["state"])
