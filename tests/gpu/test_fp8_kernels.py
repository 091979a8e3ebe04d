"""Rows rounded to e4m3 by a kernel against torch's operations, bit for bit: alone, behind RMSNorm, behind SwiGLU; and a
model that multiplies fp8, whose layers hand over rounded rows, against one where each matrix rounds for itself."""

from __future__ import annotations

import pytest
import torch

from moai_core import cuda
from moai_core.model import fused, fused_fp8
from moai_core.quant import kernels, scaled_mm, scaled_mm_ops
from moai_core.quant.formats import Spec

pytestmark = pytest.mark.gpu
B, H, S = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _can_run(device):
    if reason := cuda.why_not(device):
        pytest.skip(reason)
    kernels.pick.cache_clear()
    yield
    kernels.pick.cache_clear()


def random(device, *shape, dtype, seed=0):
    """Rows of very different sizes; some numbers far below a row's largest."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()
    sizes = torch.logspace(-4, 4, x[..., 0].numel()).reshape(*shape[:-1], 1) if dtype != H else 1.0
    return (x * sizes).to(device, dtype)


def same(codes, scales, y):
    """The codes and scales are those of y's definition."""
    want_codes, want_scales = scaled_mm_ops.definition(y.reshape(-1, y.shape[-1]))
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == want_codes.shape
    assert torch.equal(scales.nan_to_num(), want_scales.nan_to_num())
    bad = want_scales[:, 0].isnan()
    assert torch.equal(scales[:, 0].isnan(), bad) and torch.isnan(codes[bad].float()).all()
    assert torch.equal(codes[~bad].view(torch.uint8), want_codes[~bad].view(torch.uint8))


@pytest.mark.parametrize("dtype", [B, H, S])
@pytest.mark.parametrize(
    "shape", [(37, 2048), (5, 5632), (3, 48), (9, 7), (130, 16), (2, 14336), (1, 24576), (4, 1000)]
)
def test_rows(device, poisoned, shape, dtype):
    x = random(device, *shape, dtype=dtype)
    x[0] = 0
    with poisoned():
        same(*scaled_mm_ops.quantize_rows(x), x)


def test_every_code_and_halfway_between_any_two(device):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([middles, middles * (1 + 2e-7), middles * (1 - 2e-7), codes, codes[1:8] / 64])
    x = torch.cat([near, -near])[None].to(device)
    found, scales = scaled_mm_ops.quantize_rows(x)
    same(found, scales, x)
    assert float(scales) == 1.0 and torch.equal(found.float().abs().amax(), torch.tensor(448.0, device=device))


def test_rows_that_lie_apart_and_what_no_number_is(device):
    x = random(device, 12, 96, dtype=B)
    same(*scaled_mm_ops.quantize_rows(x[::2, 32:]), x[::2, 32:])
    same(*scaled_mm_ops.quantize_rows(x[:, 1:]), x[:, 1:])
    same(*scaled_mm_ops.quantize_rows(x.t()), x.t())
    x[3, 5], x[4, 7] = float("nan"), float("inf")
    codes, scales = scaled_mm_ops.quantize_rows(x)
    keep = [i for i in range(12) if i != 4]
    same(codes[keep], scales[keep], x[keep])
    assert torch.isinf(scales[4]) and torch.isnan(codes[4, 7].float())


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(
    "shape, stream, kind",
    [((9, 2048), B, B), ((2, 5, 4096), S, B), ((3, 5120), B, B), ((7, 64), H, H), ((6, 96), S, H), ((2, 16384), B, B)],
)
def test_norm(device, poisoned, shape, stream, kind, added):
    residual = random(device, *shape, dtype=stream)
    x = random(device, *shape, dtype=kind, seed=1) if added else None
    weight = (1 + random(device, shape[-1], dtype=S, seed=2).clamp(-3, 3) / 4).to(kind)
    with poisoned():
        total, found = fused_fp8.add_rms_norm(residual, x, weight, 1e-5)
        want, y = fused.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(total, want) and found.shape == residual.shape and found.dtype == kind
    same(found.codes, found.scales, y)


@pytest.mark.parametrize("dtype", [B, H])
@pytest.mark.parametrize("shape", [(3, 7, 5632), (2, 6016), (65, 96), (4, 9728)])
def test_swiglu(device, poisoned, shape, dtype):
    gate, up = (random(device, *shape, dtype=dtype, seed=seed) for seed in (0, 1))
    gate = gate.clamp(-40, 40)
    with poisoned():
        found = fused_fp8.swiglu(gate, up)
        y = fused.swiglu(gate, up)
    assert found.shape == y.shape
    same(found.codes, found.scales, y)


@pytest.mark.parametrize("fp32_stream", [False, True])
def test_a_model_computes_the_same_bits_as_matrix_by_matrix(device, fp32_stream, monkeypatch):
    """A prompt in two parts and a token; with hooks on the layers they see their inputs as they are."""
    if device.type == "cpu":  # emulated: torch has the product there, too
        monkeypatch.setattr(scaled_mm, "why_not", lambda spec, device, dtype: None if dtype == B else "fp32")
        monkeypatch.setattr(kernels, "KERNELS", ("scaled_mm", "dequantize"))
    elif reason := scaled_mm.why_not(Spec("fp8", 0), device, B):
        pytest.skip(reason)
    from moai_core import quantize_fp8
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(initializer_range=0.1, residual_in_fp32=fp32_stream, **shape))
    model = quantize_fp8(model, embeddings="bf16").to(B).to(device).eval()
    ids = torch.randint(0, 512, (2, 41), device=device)

    def read():
        with torch.no_grad():
            one = model(ids[:, :33], use_cache=True)
            two = model(ids[:, 33:40], state=one.state, use_cache=True)
            return torch.cat([one.logits, two.logits, model(ids[:, 40:], state=two.state).logits], 1)

    rounded, launched = [], []
    plain, alone = scaled_mm.product, scaled_mm.linear
    monkeypatch.setattr(scaled_mm, "product", lambda prepared, x, out: launched.append(x) or plain(prepared, x, out))
    monkeypatch.setattr(scaled_mm, "linear", lambda *args: rounded.append(args) or alone(*args))
    fast = read()
    assert torch.isfinite(fast).all()
    # 3 layers of 5 matrices; out_proj alone rounds for itself, and all of them where one token is read.
    count = len(launched)
    assert count == 3 * 3 * 5 and len(rounded) == 2 * 3 + 3 * 4
    seen = []
    for layer in model.model.layers:
        for name in ("mamba.in_proj", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"):
            layer.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert torch.equal(read(), fast)
    assert len(launched) == 2 * count and set(seen) == {B}
    with torch.no_grad():
        exact = model.float()(ids, use_cache=False).logits
    assert float((fast.float() - exact).norm() / exact.norm()) < 0.15
