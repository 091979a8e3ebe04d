"""The methods on a model that was really trained: how far its predictions move, by method (`pytest -m slow -s`)."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM
from moai_core.data.loader import make_loader
from moai_core.data.tokenize import load_tokenizer
from moai_core.evaluate import evaluate
from moai_core.paths import RECIPES
from moai_core.quant.formats import Spec
from moai_core.quantize.calibrate import from_text
from moai_core.quantize.layerwise import Options, quantize_layer
from moai_core.quantize.runner import Runner

LARGE = ("mamba.in_proj", "mamba.out_proj", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
RUNS = {
    "rtn": ("rtn", True, Options()),
    "awq": ("awq", False, Options()),
    "gptq alone": ("gptq", True, Options(sweeps=0)),
    "gptq": ("gptq", True, Options()),
    "gptq + rotation": ("gptq", True, Options(rotate=("mamba.out_proj",))),
}


def trained(tokenizer, data):
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 8}
    model = MoaiMambaForCausalLM(MoaiMambaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.1)
    steps = 400
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps, pct_start=0.1)
    batches = iter(make_loader(data, tokenizer, batch_size=8))
    for _ in range(steps):
        batch = next(batches)
        model(input_ids=batch["input_ids"], labels=batch["labels"], seq_idx=batch["seq_idx"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def divergence(model, original, batches):
    """KL(original || model) in nats a token."""
    total = count = 0
    for batch in batches:
        call = {"input_ids": batch["input_ids"], "seq_idx": batch["seq_idx"]}
        real = batch["seq_idx"] >= 0
        p, q = (F.log_softmax(one(**call).logits[real], -1) for one in (original, model))
        total, count = total + float((p.exp() * (p - q)).sum()), count + int(real.sum())
    return total / count


@pytest.mark.slow
def test_predictions_move_least_under_gptq(tmp_path):
    tokenizer = load_tokenizer("moai_tiny")
    corpus = {part: str(RECIPES / "corpus" / part) for part in ("train", "valid")}
    data = SimpleNamespace(
        **corpus, valid_fraction=0, train_on="assistant", streaming="auto", max_length=128, shuffle=True, workers=0,
        format="auto", on_error="stop", cache=str(tmp_path),
    )  # fmt: skip
    original = trained(tokenizer, data)
    batches = list(make_loader(data, tokenizer, split="valid", batch_size=8).once(40))
    calibration = from_text(
        corpus["train"], tokenizer, sequences=256, length=128, avoid=[corpus["valid"]], cache=tmp_path
    )
    before = evaluate(original, batches)["perplexity"]
    moved = {}
    for label, (method, symmetric, options) in RUNS.items():
        model = copy.deepcopy(original)
        runner = Runner(calibration)
        runner.embed(model.model.embed_tokens)
        for number, layer in enumerate(model.model.layers):
            specs = dict.fromkeys(LARGE, Spec("int4", 32, symmetric))
            quantize_layer(layer, f"model.layers.{number}", specs, method=method, runner=runner, options=options)
        after = evaluate(model, batches)["perplexity"]
        moved[label] = divergence(model, original, batches[::4])
        print(f"{label:16} KL {moved[label]:.5f}  perplexity {before:.3f} -> {after:.3f} ({after / before - 1:+.2%})")
        assert after < 1.05 * before
    # Without tight figures: GPTQ in each form moves them clearly less than rounding to nearest, AWQ no more.
    assert all(moved[label] < 0.9 * moved["rtn"] for label in moved if label.startswith("gptq"))
    assert moved["awq"] < 1.02 * moved["rtn"] and moved["gptq"] < 1.02 * moved["gptq alone"]
