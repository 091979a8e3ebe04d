"""What can be said of the GPU's integer kernels without a GPU: the order of scales, the division of the work, refusals.

The products themselves are tested in tests/gpu/test_quant_kernels.py.
"""

from __future__ import annotations

import pytest
import torch

from moai_core import cuda
from moai_core.quant import cuda as kernel
from moai_core.quant import cuda_ops, kernels
from moai_core.quant.cuda_ops import Gpu, Layout, Shape
from moai_core.quant.formats import FORMATS, Spec

# Multiprocessors, shared memory and clusters of an H100, an A100, an RTX 4090.
GPUS = [
    Gpu(132, 228 << 10, 227 << 10, True),
    Gpu(108, 164 << 10, 163 << 10, False),
    Gpu(128, 100 << 10, 99 << 10, False),
]
WIDTHS = [(8192, 2048), (2048, 4096), (11264, 2048), (2048, 5632), (128000, 2048), (160, 4096), (4096, 8192),
          (4096, 6016), (5120, 10240), (32, 16384), (16, 128)]  # fmt: skip
LAYOUTS = [Layout(4, 1, False), Layout(4, 4, True), Layout(8, 0, False)]


@pytest.mark.parametrize("columns", [512, 250])
@pytest.mark.parametrize(
    "spec", [Spec("int4", 64, False), Spec("int8", 0), Spec("int4", 128), Spec("int4", 256), Spec("int4", 0, False)]
)
def test_weights_stay_and_scales_lie_where_the_kernel_looks(spec, columns):
    if spec.group_size and columns % spec.group_size:
        pytest.skip("such a matrix isn't stored")
    rows, draws = 39, torch.Generator().manual_seed(1)
    stored = FORMATS[spec.format].encode(spec, torch.randn(rows, columns, generator=draws))
    before = {name: t.clone() for name, t in stored.items()}
    weights, scales = kernel.prepare(spec, stored)
    assert all(torch.equal(stored[name], t) for name, t in before.items())
    q = stored["qweight"].view(torch.uint8)
    assert weights.shape[1] % 16 == 0 and torch.equal(weights[:, : q.shape[1]], q)
    assert (weights.data_ptr() == stored["qweight"].data_ptr()) == (q.shape[1] % 16 == 0)
    groups, kinds = kernel.layout(spec).groups, [stored[name] for name in ("scales", "zeros") if name in stored]
    assert scales.numel() == 48 * (-(-columns // 128) * groups or 1) * len(kinds)
    for row in range(rows):
        for column in range(0, columns, 32):
            unit, inside = divmod(column, 128)
            at = scales[row // 16, unit, inside * groups // 128] if groups else scales[row // 16]
            place = at.reshape(8, len(kinds), 2)[row % 8, :, row % 16 // 8]
            group = column // (spec.group_size or columns)
            assert torch.equal(place, torch.stack([kind[row, group] for kind in kinds]))


@pytest.mark.parametrize("gpu", GPUS, ids=["h100", "a100", "rtx4090"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_size_of_model_has_a_division_that_fits(gpu, itemsize):
    for out, columns in WIDTHS:
        for layout in LAYOUTS:
            tiles, units = -(-out // 16), -(-columns // 128)
            for m in (*range(1, 34), 64, 100, 128):
                p = cuda_ops.plan(Shape(m, tiles, units, itemsize, layout), gpu)
                assert p.shared <= gpu.shared_of_block and 1 <= p.warps <= 16
                assert p.rows <= 8 * p.nt and p.grid[1] * p.rows >= m > (p.grid[1] - 1) * p.rows
                assert p.grid[0] <= -(-tiles // p.mt) and p.mt <= p.warps and p.stages >= 1
                assert p.units >= units or p.units % p.warps == 0


@pytest.mark.parametrize("gpu", GPUS, ids=["h100", "a100", "rtx4090"])
def test_some_dozens_of_rows_have_one_too(gpu):
    for out, columns in WIDTHS:
        for layout in LAYOUTS:
            for m in (9, 16, 17, 33, 64, 65, 100, 128, 200):
                shape = Shape(m, -(-out // 16), -(-columns // 128), 2, layout)
                p = cuda_ops.tiles(shape, gpu)
                assert p.shared(layout) <= gpu.shared_of_block and p.threads <= 512 and p.stages >= 2
                assert 1 <= p.split <= (8 if gpu.clusters else 1) and p.split <= shape.units and 4 % p.wk == 0


def test_refusals_name_the_reason(monkeypatch):
    cpu = torch.device("cpu")
    assert "CUDA GPUs" in kernel.why_not(Spec("int4"), cpu, torch.bfloat16)
    assert "fp8" in kernel.why_not(Spec("fp8", 0), cpu, torch.bfloat16)
    assert "float64" in kernel.why_not(Spec("int4"), cpu, torch.float64)
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    for group in (0, 32, 64, 128, 256, 1024):
        assert kernel.why_not(Spec("int4", group), cpu, torch.bfloat16) is None
    assert "48" in kernel.why_not(Spec("int4", 48), cpu, torch.bfloat16)
    assert "16" in kernel.why_not(Spec("int8", 16), cpu, torch.bfloat16)


def test_it_is_asked_first():
    assert kernels.KERNELS[0] == "cuda"
    assert "128" in kernel.describe(Spec("int4"), torch.device("cpu"), torch.bfloat16)
