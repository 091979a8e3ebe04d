"""The planner's peak against what a training step of a 2b recipe really allocates on a GPU: `pytest -m gpu tests/gpu`.

Model, loss, autocast, checkpointing and optimizer are the real ones. Scan and convolution are stand-ins that compute
nothing but allocate and keep what a fused kernel keeps (inputs, the result before the gate, a state every 2048 tokens):
the plan describes such a kernel, and the reference loop keeps far more.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, z, dt_bias):
        batch, length, inner = u.shape
        before_gate = torch.zeros_like(u, memory_format=torch.contiguous_format)
        states = u.new_zeros(batch, -(-length // 2048), 2 * inner, A.shape[1], dtype=torch.float32)
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, before_gate, states)
        return torch.zeros_like(before_gate), states.new_zeros(batch, inner, A.shape[1])

    @staticmethod
    def backward(ctx, *_):
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors[:8])


class Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, bias):
        ctx.save_for_backward(u, weight, bias)
        return torch.zeros_like(u, memory_format=torch.contiguous_format), u.new_zeros(u.shape[0], u.shape[2], 3)

    @staticmethod
    def backward(ctx, *_):
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors)


@pytest.mark.parametrize("name", ["h100-2b", "a40-2b", "rtx4090-2b"])
def test_the_planned_peak_is_within_10_percent(monkeypatch, name):
    from moai_core import plan, recipe, scan
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM
    from moai_core.training import optim, setup

    made = recipe.load(name, ["hardware.gpu=null"])
    planned = plan.plan(recipe.load(name))
    if torch.cuda.get_device_properties(0).total_memory < planned.peak * 1.1:
        pytest.skip("this GPU is too small for the recipe")
    monkeypatch.setattr(scan, "scan", lambda *tensors, **_: Scan.apply(*tensors))
    monkeypatch.setattr(scan, "conv", lambda u, weight, bias, **_: Conv.apply(u, weight, bias))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dtype, mixed = setup.precision(made)
    with torch.device("cuda"):
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**made.model.numbers()))
    setup.make_ready(model, made, dtype)
    torch.cuda.reset_peak_memory_stats()  # casting held both copies
    optimizer = optim.make_optimizer(model, made.optim, lr=1e-4, seed=0)
    shape = (made.train.batch_size, made.data.max_length)
    for _ in range(2):
        for _ in range(2):  # accumulation keeps the gradients of the first beside the second
            ids = torch.randint(10, 100, shape, device="cuda")
            with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
                loss = model(ids, labels=ids, num_items=2 * ids.numel()).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() - before
    want = planned.peak - planned.memory["overhead"]
    print(f"{name}: measured {measured / 2**30:.2f} GiB, planned {want / 2**30:.2f} GiB, {want / measured:.3f}")
    assert want == pytest.approx(measured, rel=0.1)
