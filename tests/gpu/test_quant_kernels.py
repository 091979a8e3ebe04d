"""Products with int4 and int8 matrices on a CUDA GPU against float64, with NaN in memory that a kernel has to fill. Run
on a machine with one: `pytest -m gpu tests/gpu/test_quant_kernels.py`.
"""

from __future__ import annotations

import pytest
import torch

from moai_core import cuda
from moai_core.quant import cuda as kernel
from moai_core.quant import cuda_ops
from moai_core.quant.cuda_ops import Shape
from moai_core.quant.formats import FORMATS, Spec, decode

pytestmark = pytest.mark.gpu

B, H, S = torch.bfloat16, torch.float16, torch.float32
# A result rounded once: 2^-9 at most, 2^-10 or so on average; sums of tensor cores lose a little more than fp32 ones.
TOLERANCE = {S: 5e-6, B: 3.5e-3, H: 5e-4}


@pytest.fixture(autouse=True)
def _can_run(device):
    if reason := cuda.why_not(device):
        pytest.skip(reason)


def draw(device, *shape, dtype=S, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def matrix(device, spec, out, columns, seed=0):
    """(stored tensors, their values in fp32) of a random matrix with an outlier, an empty row and zeros of its own."""
    weight = draw(device, out, columns, seed=seed) + (0.0 if spec.symmetric else 0.3)
    weight[0, 3], weight[out - 1] = 9.0, 0.0
    stored = FORMATS[spec.format].encode(spec, weight)
    if "zeros" in stored:  # trained ones are no integers
        stored["zeros"] = stored["zeros"] + draw(device, *stored["zeros"].shape, dtype=H, seed=1)
    return stored, decode(spec, stored)


def judge(found, wanted, factor=1.0):
    error = float((found.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-300))
    assert found.shape == wanted.shape and error <= factor * TOLERANCE[found.dtype], (error, found.dtype)


# format, group, symmetric, rows, columns: odd rows, columns that fill no unit, no multiple of 8, every group.
MATRICES = [
    ("int4", 128, True, 33, 384), ("int4", 64, True, 96, 192), ("int4", 32, True, 17, 416), ("int4", 256, True, 64, 512),
    ("int4", 0, True, 40, 130), ("int4", 128, False, 50, 256), ("int4", 64, False, 31, 320), ("int4", 32, False, 8, 96),
    ("int4", 0, False, 65, 90), ("int8", 0, True, 70, 300), ("int8", 0, True, 1, 128), ("int8", 128, True, 48, 256),
    ("int8", 32, True, 20, 160),
]  # fmt: skip


@pytest.mark.parametrize("form, group, symmetric, out, columns", MATRICES)
def test_decoded_values_are_those_of_the_format(device, poisoned, form, group, symmetric, out, columns):
    spec = Spec(form, group, symmetric)
    stored, values = matrix(device, spec, out, columns)
    prepared = kernel.prepare(spec, stored)
    for dtype in (S, B, H):
        with poisoned():
            found = kernel.values(spec, prepared, out, columns, dtype)
        assert torch.equal(found, values.to(dtype))


@pytest.mark.parametrize("form, group, symmetric, out, columns", MATRICES)
@pytest.mark.parametrize("dtype", [B, H, S])
def test_few_rows(device, poisoned, form, group, symmetric, out, columns, dtype):
    spec = Spec(form, group, symmetric)
    stored, values = matrix(device, spec, out, columns)
    prepared = kernel.prepare(spec, stored)
    for m in (1, 3, 8) if dtype == B else (2,):
        x = draw(device, m, columns, dtype=dtype, seed=m)
        with poisoned():
            found, again = (kernel.linear(spec, prepared, x, out) for _ in range(2))
        assert found.dtype == dtype and torch.equal(found, again)
        judge(found, x.double() @ values.double().t())


@pytest.mark.parametrize("m", [*range(1, 10), 15, 16, 17, 24, 32, 33, 64, 65, 100, 128, 129])
@pytest.mark.parametrize("form, group", [("int4", 128), ("int8", 0)])
def test_every_number_of_rows(device, poisoned, form, group, m):
    spec = Spec(form, group)
    stored, values = matrix(device, spec, 48, 256)
    x = draw(device, m, 256, dtype=B, seed=m)
    with poisoned():
        found = kernel.linear(spec, kernel.prepare(spec, stored), x, 48)
    judge(found, x.double() @ values.double().t(), factor=1.0 if m < cuda_ops.DENSE_FROM else 1.5)


@pytest.mark.parametrize("dtype, m", [(H, 11), (S, 9), (S, 20)])
def test_more_rows_in_other_types(device, poisoned, dtype, m):
    spec = Spec("int4", 64, False)
    stored, values = matrix(device, spec, 40, 320)
    x = draw(device, m, 320, dtype=dtype)
    with poisoned():
        found = kernel.linear(spec, kernel.prepare(spec, stored), x, 40)
    judge(found, x.double() @ values.double().t())


@pytest.mark.parametrize("mt, nt, pieces, stages, warps, rows", [
    (1, 1, 1, 2, 4, 1), (1, 1, 2, 4, 2, 3), (2, 1, 1, 2, 3, 7), (2, 1, 1, 1, 16, 8), (1, 2, 5, 3, 1, 9), (2, 2, 1, 2, 2, 16),
    (1, 4, 2, 2, 2, 30), (2, 4, 1, 1, 4, 32), (3, 1, 1, 2, 5, 1), (5, 1, 1, 1, 5, 6),
])  # fmt: skip
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_every_division_of_the_work(device, poisoned, form, mt, nt, pieces, stages, warps, rows):
    spec = Spec(form, 128 if form == "int4" else 0)
    out, columns, m = 116, 640, rows + 2
    stored, values = matrix(device, spec, out, columns)
    prepared, layout = kernel.prepare(spec, stored), kernel.layout(spec)
    x = draw(device, m, columns, dtype=B)
    shape = Shape(m, -(-out // 16), columns // 128, 2, layout)
    few = cuda_ops.gpu(device.index)._replace(multiprocessors=2)  # blocks have several tiles to do
    chosen = cuda_ops.divide(shape, few, mt, nt, pieces, stages, warps, 1, rows)
    if chosen is None:
        pytest.skip("needs more shared memory than this GPU has")
    assert chosen.grid[0] == 2 and chosen.grid[1] > 1
    with poisoned():
        found = cuda_ops.launch(x, *prepared, out, layout, chosen)
    judge(found, x.double() @ values.double().t())


# nt, wm, wk, stages, split, mt, wo
TILES = [(2, 1, 2, 4, 1, 2, 4), (4, 1, 4, 3, 1, 2, 2), (8, 2, 1, 2, 1, 2, 4), (1, 1, 1, 2, 1, 1, 2), (6, 1, 2, 4, 3, 2, 4),
         (8, 2, 1, 4, 2, 2, 4), (2, 1, 2, 2, 8, 1, 4)]  # fmt: skip


@pytest.mark.parametrize(
    "form, group, symmetric", [("int4", 128, True), ("int4", 32, False), ("int4", 0, False), ("int8", 0, True)]
)
@pytest.mark.parametrize("division", TILES)
def test_every_division_into_tiles(device, poisoned, form, group, symmetric, division):
    nt, wm, wk, stages, split, mt, wo = division
    if split > 1 and not cuda_ops.gpu(device.index).clusters:
        pytest.skip("needs clusters of blocks")
    spec = Spec(form, group, symmetric)
    chosen = cuda_ops.Tiles(nt, wm, wk, stages, split, 1, mt, wo)
    out, columns, m = 150, (1152 if split > 1 else 512) - 32 * (group != 128), chosen.rows + 5
    stored, values = matrix(device, spec, out, columns)
    prepared, x = kernel.prepare(spec, stored), draw(device, m, columns, dtype=B)
    with poisoned():
        found, again = (cuda_ops.launch_tiles(x, *prepared, out, kernel.layout(spec), chosen) for _ in range(2))
    assert torch.equal(found, again)
    judge(found, x.double() @ values.double().t())


def test_weights_are_in_memory_once(device):
    for spec in (Spec("int4", 128), Spec("int8", 0)):
        stored, _ = matrix(device, spec, 40, 256)
        prepared = kernel.prepare(spec, stored)
        assert prepared.weights.data_ptr() == stored["qweight"].data_ptr()
        assert prepared.scales.numel() <= 2 * stored["scales"].numel()


def test_rows_have_nothing_to_do_with_each_other(device):
    spec = Spec("int4", 128)
    stored, values = matrix(device, spec, 48, 256)
    prepared = kernel.prepare(spec, stored)
    for m in (2, 5, 9, 20):
        x = draw(device, m, 256, dtype=B)
        x[m // 2] = float("nan")
        found = kernel.linear(spec, prepared, x, 48)
        others = [i for i in range(m) if i != m // 2]
        assert found[m // 2].isnan().all()
        judge(found[others], x[others].double() @ values.double().t())


def test_inputs_that_lie_apart_or_askew(device):
    spec = Spec("int4", 64)
    stored, values = matrix(device, spec, 48, 192)
    prepared = kernel.prepare(spec, stored)
    wide = draw(device, 4, 400, dtype=B)
    for x in (wide[:, 8:200], wide[:, 3:195], draw(device, 192, 4, dtype=B).t(), wide[:, ::2][:, :192], wide[:0, :192]):
        before = x.clone()
        found = kernel.linear(spec, prepared, x, 48)
        judge(found, x.double() @ values.double().t())
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [B, H, S])
def test_large_and_tiny_numbers(device, dtype):
    spec = Spec("int4", 128)
    stored, _ = matrix(device, spec, 32, 256)
    stored["scales"][3:6] = torch.tensor([6e-8, 6e4, 1e-5], dtype=H, device=device)[:, None]
    values, x = decode(spec, stored), draw(device, 2, 256, dtype=dtype)
    x[:, 10] = torch.tensor([3e4, 1e-7], dtype=dtype, device=device)
    found = kernel.linear(spec, kernel.prepare(spec, stored), x, 32)
    wanted = (x.double() @ values.double().t()).to(dtype).double()  # infinite where fp16 has no room
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite) and finite.sum() >= 60
    judge(found[finite], wanted[finite], factor=1.5)


@pytest.mark.parametrize("m", [2, 130])
@pytest.mark.parametrize("dtype", [B, S])
def test_gradient_of_the_input(device, poisoned, m, dtype):
    spec = Spec("int4", 32, False)
    stored, values = matrix(device, spec, 40, 160)
    x = draw(device, m, 160, dtype=dtype).requires_grad_()
    y = kernel.linear(spec, kernel.prepare(spec, stored), x, 40)
    d_y = draw(device, m, 40, dtype=dtype, seed=4)
    with poisoned():
        (d_x,) = torch.autograd.grad(y, x, d_y)
    judge(d_x, d_y.double() @ values.double(), factor=1.5)


def test_a_cuda_graph_holds_it(device):
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    spec = Spec("int4", 128)
    stored, values = matrix(device, spec, 512, 1024)
    prepared = kernel.prepare(spec, stored)
    x = draw(device, 4, 1024, dtype=B)
    for m in (4, 200):
        x = draw(device, m, 1024, dtype=B)
        kernel.linear(spec, prepared, x, 512)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = kernel.linear(spec, prepared, x, 512)
        x.copy_(draw(device, m, 1024, dtype=B, seed=7))
        graph.replay()
        judge(y, x.double() @ values.double().t(), factor=1.5)


@pytest.mark.parametrize("out, m", [(1024, 2), (8192, 1), (8192, 8), (1024, 20), (4096, 100)])
def test_launches_that_overlap_see_what_the_one_before_wrote(device, out, m):
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("needs compute capability 9.0")
    spec = Spec("int4", 128)
    matrices = [matrix(device, spec, out, 1024, seed)[0] for seed in range(8)]
    for stored in matrices:
        stored["scales"] /= 32  # so that numbers neither grow nor vanish
    prepared, x = [kernel.prepare(spec, stored) for stored in matrices], draw(device, m, 1024, dtype=B)
    launch = cuda_ops.launch if m <= 8 else cuda_ops.launch_tiles
    torch.cuda.synchronize()

    def chain(overlap):
        found = []
        y = x
        for i in range(64):  # each reads what the one before wrote
            y = launch(y[:, -1024:], *prepared[i % 8], out, kernel.layout(spec), overlap=overlap)
            found.append(y)
        return torch.stack(found)

    wanted = chain(False)
    assert wanted.isfinite().all() and wanted[-1].unique().numel() > 32  # more or less of size 1
    for _ in range(20):
        assert torch.equal(chain(True), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(True)
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


def test_operators_under_tracing(device):
    spec = Spec("int4", 128)
    stored, _ = matrix(device, spec, 40, 128)
    prepared, layout = kernel.prepare(spec, stored), kernel.layout(spec)
    x = draw(device, 2, 128, dtype=B)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cuda_ops.linear, (x.clone().requires_grad_(), *prepared, 40, *layout), test_utils=tests)
    torch.library.opcheck(cuda_ops.decode, (*prepared, 40, 128, *layout, B), test_utils=tests)


def test_layers_take_it_and_may_give_up_what_is_stored(device):
    from moai_core.quant.linear import QuantEmbedding, QuantLinear, TiedHead

    for spec in (Spec("int4", 64, False), Spec("int8", 0)):
        stored, values = matrix(device, spec, 40, 192)
        layer = QuantLinear(192, 40, spec).to(device)
        for name, tensor in stored.items():
            setattr(layer, name, tensor)
        layer.kernel = "cuda"
        x = draw(device, 2, 3, 192, dtype=B).requires_grad_()
        y = layer(x)
        judge(y.flatten(0, 1), x.detach().flatten(0, 1).double() @ values.double().t())
        d_y = draw(device, 2, 3, 40, dtype=B)
        (d_x,) = torch.autograd.grad(y, x, d_y)
        judge(d_x, d_y.double() @ values.double(), factor=1.5)
        layer.release(B)  # the kernel reads the stored weights, but scales in an order of its own
        assert layer.scales.numel() == 0 and torch.equal(layer(x.detach()), y)
        assert torch.equal(torch.autograd.grad(layer(x), x, d_y)[0], d_x)
    embedding = QuantEmbedding(40, 192, spec).to(device)
    for name, tensor in stored.items():
        setattr(embedding, name, tensor)
    embedding.kernel = "cuda"
    judge(TiedHead(embedding)(x.detach()).flatten(0, 1), x.detach().flatten(0, 1).double() @ values.double().t())
