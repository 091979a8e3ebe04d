"""The Python names of the specification, used as it uses them."""

from __future__ import annotations

import pytest
import torch

import moai_core
from moai_core import MoaiMambaForCausalLM
from moai_core.errors import CheckpointError, UsageError
from moai_core.quant import linear
from moai_core.quantize.memory import quantize
from moai_core.quantize.plan import Settings

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "time_step_rank": 4, "num_hidden_layers": 2}
IDS = torch.arange(40).reshape(2, 20) * 7 % 97


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["quantize_model", "quantize_gptq", "quantize_awq", "quantize_fp8"])
def test_quantized_saved_and_loaded(tiny_model, tmp_path, name, tied):
    model = tiny_model(tie_word_embeddings=tied, **SHAPE)
    want = model(IDS).logits.detach()
    data = () if name in ("quantize_model", "quantize_fp8") else (torch.randint(0, 97, (8, 32)),)
    sizes = {} if name == "quantize_fp8" else {"group_size": 32}
    made = getattr(moai_core, name)(model, *data, **sizes)
    assert made is model
    got = model.eval()(IDS).logits.detach()
    assert float((got - want).norm() / want.norm()) < (0.2 if name == "quantize_fp8" else 0.6)
    model.save_pretrained(tmp_path / "out")
    loaded = MoaiMambaForCausalLM.from_pretrained(tmp_path / "out")
    assert len(linear.quantized(loaded)) == 2 * 5 + (1 if tied else 2)
    linear.set_kernel(loaded, "dequantize")
    linear.set_kernel(model, "dequantize")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_trained_as_the_specification_does(tiny_model, tmp_path):
    model = moai_core.quantize_model(tiny_model(**SHAPE), bits=4, group_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(10):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "out")
    loaded = MoaiMambaForCausalLM.from_pretrained(tmp_path / "out")
    linear.set_kernel(loaded, "dequantize")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0).shape == (2, 25)


def test_refusals(tiny_model):
    model = tiny_model(**SHAPE)
    with pytest.raises(UsageError, match="needs calib_data"):
        quantize(model, Settings("gptq", group_size=32))
    with pytest.raises(UsageError, match=r"in_proj.weight: group size 128 doesn't divide 32 columns"):
        quantize(model, Settings("int4"))
    with pytest.raises(UsageError, match=r"only a MoaiMambaForCausalLM can be quantized \(got Linear\)"):
        quantize(torch.nn.Linear(32, 32), Settings("int4"))
    with pytest.raises(UsageError, match="can't be 'int3'"):
        quantize(model, Settings("int3"))
    with pytest.raises(UsageError, match="--bits 8: awq has 4"):
        quantize(model, Settings("awq", 8))
    with torch.no_grad():
        model.model.layers[1].mamba.in_proj.weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mamba.in_proj.weight holds NaN"):
        quantize(model, Settings("int4", group_size=32))
    model = tiny_model(**SHAPE)
    quantize(model, Settings("int4", group_size=32))
    with pytest.raises(UsageError, match="quantized already"):
        quantize(model, Settings("int4", group_size=32))
