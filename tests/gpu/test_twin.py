"""The transformer twin on a GPU: FlashAttention between the borders of documents, and a step as fast as it should be."""

from __future__ import annotations

import pytest
import torch

from moai_core import config
from moai_core.bench import twin_llama

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [41, 513])
def test_flash_attention_sees_what_the_mask_lets_it(device, length):
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)
    seq_idx = (torch.rand(3, length) < 0.05).cumsum(1).to(torch.int32)
    seq_idx[1, length // 2 :] = -1
    seq_idx = seq_idx.to(device)
    q, k, v = (torch.randn(3, 2, length, 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    out = twin_llama.Documents(seq_idx).attend(q, k, v, 0.125)
    q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
    wanted = twin_llama.Documents(seq_idx).attend(q64, k64, v64, 0.125)
    assert (out.double() - wanted).norm() < 5e-3 * wanted.norm()
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad.double())
    for one, other in ((q, q64), (k, k64), (v, v64)):
        assert (one.grad.double() - other.grad).norm() < 1e-2 * other.grad.norm()


def test_a_step_under_autocast_has_the_loss_of_fp32(device):
    fields = twin_llama.shape(
        config.fields(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=512)
    )
    model = twin_llama.make(fields, 0).to(device).train()
    torch.manual_seed(1)
    ids = torch.randint(7, 512, (4, 256), device=device)
    seq_idx = (torch.rand(4, 256) < 0.03).cumsum(1).to(torch.int32).to(device)
    call = {"input_ids": ids, "labels": ids, "seq_idx": seq_idx, "num_items": 1024, "use_cache": False}
    exact = model(**call).loss
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**call).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
