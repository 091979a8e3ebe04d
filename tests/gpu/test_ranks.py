"""Sharded (FSDP2) and replicated (DDP) models on GPUs, with moai's kernels, have the gradients of one process: on two
GPUs where there are two, else as the only rank of a group, which takes the same way through autograd and the kernels.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_sharded_and_replicated_models_have_the_gradients_of_one_process():
    script = Path(__file__).parents[1] / "ranks.py"
    world = min(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    done = subprocess.run([*command, str(script), "cuda"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"the same gradients {world}" in done.stdout, done.stdout + done.stderr[-6000:]
    print(done.stdout)
