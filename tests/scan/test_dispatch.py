"""Which backend does a call, and what is said where one can't."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moai_core import cpu as machine
from moai_core import scan as package
from moai_core.errors import UsageError
from moai_core.scan import BACKENDS, conv, conv_step, explain, pick, scan, step

OPERATIONS = ("scan", "conv", "step", "conv_step")


@pytest.mark.parametrize("op", OPERATIONS)
def test_auto_takes_the_fast_one_on_a_processor(op):
    assert pick(torch.device("cpu"), torch.float32, op=op) is BACKENDS["cpu"]
    assert pick("cpu", torch.bfloat16, op=op, state=True, seq_idx=True) is BACKENDS["cpu"]


def test_auto_falls_to_the_reference_where_nothing_else_works():
    assert pick("cpu", torch.float64) is BACKENDS["reference"]
    assert pick("meta", torch.float32) is BACKENDS["reference"]


@pytest.mark.parametrize("name", list(BACKENDS))
def test_every_backend_has_every_operation(name):
    for op in (*OPERATIONS, "why_not"):
        assert callable(getattr(BACKENDS[name], op))


def test_unknown_name_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="unknown scan backend 'fast'") as caught:
        pick("cpu", backend="fast")
    assert caught.value.exit_code == 2
    assert caught.value.hint == "choose one of: auto, cuda, cpu, mamba_ssm, reference"


def test_a_named_backend_is_never_replaced():
    u, A, B = torch.randn(1, 4, 3), -torch.ones(3, 2), torch.randn(1, 4, 2)
    weight, state = torch.randn(3, 1, 4), torch.zeros(1, 3, 2)
    reason = "scan backend 'mamba_ssm' can't be used here: it runs on CUDA only, not on cpu"
    for call in (
        lambda: scan(u, u, A, B, B, backend="mamba_ssm"),
        lambda: conv(u, weight, None, backend="mamba_ssm"),
        lambda: step(u[:, 0], u[:, 0], A, B[:, 0], B[:, 0], None, None, None, state, backend="mamba_ssm"),
        lambda: conv_step(u[:, 0], weight, None, torch.zeros(1, 3, 3), backend="mamba_ssm"),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.message == reason
    with pytest.raises(UsageError, match="scan backend 'cpu' can't be used here: it computes in float32"):
        scan(u.double(), u.double(), A, B, B, backend="cpu")
    with pytest.raises(UsageError, match="'cpu' can't be used here: it runs on the CPU only, not on meta"):
        scan(u.to("meta"), u.to("meta"), A, B, B, backend="cpu")


def test_explain_lists_every_backend_in_order():
    reasons = explain("cpu", torch.float32)
    assert [name for name, _ in reasons] == list(BACKENDS)
    assert dict(reasons)["cpu"] is None and dict(reasons)["reference"] is None
    assert "CUDA only" in dict(reasons)["mamba_ssm"]


def test_integers_suit_no_backend():
    with pytest.raises(UsageError, match=r"no scan backend works on cpu with torch.int64 \(.*; cpu: not torch.int64; "):
        pick("cpu", torch.int64)


def test_without_numba_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    machine.problem.cache_clear()
    pick.cache_clear()
    try:
        assert "numba can't be imported" in dict(explain("cpu"))["cpu"]
        assert pick("cpu") is BACKENDS["reference"]
        with pytest.raises(UsageError, match="scan backend 'cpu' can't be used here: numba can't be imported"):
            pick("cpu", backend="cpu")
    finally:
        machine.problem.cache_clear()
        pick.cache_clear()


def test_a_gpu_without_moais_kernels_names_what_runs_instead(monkeypatch):
    """Whatever the reason (too old, no NVRTC, sizes), one line says it, and other devices say nothing."""
    gpu = torch.device("cuda", 0)
    reason = "it needs compute capability 8.0 or newer, and Tesla T4 has 7.5"
    refusing = SimpleNamespace(why_not=lambda *args, **options: reason)
    packed = SimpleNamespace(why_not=lambda *args, seq_idx=False, **options: "no packing" if seq_idx else None)
    monkeypatch.setattr(
        package, "BACKENDS", {"cuda": refusing, "mamba_ssm": packed, "reference": BACKENDS["reference"]}
    )
    assert package.fallback(gpu) == (
        f"the scan on cuda:0 falls back to 'reference', a loop over time, slow; the backend 'cuda' refuses: {reason}"
    )
    assert package.fallback("cpu") is None
    willing = SimpleNamespace(why_not=lambda *args, **options: None)
    monkeypatch.setattr(package, "BACKENDS", {"cuda": refusing, "other": willing, "reference": BACKENDS["reference"]})
    assert package.fallback(gpu).startswith("the scan on cuda:0 falls back to 'other'; the backend 'cuda' refuses: ")
    monkeypatch.setattr(package, "BACKENDS", {"cuda": willing, "reference": BACKENDS["reference"]})
    assert package.fallback(gpu) is None


def test_documents_by_their_borders():
    borders = torch.tensor([0, 3, 3, 7], dtype=torch.int32)  # the second is empty
    assert package.documents(borders, 9).tolist() == [[0, 0, 0, 2, 2, 2, 2, -1, -1]]
    assert package.documents(torch.tensor([0, 2]), 2).tolist() == [[0, 0]]
    with pytest.raises(UsageError, match=r"\(documents \+ 1,\) \(got \(1, 2\), torch.int64\)"):
        package.documents(torch.tensor([[0, 2]]), 2)
