"""What can be said of the GPU's integer kernels without a GPU: the order of weights, the division of the work, refusals.

The products themselves are tested in tests/gpu/test_quant_kernels.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moai_core import cuda
from moai_core.quant import cuda as kernel
from moai_core.quant import cuda_ops, kernels
from moai_core.quant.cuda_ops import Gpu, Layout, Shape
from moai_core.quant.formats import FORMATS, Spec, unpack4

# Multiprocessors and shared memory of an H100, an A100, an RTX 4090.
GPUS = [Gpu(132, 228 << 10, 227 << 10), Gpu(108, 164 << 10, 163 << 10), Gpu(128, 100 << 10, 99 << 10)]


def element(weights, spec, row, column):
    """The stored integer, looked up as quant_linear.cu describes the order."""
    tile, unit, second, g = row // 16, column // 128, row % 16 // 8, row % 8
    half, inside = column % 128 // 32, column % 32
    lane, step, pair, low = g * 4 + inside // 8, inside % 8 // 4, inside % 4 // 2, inside % 2
    if spec.format == "int8":
        word = weights[tile, unit, :2048].view("<u4").reshape(4, 32, 4)[half, lane, 2 * step + pair]
        return int(np.int8(word >> (16 * low + 8 * second) & 255))
    word = weights[tile, unit, :1024].view("<u4").reshape(2, 32, 4)[half // 2, lane, half % 2 * 2 + step]
    return int(word >> (16 * low + 4 * (2 * pair + second)) & 15)


@pytest.mark.parametrize("spec", [Spec("int4", 64, False), Spec("int8", 0), Spec("int8", 128), Spec("int4", 0)])
def test_weights_lie_where_the_kernel_looks(spec):
    rows, columns = 39, 384
    stored = FORMATS[spec.format].encode(spec, torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))
    before = {name: t.clone() for name, t in stored.items()}
    prepared = kernel.prepare(spec, stored)
    assert all(torch.equal(stored[name], t) for name, t in before.items())
    q = stored["qweight"] if spec.format == "int8" else unpack4(stored["qweight"])
    weights = prepared.weights.numpy()
    assert weights.shape == (4, 3, kernel.layout(spec).part)
    rng = np.random.default_rng(0)
    for row, column in zip(rng.integers(0, rows, 400), rng.integers(0, columns, 400), strict=True):
        assert element(weights, spec, int(row), int(column)) == int(q[row, column])


def test_a_pair_has_gate_and_up_side_by_side():
    spec = Spec("int4", 128)
    gate, up = (FORMATS["int4"].encode(spec, torch.randn(20, 128)) for _ in range(2))
    weights = kernel.prepare_pair(spec, gate, up).weights.numpy()
    assert weights.shape[0] == 4
    for row in range(20):
        for second, one in enumerate((gate, up)):
            place = row // 8 * 16 + 8 * second + row % 8
            assert element(weights, spec, place, 77) == int(unpack4(one["qweight"])[row, 77])


@pytest.mark.parametrize("gpu", GPUS, ids=["h100", "a100", "rtx4090"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_size_of_model_has_a_division_that_fits(gpu, itemsize):
    widths = [(8192, 2048), (2048, 4096), (11264, 2048), (2048, 5632), (128000, 2048), (160, 4096), (4096, 8192),
              (4096, 6016), (5120, 10240), (32, 16384), (16, 128)]  # fmt: skip
    for out, columns in widths:
        for layout in (Layout(4, 1, False), Layout(4, 4, True), Layout(8, 0, False)):
            tiles, units = -(-out // 32) * 2, -(-columns // 128)
            for m in (*range(1, 34), 64, 100, 128):
                p = cuda_ops.plan(Shape(m, tiles, units, itemsize, layout), gpu)
                assert p.shared <= gpu.shared_of_block and 1 <= p.warps <= p.most_warps <= 16
                assert p.rows <= 8 * p.nt and p.grid[1] * p.rows >= m > (p.grid[1] - 1) * p.rows
                assert p.grid[0] <= -(-tiles // p.mt) and tiles % p.mt == 0
                assert 32 * p.warps % (p.mt * layout.rows) == 0  # every thread keeps its row of the result


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
