"""The planner's peak of a whole 2b step with the GPU operators, without a GPU: tensors that hold nothing, operators whose
fake implementations say what they allocate, and a count of the live bytes at every operation."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, cuda, footprint, plan, scan
from moai_core import recipe as recipes
from moai_core.model import fused
from moai_core.model import loss as losses

pytestmark = pytest.mark.slow

BF16 = ["train.precision=bf16", "optim.name=adamw_bf16"]
FOUR = ["train.batch_size=4", "train.effective_batch=4", *BF16]
INSIDE = [*BF16, "optim.in_backward=true", "optim.clip=null"]


class Peak(TorchDispatchMode):
    """The most bytes that were alive after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, out)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (scan.BACKENDS["cuda"], cuda):
        monkeypatch.setattr(module, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda _: True), raising=False)
    # Fake tensors have no addresses; what these two ask them for is true of what the loss gives them.
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
    monkeypatch.setattr(losses, "_separate", lambda _: True)
    monkeypatch.setattr(fused, "scale_in_place", lambda *_: None)
    scan.pick.cache_clear()
    yield
    scan.pick.cache_clear()


def _wait(waiting, parameter):
    """A gradient on its way to an update, as in training/in_backward.py."""
    waiting.append(parameter.grad)
    parameter.grad = None
    while sum(gradient.nbytes for gradient in waiting) > footprint.UPDATES_WAITING:
        waiting.pop(0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_size=4", "train.effective_batch=4", "train.checkpointing=selective", *BF16],
        ["train.batch_size=8", "train.effective_batch=8", "train.checkpointing=selective", *BF16],
        ["train.batch_size=8", "train.effective_batch=8", "train.checkpointing=full", *BF16],
        ["train.batch_size=4", "train.checkpointing=none"],
        [],
        [*FOUR, "train.checkpointing=selective", "train.checkpointing_layers=16"],
        [*FOUR, "train.checkpointing=full", "train.checkpointing_layers=12"],
        ["train.batch_size=1", "train.effective_batch=1", "train.checkpointing=full", *INSIDE],
        ["train.batch_size=1", "train.effective_batch=1", "train.checkpointing=selective", *INSIDE],
        [*FOUR, "train.checkpointing=full", *INSIDE, "model.tie_word_embeddings=true"],
    ],
    ids=str,
)
def test_the_planned_peak_is_that_of_the_operators(as_on_a_gpu, overrides):
    recipe = recipes.load("h100-2b", overrides)
    precision = footprint.resolved_precision(recipe)
    with torch.device("meta"):
        model = MoaiMambaForCausalLM(MoaiMambaConfig(**recipe.model.numbers())).train()
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.set_scan_backend("cuda")
    model.set_checkpointing(recipe.train.checkpointing, recipe.train.checkpointing_layers)
    shape = (recipe.train.batch_size, recipe.data.max_length)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if recipe.model.tie_word_embeddings:
            model.tie_weights()
        if recipe.optim.in_backward:
            waiting: list[torch.Tensor] = []
            for parameter in model.parameters():
                if parameter.numel() >= footprint.UPDATED_ALONE:
                    parameter.register_post_accumulate_grad_hook(functools.partial(_wait, waiting))
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        with Peak() as peak:
            for tensor in (*model.parameters(), *moments):
                tensor.detach()  # seen, and so counted
            for _ in range(min(2, recipe.accumulation(1))):
                ids = torch.zeros(shape, dtype=torch.long)
                seq_idx = torch.zeros(shape, dtype=torch.int32)
                mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
                with mixed:
                    loss = model(ids, labels=ids, seq_idx=seq_idx, seq_idx_in_order=True, num_items=1).loss
                loss.backward()
                del loss
    planned = plan.plan(recipe)
    assert planned.peak - planned.memory["overhead"] == pytest.approx(peak.bytes, rel=0.03)
