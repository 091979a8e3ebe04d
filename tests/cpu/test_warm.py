"""Kernels compiled by another process, and programs of kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moai_core import cpu
from moai_core.cpu import warm


def test_every_kernel_of_an_answer_is_known():
    for module, kernel in (one for kind in warm.KERNELS.values() for one in kind):
        assert callable(getattr(cpu.load(module), kernel))


def test_it_waits_for_names_and_not_for_a_process_that_died(monkeypatch):
    said = "print('moai_core.scan.cpu_conv_kernels conv_forward')\n"
    helper = warm.Helper.__new__(warm.Helper)
    helper.left = set(warm.KERNELS["plain"])
    helper.process = subprocess.Popen([sys.executable, "-c", said], stdout=subprocess.PIPE, text=True)
    helper.wait("moai_core.scan.cpu_conv_kernels", "conv_forward")
    assert ("moai_core.scan.cpu_conv_kernels", "conv_forward") not in helper.left
    helper.wait("moai_core.scan.cpu_kernels", "scan_forward")
    assert not helper.left
    helper.process.wait()


def test_nothing_is_started_where_the_cache_is_full_or_there_is_one_core(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cpu, "helpers", [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    warm.begin()
    assert cpu.helpers == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    warm._mark("plain").touch()
    warm.begin()
    assert cpu.helpers == []
    started = []
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(warm, "Helper", lambda kind: started.append(kind) or kind)
    warm.begin(quantized=True)
    assert cpu.helpers == started == ["quantized"]
    warm.begin(quantized=True)
    assert len(started) == 1 and os.environ["OMP_WAIT_POLICY"] == "ACTIVE", "what the user says counts"


def test_files_of_the_current_folder_are_not_imported(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numba.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    one = warm.Helper("quantized")
    one.wait(*warm.KERNELS["quantized"][0])
    one.process.kill()
    one.process.wait()
    assert one.left == set(warm.KERNELS["quantized"][1:]) and not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_other_process_needs_no_torch_and_fills_the_cache(tmp_path):
    program = """
import sys
from moai_core.cpu import warm
warm.main("plain")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert [tuple(line.split()) for line in done.stdout.splitlines()] == warm.KERNELS["plain"]
    assert len(list(tmp_path.glob("*/all-plain-*"))) == 1


@pytest.mark.parametrize("team", [True, False], ids=["openmp", "python-threads"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_operations_of_a_program_wait_for_one_another(team, threads, monkeypatch):
    """A chain of sums, each of all that the one before it made, a hundred times."""
    import torch

    from moai_core.cpu.program import Operation, Program

    if not team:
        monkeypatch.setattr(cpu, "team", lambda: None)
    monkeypatch.setattr(cpu, "SMALL", 0)
    rows, width = 40, 64
    x = torch.ones(1, width)
    weight = torch.ones(rows, width) / width
    back = torch.ones(width, rows) / rows
    y = torch.empty(1, rows)
    there = (1, rows, width, 1, weight.data_ptr(), x.data_ptr(), 0, y.data_ptr(), 0)
    here = (1, width, rows, 1, back.data_ptr(), y.data_ptr(), 0, x.data_ptr(), 0)
    one = Operation("moai_core.model.step_kernels", "dense", rows, 1, there)
    other = Operation("moai_core.model.step_kernels", "dense", width, 1, here)
    program = Program([one, other] * 100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for start in (1.0, 3.0):
            x.fill_(start)
            y.fill_(float("nan"))
            program.run()
            torch.testing.assert_close(x, torch.full_like(x, start))
            torch.testing.assert_close(y, torch.full_like(y, start))
    finally:
        torch.set_num_threads(before)


def test_a_program_finds_out_how_many_threads_are_faster(monkeypatch):
    from moai_core.cpu import program as programs

    clock, cost, seen = [0.0], {1: 1.0, 2: 2.0}, []

    def start(entry, address, threads):
        seen.append(threads)
        clock[0] += cost[threads]

    monkeypatch.setattr(cpu, "threads", lambda: 2)
    monkeypatch.setattr(cpu, "start", start)
    monkeypatch.setattr(programs.time, "perf_counter", lambda: clock[0])
    slots = (1, 1, 1, 1, 0, 0, 0, 0, 0)
    program = programs.Program([programs.Operation("moai_core.model.step_kernels", "dense", 1, 1 << 30, slots)])
    for _ in range(40):
        program.run()
    assert seen[0] == 2 and set(seen[10:]) == {1}
    cost[2] = 0.5
    for _ in range(50):
        program.run()
    assert set(seen[-5:]) == {2}
