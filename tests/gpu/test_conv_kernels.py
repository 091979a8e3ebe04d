"""The kernels of the convolution and of one-token steps against the float64 reference: values, states, every gradient,
documents, padding, and what they promise as PyTorch operators.

`pytest -m gpu tests/gpu/test_conv_kernels.py`; needs a CUDA GPU, or a device on which `moai_core.cuda` doesn't refuse
to run (MOAI_TEST_DEVICE).
"""

from __future__ import annotations

import pytest
import torch

from moai_core import cuda
from moai_core.scan import reference
from moai_core.scan.cuda_conv import conv, conv_of_half, conv_step
from moai_core.scan.cuda_step import STATES, step

pytestmark = pytest.mark.gpu

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 1e-5, BF16: 4e-3, FP16: 1e-3}
TYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)]  # of u, of the weight
NAMES = ("u", "weight", "bias", "state")


@pytest.fixture(autouse=True)
def _kernels_or_skip(device):
    if reason := cuda.why_not(device):
        pytest.skip(reason)


@pytest.fixture
def poison():
    """Memory that torch hands out is full of NaN."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


def relative(found, wanted) -> float:
    """||found - wanted|| / ||wanted||; NaN where `found` has one, 0 for two zeros."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def problem(batch, length, channels, width, types, device, *, seq_idx=None, state=True, bias=True, half=False, seed=0):
    """Inputs of a convolution by name, `seq_idx` and the gradients of its results; padding holds NaN. half: u is the
    first half of rows twice as wide, as behind a projection.
    """
    made = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=types[0]):
        return torch.randn(shape, generator=made).to(dtype)

    x = {
        "u": normal(batch, length, channels * (2 if half else 1)),
        "weight": normal(channels, 1, width, dtype=types[1]) / width**0.5,
        "bias": normal(channels, dtype=types[1]) if bias else None,
        "state": normal(batch, channels, width - 1) if state else None,
        "d_y": normal(batch, length, channels),
        "d_last": normal(batch, channels, width - 1),
    }
    if seq_idx is not None:
        x["u"][seq_idx < 0] = float("nan")
        x["d_y"][seq_idx < 0] = float("nan")
    x["seq_idx"] = seq_idx
    return {name: None if value is None else value.to(device) for name, value in x.items()}


def run(function, x, dtype=None):
    """{name: y, last and the gradient of each input}; `dtype` is what it computes in."""
    leaves = {n: None if x[n] is None else x[n].detach().to(dtype or x[n].dtype).requires_grad_() for n in NAMES}
    channels = x["weight"].shape[0]
    y, last = function(
        leaves["u"][..., :channels], leaves["weight"], leaves["bias"], state=leaves["state"], seq_idx=x["seq_idx"]
    )
    live = {n: leaf for n, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad((y, last), list(live.values()), (x["d_y"].to(y.dtype), x["d_last"].to(last.dtype)))
    found = {"y": y.detach(), "last": last.detach(), **{f"d_{n}": g for n, g in zip(live, grads, strict=True)}}
    found["d_u"] = found["d_u"][..., :channels]
    return found


def check(x, types):
    """Runs the kernels and the reference in float64; asserts that no result is beyond its tolerance."""
    found, wanted = run(conv, x), run(reference.conv, x, torch.float64)
    loop = None
    for name, want in wanted.items():
        rounded = types[1] if name in ("d_weight", "d_bias") else types[0]
        assert found[name].dtype == rounded, f"{name} is {found[name].dtype}"
        limit = max(TOLERANCE[t] for t in {types[0], rounded})
        if want.numel() < 256:
            limit *= 2  # few numbers: rounding doesn't average out
        error = relative(found[name], want)
        if not error <= limit and limit < 1e-4:
            loop = loop or run(reference.conv, x, FP32)
            limit = max(limit, 2 * relative(loop[name], want))
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"
    return found


def numbering(batch, length, share, seed=0):
    """Document numbers that begin anywhere, with gaps; a token begins a document with probability `share`. Odd rows may
    end in padding, the third row is nothing else.
    """
    made = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=made)

    grows = (torch.rand(batch, length, generator=made) < share) * integers(1, 4, batch, length)
    numbers = grows.cumsum(1) + integers(0, 5, batch, 1)
    for row in range(1, batch, 2):
        numbers[row, int(integers(0, length + 1)) :] = -1
    if batch > 2:
        numbers[2] = -1
    return numbers.to(torch.int32)


SHAPES = [  # batch, length, channels, width
    (1, 1, 8, 4),
    (2, 2, 8, 4),
    (3, 3, 24, 4),
    (1, 17, 264, 4),
    (4, 67, 40, 4),
    (2, 33, 16, 2),
    (2, 40, 16, 3),
    (3, 47, 24, 5),
    (2, 50, 8, 8),
    (1, 700, 8, 4),
]


@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(t)[6:] for t in types))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_states_and_gradients(device, poison, shape, types):
    batch, length, *_ = shape
    check(problem(*shape, types, device, seed=1), types)
    check(problem(*shape, types, device, state=False, bias=False, half=True, seed=2), types)
    for share in (0.03, 0.3):
        numbers = numbering(batch, length, share, seed=3)
        check(problem(*shape, types, device, seq_idx=numbers, half=True, seed=4), types)
    check(problem(*shape, types, device, seq_idx=numbers, state=False, seed=5), types)


@pytest.mark.parametrize("length", [15, 64, 129, 300])
def test_runs_of_any_length(device, poison, length, monkeypatch):
    """How long the runs are that a tensor is cut into shows in no bit but those of sums over time."""
    for types, numbers in (((FP32, FP32), None), ((BF16, BF16), numbering(4, length, 0.02, seed=7))):
        x = problem(4, length, 8, 4, types, device, seq_idx=numbers, seed=8)
        results = []
        for steps in (128, 64, 32, 16, 8):
            monkeypatch.setattr("moai_core.scan.cuda_conv._RUNS", (steps,))
            results.append(check(x, types))
        for name in ("y", "last", "d_u", "d_state"):
            assert all(torch.equal(results[0][name], other[name]) for other in results), name


@pytest.mark.parametrize("width", [2, 4, 7])
def test_documents_that_begin_at_every_position(device, poison, width):
    length = 37
    numbers = (torch.arange(length) >= torch.arange(length)[:, None]).to(torch.int32)  # row r: a document begins at r
    check(problem(length, length, 8, width, (FP32, FP32), device, seq_idx=numbers), (FP32, FP32))
    ends = torch.where(torch.arange(length) > torch.arange(length)[:, None], -1, numbers)  # and is one token long
    check(problem(length, length, 8, width, (FP32, FP32), device, seq_idx=ends.int()), (FP32, FP32))
    each = torch.arange(length).expand(2, -1).to(torch.int32)
    check(problem(2, length, 8, width, (FP32, FP32), device, seq_idx=each), (FP32, FP32))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_padding_is_inert(device, poison, dtype):
    numbers = torch.zeros(3, 41, dtype=torch.int32)
    for row, real in ((0, 23), (1, 0), (2, 1)):
        numbers[row, real:] = -1
    x = problem(3, 41, 16, 4, (dtype, dtype), device, seq_idx=numbers)
    found = check(x, (dtype, dtype))
    assert torch.equal(found["last"][1], x["state"][1]) and torch.equal(found["d_state"][1], x["d_last"][1])
    assert torch.equal(found["last"][2], torch.cat([x["state"][2, :, 1:], x["u"][2, :1].T], 1))
    for name in ("y", "d_u"):
        assert not found[name][x["seq_idx"] < 0].any(), f"{name} isn't 0 at padding"
    y, last = conv(x["u"][:1, :23], x["weight"], x["bias"], state=x["state"][:1])
    assert torch.equal(found["y"][:1, :23], y) and torch.equal(found["last"][:1], last)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_chunks_and_steps_equal_the_whole(device, dtype):
    x = problem(2, 83, 24, 4, (dtype, dtype), device)
    weight, bias, state = x["weight"], x["bias"], x["state"]
    before = state.clone()
    y, last = conv(x["u"], weight, bias, state=state)
    parts = []
    for chunk in x["u"].split([40, 1, 2, 1, 39], dim=1):
        if chunk.shape[1] == 1:
            part, state = conv_step(chunk[:, 0], weight, bias, state)
            part = part[:, None]
        else:
            part, state = conv(chunk, weight, bias, state=state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), y) and torch.equal(state, last)
    assert torch.equal(x["state"], before), "the state passed in was modified"


def test_the_same_bits_twice(device):
    length = 70 if device.type != "cuda" else 5000
    numbers = numbering(5, length, 0.05)
    x = problem(5, length, 264, 4, (BF16, FP32), device, seq_idx=numbers, half=True)
    first, second = run(conv, x), run(conv, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_views_and_absent_gradients(device):
    """u that begins at an odd address, whose channels lie apart, or is expanded; gradients of one result only."""
    x = problem(2, 21, 16, 4, (FP32, FP32), device)
    wide = torch.randn(2, 21, 35, device=device)
    apart = torch.randn(2, 16, 21, device=device).transpose(1, 2)
    same = torch.randn(2, 1, 16, device=device).expand(2, 21, 16)
    for u in (wide[..., 3:19], apart, same):
        assert relative(conv(u, x["weight"], x["bias"])[0], reference.conv(u, x["weight"], x["bias"])[0]) < 1e-5
    for pick in (0, 1):
        grads = []
        for function in (conv, reference.conv):
            leaves = [x[n].detach().clone().requires_grad_() for n in ("u", "weight", "bias", "state")]
            result = function(*leaves[:3], state=leaves[3])[pick].sum()  # its gradient is expanded
            grads.append(torch.autograd.grad(result, leaves, allow_unused=True, materialize_grads=True))
        for found, want in zip(*grads, strict=True):
            assert relative(found, want) < 1e-5


def test_empty(device):
    x = problem(2, 3, 8, 4, (FP32, FP32), device)
    y, last = conv(x["u"][:, :0], x["weight"], x["bias"], state=x["state"])
    assert y.shape == (2, 0, 8) and torch.equal(last, x["state"])


# ---- One token of the scan


@pytest.mark.parametrize("types", [FP32, BF16, FP16, "mixed"], ids=str)
@pytest.mark.parametrize("states", STATES)
def test_scan_step(device, poison, states, types):
    dtype = BF16 if types == "mixed" else types
    batches = (1, 5) if device.type != "cuda" else (1, 5, 300)
    for batch, channels, seed in [(b, i, s) for b in batches for i, s in ((8, 0), (72, 1))]:
        made = torch.Generator().manual_seed(seed)

        def normal(*shape, made=made):
            return torch.randn(shape, generator=made)

        both = normal(batch, 2 * channels).to(dtype).to(device)  # u and z as halves of one product
        BC = normal(batch, 7 + 2 * states).to(dtype).to(device)  # B and C at odd places
        x = {
            "u": both[:, :channels],
            "dt": (normal(batch, channels) * 2 - 3).to(FP32 if types == "mixed" else dtype).to(device),
            "A": -normal(channels, states).exp().to(device),
            "B": BC[:, 7 : 7 + states],
            "C": BC[:, 7 + states :],
            "D": normal(channels).to(device),
            "z": both[:, channels:],
            "dt_bias": normal(channels).to(device),
            "state": normal(batch, channels, states).to(device),
        }
        for absent in ((), ("D", "z", "dt_bias")):
            inputs = {n: None if n in absent else v for n, v in x.items()}
            before = x["state"].clone()
            y, last = step(*inputs.values())
            want_y, want_last = reference.step(*(None if v is None else v.double() for v in inputs.values()))
            assert y.dtype == dtype and last.dtype == FP32
            assert relative(y, want_y) < TOLERANCE[dtype] and relative(last, want_last) < 1e-5
            assert torch.equal(x["state"], before), "the state passed in was modified"


# ---- As PyTorch operators


def operands(x):
    return tuple(x[n] for n in (*NAMES, "seq_idx"))


@pytest.mark.parametrize("bare", [False, True], ids=["everything", "bare"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_opcheck(device, dtype, bare):
    numbers = None if bare else numbering(2, 19, 0.2)
    x = problem(2, 19, 16, 4, (dtype, FP32), device, seq_idx=numbers, state=not bare, bias=not bare)
    x = {n: v.nan_to_num() if v is not None and v.is_floating_point() else v for n, v in x.items()}
    args = operands(x)
    torch.library.opcheck(torch.ops.moai.conv_backward, (*args, x["d_y"], None if bare else x["d_last"]))
    leaves = tuple(a.detach().clone().requires_grad_() if a is not None and a.is_floating_point() else a for a in args)
    torch.library.opcheck(torch.ops.moai.conv_forward, leaves)
    state = torch.randn(2, 16, 3, device=device).to(dtype)
    torch.library.opcheck(torch.ops.moai.conv_step, (x["u"][:, 0].contiguous(), x["weight"], x["bias"], state))


@pytest.mark.parametrize("beside", [True, False], ids=["gradients side by side", "apart"])
@pytest.mark.parametrize("types", TYPES[:3], ids=str)
def test_of_the_first_half(device, poison, types, beside):
    """The same bits as convolution and halves one by one; the gradient of z may lie where both belong."""
    numbers = numbering(2, 19, 0.2)
    x = problem(2, 19, 16, 4, types, device, seq_idx=numbers)
    xz = torch.cat([x["u"].nan_to_num(), torch.randn_like(x["u"])], -1).requires_grad_()
    leaves = [xz, *(x[n].detach().requires_grad_() for n in NAMES[1:])]
    whole = torch.randn(2, 19, 32, device=device).to(types[0])
    d_z = whole[..., 16:] if beside else whole[..., 16:].clone()
    given = [x["d_y"].nan_to_num(), x["d_last"], d_z]

    def one_by_one(xz, weight, bias, state):
        u, z = xz.chunk(2, -1)
        return *conv(u, weight, bias, state=state, seq_idx=x["seq_idx"]), z

    want = one_by_one(*leaves)
    d_want = torch.autograd.grad(want, leaves, [g.clone() for g in given], retain_graph=True)
    (alone,) = torch.autograd.grad(want[0], xz, given[0])
    got = conv_of_half(*leaves[:3], state=leaves[3], seq_idx=x["seq_idx"])
    d_got = torch.autograd.grad(got, leaves, given, retain_graph=True)
    assert all(map(torch.equal, (*got, *d_got), (*want, *d_want)))
    assert (d_got[0].data_ptr() == whole.data_ptr()) == beside
    (only,) = torch.autograd.grad(got[0], xz, given[0], retain_graph=True)
    assert torch.equal(only, alone)
    (only,) = torch.autograd.grad(got[2], xz, given[2].clone())
    assert torch.equal(only[..., 16:], given[2]) and not only[..., :16].any()


def loss(u, weight, bias, state):
    y, last = conv(u * 1.5, weight, bias, state=state)
    return (y * 0.5).square().sum() + last.sin().sum()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile_without_graph_breaks(device, dynamic):
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (19, 30):
        x = problem(2, length, 16, 4, (FP32, FP32), device)
        mine, want = ([x[n].detach().clone().requires_grad_() for n in NAMES] for _ in range(2))
        compiled(*mine).backward()
        loss(*want).backward()
        assert all(relative(a.grad, b.grad) < 1e-5 for a, b in zip(mine, want, strict=True))
    torch.compiler.reset()


def only_cuda(device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_cuda_graph(device, backward):
    only_cuda(device)
    numbers = numbering(2, 61, 0.1)
    static = problem(2, 61, 72, 4, (BF16, BF16), device, seq_idx=numbers, seed=0)
    leaves = {n: static[n].detach().requires_grad_(backward) for n in NAMES}

    def work():
        y, last = conv(*(leaves[n] for n in NAMES[:3]), state=leaves["state"], seq_idx=static["seq_idx"])
        if not backward:
            return [y, last, *conv_step(leaves["u"][:, 0], leaves["weight"], leaves["bias"], leaves["state"])]
        return [y, last, *torch.autograd.grad((y, last), list(leaves.values()), (static["d_y"], static["d_last"]))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    for seed in (1, 2):
        fresh = problem(2, 61, 72, 4, (BF16, BF16), device, seq_idx=numbers, seed=seed)
        with torch.no_grad():
            for name in (*NAMES, "d_y", "d_last"):
                static[name].copy_(fresh[name])
        graph.replay()
        found = [r.detach().clone().nan_to_num() for r in results]
        assert all(torch.equal(a, b.nan_to_num()) for a, b in zip(found, work(), strict=True))


def test_nothing_waits_for_the_gpu(device):
    only_cuda(device)
    x = problem(2, 33, 24, 4, (BF16, FP32), device, seq_idx=numbering(2, 33, 0.1))
    scan = [torch.randn(2, 24, device=device), torch.randn(2, 24, device=device), -torch.rand(24, 16, device=device)]
    scan += [torch.randn(2, 16, device=device), torch.randn(2, 16, device=device), None, None, None]
    scan += [torch.zeros(2, 24, 16, device=device)]

    def work():
        run(conv, x)
        conv_step(x["u"][:, 0], x["weight"], x["bias"], x["state"])
        step(*scan)

    work()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_long_rows(device):
    """2^20 tokens, documents and padding included: each row's end alone gives the same bits."""
    only_cuda(device)
    length, cut = 1 << 20, (1 << 20) - 1003
    numbers = (torch.arange(length) // 777).to(torch.int32).repeat(2, 1)
    numbers[1, -5:] = -1
    x = problem(2, length, 8, 4, (BF16, BF16), device, seq_idx=numbers)
    whole = run(conv, x)
    before = (
        x["u"][:, cut - 3 : cut].transpose(1, 2)
        * (x["seq_idx"][:, cut - 3 : cut] == x["seq_idx"][:, cut, None])[:, None]
    )
    tail = {
        **x,
        "u": x["u"][:, cut:],
        "d_y": x["d_y"][:, cut:],
        "seq_idx": x["seq_idx"][:, cut:].contiguous(),
        "state": before,
    }
    alone = run(conv, tail)
    for name in ("y", "d_u"):
        assert torch.equal(whole[name][:, cut:], alone[name]), name
    assert torch.equal(whole["last"], alone["last"])


def test_more_than_2_to_the_31_numbers(device):
    only_cuda(device)
    batch, length, channels = 2, 1 << 18, 4104
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free memory")
    made = torch.Generator(device).manual_seed(0)
    u = torch.randn(batch, length, channels, generator=made, device=device, dtype=BF16)
    d_y = torch.randn(batch, length, channels, generator=made, device=device, dtype=BF16)
    assert u.numel() > 2**31
    weight = torch.randn(channels, 1, 4, generator=made, device=device)
    y, last = torch.ops.moai.conv_forward(u, weight, None, None, None)
    d_u, *_ = torch.ops.moai.conv_backward(u, weight, None, None, None, d_y, None)
    end = slice(length - 500, length)
    before = u[1:, end.start - 3 : end.start].transpose(1, 2).contiguous()
    want_y, want_last = torch.ops.moai.conv_forward(u[1:, end], weight, None, before, None)
    want, *_ = torch.ops.moai.conv_backward(u[1:, end], weight, None, before, None, d_y[1:, end], None)
    assert torch.equal(y[1:, end], want_y) and torch.equal(last[1:], want_last) and torch.equal(d_u[1:, end], want)
