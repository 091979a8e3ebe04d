"""Sharded (FSDP2) and replicated (DDP) models on GPUs, with moai's kernels, have the gradients of one process: on two
GPUs where there are two, else as the only rank of a group, which takes the same way through autograd and the kernels.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

RANK = """
import os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM

rank = int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
world = dist.get_world_size()
rows = torch.randint(5, 250, (2 * world, 75), generator=torch.Generator().manual_seed(1)).to(device)
mine = rows[2 * rank : 2 * rank + 2]

def make(dtype=torch.float32):
    torch.manual_seed(0)
    model = MoaiMambaForCausalLM(MoaiMambaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, initializer_range=0.2
    )).train().to(dtype).to(device)
    model.set_scan_backend("cuda")
    return model

alone = make()
alone(rows, labels=rows).loss.backward()
want = {name: p.grad for name, p in alone.named_parameters()}
half = make(torch.bfloat16)
half(rows, labels=rows).loss.backward()
far = max(float((p.grad - want[n]).norm() / want[n].norm()) for n, p in half.named_parameters())
mesh = init_device_mesh("cuda", (world,))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for kind, limit, options in (("fsdp", 2e-5, {}), ("ddp", 2e-5, {}), ("fsdp", 2 * far, {"mp_policy": policy})):
    for mode in ("none", "selective", "full"):
        model = run = make()
        model.set_checkpointing(mode)
        if kind == "ddp":
            run = DistributedDataParallel(model, device_ids=[rank])
        else:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, **options)
            fully_shard(model, mesh=mesh, **options)
        for _ in range(2):
            model.zero_grad()
            run(mine, labels=mine).loss.backward()
        grads = {name: p.grad.full_tensor() if kind == "fsdp" else p.grad for name, p in model.named_parameters()}
        errors = {n: float((grads[n] - want[n]).norm() / want[n].norm()) for n in want}
        worst = max(errors, key=errors.get)
        assert errors[worst] <= limit, (kind, mode, options, worst, errors[worst])
        if rank == 0:
            print(kind, mode, "bf16" if options else "fp32", f"{errors[worst]:.1e}", flush=True)
if rank == 0:
    print("the same gradients", world, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_and_replicated_models_have_the_gradients_of_one_process(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    world = min(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"the same gradients {world}" in done.stdout, done.stdout + done.stderr[-6000:]
    print(done.stdout)
