"""`moai quantize` and `moai qat` on a GPU: the numbers of a processor, and training in every mode under autocast."""

from __future__ import annotations

import json

import pytest
import torch

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, checkpoint, config, tensors
from moai_core import recipe as recipes
from moai_core.bench import quality
from moai_core.data.tokenize import load_tokenizer
from moai_core.quantize import qat
from moai_core.quantize.calibrate import from_tokens
from moai_core.quantize.disk import quantize_folder
from moai_core.quantize.plan import Settings

pytestmark = pytest.mark.gpu

SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.1}
METHODS = {
    "int4": Settings("int4"), "zeros": Settings("int4", symmetric=False), "int8": Settings("int4", bits=8),
    "fp8": Settings("fp8"), "nvfp4": Settings("fp4"), "mxfp4": Settings("fp4", group_size=32), "nf4": Settings("bnb4"),
    "bnb8": Settings("bnb8"), "gptq": Settings("gptq"), "rotated": Settings("gptq", rotate=True), "awq": Settings("awq"),
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    place = tmp_path_factory.mktemp("parent") / "model"
    words = load_tokenizer("moai_tiny")
    torch.manual_seed(0)
    numbers = config.fields(**SIZE, vocab_size=len(words), dt_bc_norm=True, tie_word_embeddings=True)
    checkpoint.save_model(place, MoaiMambaForCausalLM(MoaiMambaConfig(**numbers)), words)
    return place


@pytest.mark.parametrize("method", METHODS)
def test_methods_choose_the_numbers_of_a_processor(device, parent, tmp_path, method):
    settings = METHODS[method]
    data = from_tokens(torch.randint(7, 2000, (16, 256), generator=torch.Generator().manual_seed(1)))
    found = {}
    for name, where in (("cpu", "cpu"), ("gpu", device)):
        made = quantize_folder(parent, tmp_path / name, settings, calibration=lambda: data, device=where)
        found[name] = (made, dict(tensors.iterate(tmp_path / name / "model.safetensors")))
    (one, here), (other, there) = found["cpu"], found["gpu"]
    assert here.keys() == there.keys()
    if settings.kind.calibrated:
        # Sums in another order round a few numbers elsewhere; what is lost is the same.
        for mine, theirs in zip(one["layers"], other["layers"], strict=True):
            for module, entry in mine.items():
                assert theirs[module]["error"] == pytest.approx(entry["error"], rel=0.05), module
    else:
        # Where two ranges of a group leave the same error, sums in another order choose the other one; and CUDA
        # multiplies by the inverse of a number that it is to divide by, so scales differ by a last bit.
        least = 0.98 if settings.spec().format in ("int4", "int8") else 0.999
        for tensor, values in here.items():
            given = there[tensor]
            if values.dtype in (torch.float32, torch.float16, torch.bfloat16):
                close = torch.isclose(given.float(), values.float(), rtol=1e-6, atol=0.0)
            else:
                close = given.reshape(-1).view(torch.uint8) == values.reshape(-1).view(torch.uint8)
            assert close.float().mean() >= least, tensor


@pytest.mark.parametrize(("mode", "weight"), [("full", 0.5), ("scales", 1.0), ("qlora", 0.5)])
def test_qat_learns_from_its_teacher(device, parent, tmp_path, mode, weight):
    if mode == "qlora":
        pytest.importorskip("peft")
    lines = [json.dumps({"text": " ".join(f"w{(i * 7 + j * j) % 97}" for j in range(60))}) for i in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    recipe = recipes.load("cpu-tiny", [
        "hardware.gpu=h100", "train.precision=bf16-mixed", f"data.train={tmp_path / 'text.jsonl'}", "~data.valid",
        f"data.cache={tmp_path / 'cache'}", "optim.warmup_steps=1", "optim.schedule=constant", "train.steps=30",
        "optim.finetune_lr=1e-3",
        "train.batch_size=8", "train.save_every=30", "train.eval_every=0", "train.sample_every=0",
    ])  # fmt: skip
    settings = qat.Options(mode, Settings("int4", group_size=64), teacher=parent, weight=weight, rank=4)
    result = qat.qat(recipe, settings, model_path=parent, output=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert result.step == 30 and sum(losses[-5:]) < sum(losses[:5])
    found = quality.run(parent=parent, models=[tmp_path / "run"], tokens=500, lengths=(64, 256), device=str(device))
    assert found["dtype"] == "bf16" and 0 < found["models"][1]["kl"]["all"] < 1
