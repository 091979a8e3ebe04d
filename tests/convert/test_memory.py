"""A conversion needs the memory of a tensor or two, whatever the model's size: measured on the 2b shape."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

RUN = """
import resource, sys
from moai_core.convert import convert
report = convert(sys.argv[1], sys.argv[2], sys.argv[3], check=False)
print(report["parameters"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_2b(folder, dtype, **fields):
    """A moai folder of the 2b preset with weights as at a training's start, written a tensor at a time."""
    import torch

    from moai_core import get_mamba_config, storage, tensors
    from moai_core.convert import folder as hf
    from moai_core.weights import KEEP_FP32

    config = get_mamba_config("2b", **fields)
    infos = {}
    for name, shape in hf.shapes(config.numbers(), folder).items():
        kind = torch.float32 if name.endswith(KEEP_FP32) else dtype
        infos[name] = tensors.TensorInfo(kind, shape, torch.Size(shape).numel() * kind.itemsize)

    def load(name):
        _, shape, _ = info = infos[name]
        if name.endswith("A_log"):
            return torch.arange(1, shape[1] + 1).log().expand(shape).contiguous()
        if name.endswith(("norm.weight", ".D")):
            return torch.ones(shape, dtype=info.dtype)
        if name.endswith("dt_bias"):
            return torch.empty(shape).uniform_(-7, -2)
        return torch.randn(shape, dtype=info.dtype) * 0.02

    with storage.new_folder(folder) as writer:
        writer.write("config.json", config.to_json_string().encode())
        writer.write(
            "model.safetensors",
            tensors.stream(infos, load, {"format": "pt"}),
        )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["jamba", "moai", "mamba-ssm"])
def test_a_2b_conversion_stays_under_4_gb(to, tmp_path):
    import torch

    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("needs 12 GB of disk")
    write_2b(tmp_path / "2b", torch.bfloat16, dt_bc_norm=to != "mamba-ssm")
    try:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / "2b"), str(tmp_path / "out"), to], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        parameters, peak = map(int, done.stdout.split())
        print(f"{to}: {parameters:,} parameters, peak {peak / 1e9:.2f} GB")
        assert parameters == (1_989_412_864 if to == "mamba-ssm" else 1_989_416_704) and peak < 4e9
        shards = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
        largest = max(entry["size"] for entry in shards.values())
        assert peak < 1.5 * largest
    finally:
        shutil.rmtree(tmp_path / "2b")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
