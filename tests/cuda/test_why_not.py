"""The sentence with which moai's kernels refuse a machine, each with the machine played by a stand-in."""

from __future__ import annotations

import pytest
import torch

from moai_core import cuda
from moai_core.cuda import driver, nvrtc


@pytest.fixture
def machine(monkeypatch):
    """A function that plays a GPU and its software; fitting ones unless told otherwise."""

    def play(capability=(9, 0), compiler_version=(13, 0), driver_version=(13, 0), found=True, gpu=True, hip=None):
        compiler = object.__new__(nvrtc.Compiler)
        compiler.version, compiler.architectures = compiler_version, [75, 80, 86, 89, 90]

        def load():
            if not found:
                raise nvrtc.NotFound("its compiler NVRTC is not installed: pip install something")
            return compiler

        monkeypatch.setattr(nvrtc, "load", load)
        monkeypatch.setattr(driver, "version", lambda: driver_version)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", f"{driver_version[0]}.{driver_version[1]}")
        for name, value in (("is_available", gpu), ("current_device", 0), ("get_device_name", "Some GPU")):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        cuda._refusal.cache_clear()

    yield play
    cuda._refusal.cache_clear()


def test_a_fitting_gpu_is_not_refused(machine):
    machine()
    assert cuda.why_not(torch.device("cuda", 0)) is cuda.why_not(torch.device("cuda")) is cuda.why_not() is None


@pytest.mark.parametrize(
    "what, sentence",
    [
        ({"gpu": False}, "torch finds no CUDA GPU on this machine"),
        ({"hip": "7.0"}, "it needs an NVIDIA GPU; this torch is built for ROCm"),
        ({"capability": (7, 5)}, "it needs compute capability 8.0 or newer, and Some GPU has 7.5"),
        ({"found": False}, "its compiler NVRTC is not installed: pip install something"),
        (
            {"capability": (12, 0)},
            "NVRTC 13.0 is too old for compute capability 12.0: install a torch of a newer CUDA",
        ),
        (
            {"driver_version": (12, 8)},
            "NVRTC 13.0 is newer than the driver, which knows CUDA 12.8: pip install 'nvidia-cuda-nvrtc-cu12==12.8.*'",
        ),
    ],
)
def test_the_sentence(machine, what, sentence):
    machine(**what)
    assert cuda.why_not(torch.device("cuda", 0)) == cuda.why_not() == sentence


def test_other_devices():
    assert cuda.why_not(torch.device("cpu")) == "it runs on CUDA GPUs only, not on cpu"


@pytest.mark.parametrize(
    "version, wheel",
    [
        ("13.0", "nvidia-cuda-nvrtc==13.0.*"),
        ("12.8", "nvidia-cuda-nvrtc-cu12==12.8.*"),
        (None, "nvidia-cuda-nvrtc==13"),
    ],
)
def test_nothing_found_names_the_wheel(monkeypatch, version, wheel):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    with pytest.raises(nvrtc.NotFound, match="NVRTC, a part of torch's CUDA wheels, is not installed") as caught:
        nvrtc.load.__wrapped__()
    assert f"pip install '{wheel}" in str(caught.value)


def test_the_answer_is_kept(machine, monkeypatch):
    machine(capability=(7, 5))
    first = cuda.why_not(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: pytest.fail("asked again"))
    assert cuda.why_not(torch.device("cuda", 0)) == first
