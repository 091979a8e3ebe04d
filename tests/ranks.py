"""What a rank does in the tests of sharded (FSDP2) and replicated (DDP) models: `torchrun ranks.py cpu`, or `cuda`.

Each has two rows of its own. Its gradients, of all modes of checkpointing, are held against those of one process that
has all rows: within rounding, on processors also the same bits in every mode.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM

GPU = sys.argv[1] == "cuda"
LENGTH = 75 if GPU else 40
FIELDS = (
    {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96}
    if GPU
    else {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "state_size": 5}
)
RANK = int(os.environ["LOCAL_RANK"])
DEVICE = torch.device("cuda", RANK) if GPU else torch.device("cpu")


def make(dtype=torch.float32):
    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(num_hidden_layers=2, initializer_range=0.2, **FIELDS))
    model = model.train().to(dtype).to(DEVICE)
    if GPU:
        model.set_scan_backend("cuda")
    return model


def gradients(kind, mode, rows, mesh, options):
    """Of the second of two steps of a model of that kind ("fsdp", "ddp", or None: as it is)."""
    model = run = make()
    model.set_checkpointing(mode)
    if kind == "ddp":
        run = DistributedDataParallel(model, device_ids=[RANK] if GPU else None)
    elif kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    for _ in range(2):
        model.zero_grad()
        run(rows, labels=rows).loss.backward()
    return {name: p.grad.full_tensor() if kind == "fsdp" else p.grad for name, p in model.named_parameters()}


def farthest(found, wanted):
    """(relative distance, name) of the gradient that is farthest from the one wanted; one with a NaN is infinitely far."""
    distances = {name: (found[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted}
    return max((float(one.nan_to_num(nan=torch.inf)), name) for name, one in distances.items())


def check():
    world = dist.get_world_size()
    rows = torch.randint(5, FIELDS["vocab_size"] - 6, (2 * world, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = rows.to(DEVICE)
    mine = rows[2 * RANK : 2 * RANK + 2]
    mesh = init_device_mesh(DEVICE.type, (world,))
    want = gradients(None, "none", rows, mesh, {})
    limit = 2e-5 if GPU else 1e-5
    kinds = [("fsdp", limit, {}), ("ddp", limit, {})]
    if GPU:
        half = make(torch.bfloat16)
        half(rows, labels=rows).loss.backward()
        far, _ = farthest({name: p.grad for name, p in half.named_parameters()}, want)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        kinds.append(("fsdp", 2 * far, {"mp_policy": policy}))
    for kind, limit, options in kinds:
        first = None
        for mode in ("none", "selective", "full"):
            found = gradients(kind, mode, mine, mesh, options)
            error, name = farthest(found, want)
            assert error <= limit, (kind, mode, options, name, error)
            first = first or found
            assert GPU or all(torch.equal(found[name], first[name]) for name in want), (kind, mode)
            if RANK == 0:
                print(kind, mode, "bf16" if options else "fp32", f"{error:.1e}", flush=True)
    if RANK == 0:
        print("the same gradients", world, flush=True)
    dist.barrier()


if GPU:
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", device_id=DEVICE)
    check()
    dist.destroy_process_group()
else:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    check()
    os._exit(0)  # gloo's threads may abort an orderly exit
