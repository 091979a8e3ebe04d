"""What `moai quantize --format` writes, loaded by other people's code: transformers with compressed-tensors, and with
GPTQModel and optimum (extra `gptq`), where they are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, checkpoint
from moai_core.convert import folder as hf
from moai_core.convert import interchange
from moai_core.quantize.disk import quantize_folder
from moai_core.quantize.plan import Settings

pytestmark = pytest.mark.slow
IDS = torch.randint(512, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "time_step_rank": 8,
    }
    model = MoaiMambaForCausalLM(MoaiMambaConfig(**sizes, initializer_range=0.1)).eval()
    return checkpoint.save_model(tmp_path_factory.mktemp("plain") / "model", model)


def quantize(plain: Path, layout: str, *, symmetric: bool = True, bits: int = 4) -> Path:
    folder = plain.parent / f"{layout}-{symmetric}-{bits}"
    # int8 is symmetric always, and refuses to be told so.
    settings = Settings("int4", bits, 64, symmetric if bits == 4 else None, layout=layout)
    quantize_folder(plain, folder, settings, force=True)
    return folder


def load(folder: Path, **more):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **more).eval()


@torch.no_grad()
def distance(model, folder: Path) -> float:
    """Of its logits from those of the exactly decoded weights."""
    exact = interchange.open_runtime(folder, "decoded").logits(IDS[0].tolist())
    found = model(IDS, use_cache=False).logits[0].float()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(bits, plain):
    pytest.importorskip("compressed_tensors")
    folder = quantize(plain, "compressed-tensors", bits=bits)
    assert distance(load(folder, dtype=torch.float32), folder) < 1e-6


def test_compressed_tensors_with_zero_points(plain):
    """transformers (5.23) expects them unpacked unless it decodes the weights while it loads them, in fp16."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    folder = quantize(plain, "compressed-tensors", symmetric=False)
    model = load(folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert distance(model, folder) < 2e-3


@pytest.mark.parametrize(("symmetric", "bits"), [(True, 4), (False, 4), (True, 8)])
def test_gptq(symmetric, bits, plain):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import GPTQConfig

    folder = quantize(plain, "gptq", symmetric=symmetric, bits=bits)
    exact = hf.read_tensors(folder)
    model = load(folder, dtype=torch.float16, quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
    assert len(layers) == 18  # three layers of five, and the null layer's feed-forward
    for name, module in layers.items():
        weight = exact[f"{name}.weight"].load()
        assert (module.dequantize_weight().float().T - weight).abs().max() <= 2**-11 * weight.abs().max(), name
    assert distance(model, folder) < 5e-3
    # GPTQModel's own choice on a processor multiplies in bf16
    assert distance(load(folder, dtype=torch.bfloat16), folder) < 0.03


def test_awq(plain):
    """GPTQModel's own choice on a processor (7.6) stops at inputs that aren't contiguous, as Jamba's are."""
    pytest.importorskip("gptqmodel")
    from transformers import AwqConfig

    folder = quantize(plain, "awq", symmetric=False)
    model = load(folder, dtype=torch.float16, quantization_config=AwqConfig(bits=4, backend="torch_awq"))
    assert "Awq" in type(model.model.layers[0].mamba.in_proj).__name__
    assert type(model.model.layers[0].mamba.x_proj) is torch.nn.Linear
    assert distance(model, folder) < 5e-3
