"""Products with int4 and int8 matrices on a processor, against float64 with the stored weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moai_core import cpu as machine
from moai_core.quant import cpu, kernels, linear
from moai_core.quant.formats import FORMATS, Spec

CPU = torch.device("cpu")
SPECS = [
    Spec("int4", 128),
    Spec("int4", 128, symmetric=False),
    Spec("int4", 32),
    Spec("int4", 64, symmetric=False),
    Spec("int4", 256),
    Spec("int4", 0),
    Spec("int8", 0),
    Spec("int8", 128),
]
NAMES = [f"{spec.format}-{spec.group_size}{'' if spec.symmetric else '-asymmetric'}" for spec in SPECS]


def problem(spec: Spec, out: int, columns: int, rows: int, seed: int = 0):
    """Stored tensors, x, and the product in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator) / 10
    stored = FORMATS[spec.format].encode(spec, weight)
    if "zeros" in stored:  # trained ones are no whole numbers
        stored["zeros"] = stored["zeros"] + torch.rand(stored["zeros"].shape, generator=generator).half()
    x = torch.randn(rows, columns, generator=generator)
    return stored, x, x.double() @ FORMATS[spec.format].decode(spec, stored).double().T


def apart(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize(("out", "columns", "rows"), [(64, 256, 1), (100, 512, 3), (17, 1024, 7), (48, 768, 33)])
def test_against_float64(spec, out, columns, rows):
    stored, x, wanted = problem(spec, out, columns, rows)
    prepared = cpu.prepare(spec, stored)
    y = cpu.linear(spec, prepared, x, out)
    assert y.dtype == x.dtype and y.shape == (rows, out)
    assert apart(y, wanted) < 5e-5
    alone = torch.cat([cpu.linear(spec, prepared, row[None], out) for row in x])
    assert torch.equal(alone, y), "a row's result depends on the rows beside it"


@pytest.mark.parametrize("spec", [Spec("int4", 0), Spec("int8", 0)], ids=["int4", "int8"])
def test_rows_of_any_length(spec):
    for columns in (2, 34, 100, 2080):
        stored, x, wanted = problem(spec, 40, columns, 18)
        assert apart(cpu.linear(spec, cpu.prepare(spec, stored), x, 40), wanted) < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_own_rounding(dtype):
    spec = Spec("int4", 128)
    stored, x, _ = problem(spec, 80, 512, 5)
    x = x.to(dtype)
    wanted = x.double() @ FORMATS["int4"].decode(spec, stored).double().T
    y = cpu.linear(spec, cpu.prepare(spec, stored), x, 80)
    assert y.dtype == dtype
    assert apart(y, wanted) < 1.2 * apart(wanted.to(dtype), wanted) + 5e-5


@pytest.mark.parametrize("rows", [1, 40])
def test_outliers_stay_within_their_group(rows):
    """A number a million times the others costs only its own group, and no more than a ten-thousandth."""
    spec = Spec("int4", 64)
    stored, x, _ = problem(spec, 32, 256, rows)
    x[:, 70] = 1e6
    wanted = x.double() @ FORMATS["int4"].decode(spec, stored).double().T
    assert apart(cpu.linear(spec, cpu.prepare(spec, stored), x, 32), wanted) < 1e-4


@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_not_finite_shows(rows):
    spec = Spec("int8", 0)
    stored, x, _ = problem(spec, 20, 128, rows)
    prepared = cpu.prepare(spec, stored)
    for bad in (float("nan"), float("inf"), -float("inf")):
        poisoned = x.clone()
        poisoned[0, 5] = bad
        y = cpu.linear(spec, prepared, poisoned, 20)
        assert y[0].isnan().all()
        assert torch.equal(y[1:], cpu.linear(spec, prepared, x, 20)[1:])


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_zeros_and_the_smallest_numbers_are_zeros(rows):
    spec = Spec("int4", 32)
    stored, x, _ = problem(spec, 20, 64, rows)
    for tiny in (0.0, 1e-38, 1e-45):
        assert torch.equal(
            cpu.linear(spec, cpu.prepare(spec, stored), torch.full_like(x, tiny), 20), torch.zeros(rows, 20)
        )


def test_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(machine, "SMALL", 0)
    spec, before = Spec("int4", 128), torch.get_num_threads()
    stored, x, _ = problem(spec, 300, 256, 70)
    prepared = cpu.prepare(spec, stored)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([cpu.linear(spec, prepared, x[:rows], 300) for rows in (1, 5, 70)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_views_as_inputs():
    spec = Spec("int4", 64)
    stored, x, _ = problem(spec, 48, 128, 6)
    prepared = cpu.prepare(spec, stored)
    wanted = cpu.linear(spec, prepared, x, 48)
    wide = torch.cat([torch.full((6, 3), float("nan")), x, torch.full((6, 5), float("nan"))], 1)
    assert torch.equal(cpu.linear(spec, prepared, wide[:, 3:131], 48), wanted)
    assert torch.equal(cpu.linear(spec, prepared, x.T.contiguous().T, 48), wanted)
    assert cpu.linear(spec, prepared, x[:0], 48).shape == (0, 48)


def test_refusals_are_sentences():
    assert cpu.why_not(Spec("int4"), CPU, torch.float32) is None
    assert "CPU only, not on cuda" in cpu.why_not(Spec("int4"), torch.device("cuda"), torch.float32)
    assert "not fp8" in cpu.why_not(Spec("fp8", 0), CPU, torch.float32)
    assert "float64" in cpu.why_not(Spec("int8"), CPU, torch.float64)
    assert kernels.pick(Spec("int4"), CPU, torch.bfloat16) is cpu
    assert "16-bit integers" in kernels.describe(Spec("int4"), CPU, torch.float32)


def test_loaded_numbers_are_those_that_multiply():
    """A layer that has multiplied already gets others."""
    layer = linear.QuantLinear(64, 8, Spec("int4", 32))
    x = torch.randn(3, 64)
    for seed in (0, 1):
        stored, _, _ = problem(layer.spec, 8, 64, 1, seed)
        layer.load_state_dict(stored)
        wanted = x.double() @ FORMATS["int4"].decode(layer.spec, stored).double().T
        assert apart(layer(x), wanted) < 5e-5


PROGRAM = """
import torch
from moai_core import cpu as machine
from moai_core.quant import cpu
from moai_core.quant.formats import FORMATS, Spec
machine.settings()
from moai_core.cpu import instructions
assert instructions.DOT == "{dot}", instructions.DOT
assert instructions.amx() is not None
torch.manual_seed(0)
for spec in (Spec("int4", 64), Spec("int4", 32, symmetric=False), Spec("int8", 0)):
    stored = FORMATS[spec.format].encode(spec, torch.randn(40, 192))
    for rows in (1, 2, 21):
        x = torch.randn(rows, 192) * 100 ** torch.randn(192)
        wanted = x.double() @ FORMATS[spec.format].decode(spec, stored).double().T
        y = cpu.linear(spec, cpu.prepare(spec, stored), x, 40)
        assert (y.double() - wanted).norm() < 1e-4 * wanted.norm()
        torch.save(y, r"{folder}/" + f"{{spec.format}}-{{spec.symmetric}}-{{rows}}.pt")
"""


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(tmp_path):
    """Code for lesser processors, run on this one."""
    host = {"avx2": "+avx2,+fma,+f16c", "avxvnni": "+avx2,+fma,+f16c,+avxvnni"}
    host["avx512vnni"] = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx2,+fma,+f16c"
    if sys.platform != "linux" or not has_all(host.values()):
        pytest.skip("needs a processor with all of them")
    results = {}
    for dot, features in host.items():
        folder = tmp_path / dot
        folder.mkdir()
        environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
        program = PROGRAM.format(dot=dot, folder=folder)
        subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=environment)
        results[dot] = {path.name: torch.load(path) for path in folder.glob("*.pt")}
    for found in results.values():
        assert all(torch.equal(found[name], results["avx512vnni"][name]) for name in results["avx512vnni"])


def has_all(lists) -> bool:
    needed = {word[1:] for features in lists for word in features.split(",")}
    machine.settings()
    from moai_core.cpu import instructions

    return needed <= instructions.features()
