"""`moai doctor`: what it reports, and that whatever is broken makes it exit 1."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from moai_core import scan
from moai_core.bench import install, selftest


def test_it_reports_and_passes(moai):
    code, out, _ = moai("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["ok"] is True
    versions = {v["name"]: v for v in report["versions"]}
    assert versions["torch"]["version"] == torch.__version__ and versions["torch"]["ok"] is True
    assert {"python", "transformers", "tokenizers", "numba", "mamba-ssm", "bitsandbytes", "wandb"} <= set(versions)
    absent = [v for v in report["versions"] if v["version"] is None]
    assert all(v["ok"] is None and v["hint"].startswith("pip install 'moai[") for v in absent)
    assert report["devices"][0]["name"] == "cpu" and report["devices"][0]["memory"] > 0
    picked = [(b["operation"], b["backend"]) for b in report["backends"] if b["device"] == "cpu" and b["picked"]]
    assert [op for op, _ in picked] == ["scan", "conv", "decode"] and picked[-1] == ("decode", "plain")
    assert all(b["why_not"] for b in report["backends"] if not b["picked"])
    tested = {(t["operation"], t["backend"]) for t in report["self_test"]}
    assert set(picked[:-1]) <= tested and all(t["ok"] and 0 < t["backward"] < 1e-5 for t in report["self_test"])
    products = {p["format"]: p for p in report["products"] if p["device"] == "cpu"}
    assert {"int4", "int8", "fp8", "nvfp4", "nf4"} <= set(products) and all(p["ok"] for p in products.values())
    assert "fp8" in products["fp8"]["description"] and products["fp8"]["why_not"]["scaled_mm"]
    code, out, _ = moai("doctor", "--seed", "3")
    assert code == 0 and "picked" in out and "errors relative to float64; seed 3" in out


@pytest.mark.parametrize("fault", ["forward", "backward", "nan", "raises"])
def test_a_backend_that_is_wrong_is_found(moai, monkeypatch, fault):
    module = next(m for m in scan.BACKENDS.values() if m.why_not(torch.device("cpu"), torch.float32, op="scan") is None)
    right = module.scan

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    def wrong(*args, **options):
        if fault == "raises":
            raise RuntimeError("no kernel image\nis available")
        y, state = right(*args, **options)
        if fault == "backward":
            return Skewed.apply(y), state
        return (y * 1.001 if fault == "forward" else y + float("nan")), state

    monkeypatch.setattr(module, "scan", wrong)
    code, out, _ = moai("doctor", "--json")
    report = json.loads(out)
    bad = [t for t in report["self_test"] if not t["ok"]]
    assert code == 1 and report["ok"] is False and len(bad) == 1 and bad[0]["operation"] == "scan"
    if fault == "raises":
        assert bad[0]["why"] == "RuntimeError: no kernel image is available"
    if fault == "backward":
        assert bad[0]["forward"] < 1e-5 and bad[0]["backward"] > bad[0]["tolerance"]
    code, out, _ = moai("doctor")
    assert code == 1 and "BROKEN" in out and "1 broken" in out


def test_a_torch_that_does_not_load_is_a_finding(moai, monkeypatch):
    monkeypatch.setitem(sys.modules, "moai_core.bench.selftest", None)
    monkeypatch.delattr("moai_core.bench.selftest", raising=False)
    code, out, _ = moai("doctor", "--json")
    broken = [v for v in json.loads(out)["versions"] if v["ok"] is False]
    assert code == 1 and broken[0]["name"] == "moai_core.scan" and "can't be imported" in broken[0]["why"]
    code, out, _ = moai("doctor")
    assert code == 1 and "can't be imported" in out


def test_versions_out_of_range(monkeypatch):
    have = {"torch": "2.5.1", "numba": None, "bitsandbytes": "0.40"}

    def version(name):
        if have.get(name, "999") is None:
            raise install.importlib.metadata.PackageNotFoundError(name)
        return have.get(name, "999")

    monkeypatch.setattr(install.importlib.metadata, "version", version)
    found = {v["name"]: v for v in install.versions()}
    assert found["torch"]["ok"] is False and found["torch"]["why"].startswith("needs >=2.1")
    assert found["numba"]["ok"] is False and found["numba"]["why"] == "not installed"
    assert found["bitsandbytes"]["ok"] is None and found["bitsandbytes"]["hint"] == "pip install 'moai[quant]'"


def test_a_cache_that_cannot_be_written(moai, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path / "file" / "cache"))
    code, out, _ = moai("doctor", "--json")
    cache = next(f for f in json.loads(out)["folders"] if f["name"] == "cache")
    assert code == 1 and cache["ok"] is False and "not writable" in cache["why"] and "MOAI_CACHE" in cache["hint"]


def test_a_fallback_is_one_line(moai, monkeypatch):
    line = "the scan on cuda:0 falls back to 'reference'; the backend 'cuda' refuses: too old [7.5]"
    monkeypatch.setattr(scan, "fallback", lambda device, dtype: line)
    code, out, _ = moai("doctor", "--json")
    assert code == 0 and json.loads(out)["fallbacks"] == [line]
    code, out, _ = moai("doctor")
    assert code == 0 and line in out.splitlines()


@pytest.mark.gpu
def test_gpu_backends_pass():
    found = list(selftest.self_tests("cuda:0", 0))
    assert found and all(t["ok"] for t in found), found


def test_a_bare_checkout(monkeypatch):
    def nothing(name):
        raise install.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install.importlib.metadata, "requires", nothing)
    assert [(v["name"], v["ok"]) for v in install.versions()] == [("python", True), ("moai", None)]
