"""The planner's peak against what a training step of a 2b recipe really allocates on a GPU, and what selective
checkpointing leaves in its memory: `pytest -m gpu tests/gpu/test_memory.py -s` prints the table.

Model, kernels, loss, autocast, checkpointing and optimizer are the real ones. The figures of a run without accumulation
(bf16 weights and moments, 4 and 8 rows of 2048 tokens) are those of docs/bench/training.md.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack, nullcontext

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BF16 = ["train.precision=bf16", "optim.name=adamw_bf16"]


def rows(count: int, mode: str) -> list[str]:
    """A step of one micro-batch of so many rows."""
    return [f"train.batch_size={count}", f"train.effective_batch={count}", f"train.checkpointing={mode}", *BF16]


CASES = [
    ("h100-2b", []),
    ("a100-2b", []),
    ("a40-2b", []),
    ("rtx4090-2b", []),
    ("h100-2b", rows(4, "none")),
    ("h100-2b", rows(4, "selective")),
    ("h100-2b", rows(4, "full")),
    ("h100-2b", rows(8, "selective")),
    ("h100-2b", ["train.batch_size=4", "train.checkpointing=none"]),
    ("h100-2b", [*rows(4, "selective"), "train.checkpointing_layers=11"]),
    ("h100-2b", [*rows(4, "selective"), "train.checkpointing_layers=11", "optim.in_backward=true", "optim.clip=null"]),
    ("h100-2b", [*rows(1, "full"), "optim.in_backward=true", "optim.clip=null"]),
]


@pytest.fixture(autouse=True)
def _own_kernels():
    from moai_core import scan

    reason = scan.BACKENDS["cuda"].why_not(torch.device("cuda", 0), torch.bfloat16)
    if reason:
        pytest.skip(reason)
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=str)
def test_the_planned_peak_is_within_5_percent(name, overrides):
    from moai_core import plan, recipe
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM
    from moai_core.training import in_backward, optim, setup

    made = recipe.load(name, ["hardware.gpu=null", *overrides])
    planned = plan.plan(recipe.load(name, overrides))
    if torch.cuda.get_device_properties(0).total_memory < planned.peak * 1.1:
        pytest.skip("this GPU is too small for the recipe")
    before = torch.cuda.memory_allocated()
    dtype, mixed = setup.precision(made)
    with torch.device("cuda"):
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**made.model.numbers()))
    setup.make_ready(model, made, dtype)
    torch.cuda.reset_peak_memory_stats()  # casting held both copies
    optimizer = optim.make_optimizer(model, made.optim, lr=1e-4, seed=0)
    shape = (made.train.batch_size, made.data.max_length)
    accumulation = min(2, made.accumulation(1))  # the gradients of the first beside the second
    stack = ExitStack()
    early = in_backward.begin(made, optimizer, accumulation=accumulation, ranks=1, stack=stack)
    for _ in range(2):
        for _ in range(accumulation):
            ids = torch.randint(10, 100, shape, device="cuda")
            seq_idx = torch.zeros(shape, dtype=torch.int32, device="cuda")
            with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
                items = accumulation * ids.numel()
                loss = model(ids, labels=ids, seq_idx=seq_idx, num_items=items, seq_idx_in_order=True).loss
            loss.backward()
        if early is not None:
            early.join()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() - before
    want = planned.peak - planned.memory["overhead"]
    stack.close()
    print(
        f"\n{name} {' '.join(overrides)}: measured {measured / 1e9:.2f} GB ({measured / 2**30:.2f} GiB), "
        f"planned {want / 1e9:.2f}, {want / measured:.3f}, in the {planned.phase}"
    )
    assert want == pytest.approx(measured, rel=0.05)


def small(precision: str, layers: int = 3, **fields):
    from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": layers}
    model = MoaiMambaForCausalLM(MoaiMambaConfig(initializer_range=0.1, **{**shape, **fields})).train().cuda()
    return model.to(torch.bfloat16) if precision == "bf16" else model


def mixed(precision: str):
    return torch.autocast("cuda", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("fields", [{}, {"dt_bc_norm": False, "ffn": "none"}, {"residual_in_fp32": True}], ids=str)
def test_selective_gives_the_same_bits_and_full_the_same_gradients(fields, precision):
    """With `full` the sum before a layer is an operation of its own, so that its two gradients are rounded apart; in the
    norm's kernel they are added first."""
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    model = small(precision, **fields)
    ids = torch.randint(5, 512, (2, 333), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    seq_idx = (torch.arange(333, device="cuda") >= 100).int().expand(2, -1).contiguous()
    found = []
    for mode in ("none", "selective", "full"):
        model.set_checkpointing(mode)
        model.zero_grad(set_to_none=True)
        for _ in range(2):
            with mixed(precision):
                loss = model(ids, labels=ids, seq_idx=seq_idx).loss
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    none, selective, full = found
    for name, grad in none.items():
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0, name
        assert torch.equal(grad, selective[name]), f"selective: {name}"
        assert (grad - full[name]).float().norm() <= tolerance * grad.float().norm(), f"full: {name}"


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_a_layer_keeps_what_the_planner_counts(precision, mode):
    """Bytes as they were asked for: the allocator rounds them up."""
    from moai_core import footprint

    def held(layers: int, length: int) -> int:
        model = small(precision, layers)
        model.set_checkpointing(mode)
        ids = torch.zeros(4, length, dtype=torch.long, device="cuda")
        with mixed(precision):
            model.model(ids)  # what libraries reserve at first use
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        with mixed(precision):
            out = model.model(ids)
        after = torch.cuda.memory_stats()["requested_bytes.all.current"]
        assert out.last_hidden_state.requires_grad
        return after - before

    lengths = (512, 1536)
    short, long = (held(3, length) - held(2, length) for length in lengths)
    want = footprint.saved_per_token(small(precision, 1).config.numbers(), precision, "cuda", mode)
    assert (long - short) / (4 * (lengths[1] - lengths[0])) == pytest.approx(sum(want.values()), rel=1e-3)
