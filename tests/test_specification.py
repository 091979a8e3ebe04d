"""The specification's ways of using the library, with `moai_core` in place of its module paths."""

from __future__ import annotations

import json

import torch


def test_configs_models_and_generation(tmp_path):
    from transformers import AutoTokenizer

    from moai_core import MoaiMambaConfig, MoaiMambaForCausalLM, get_mamba_config, load_mamba_config
    from moai_core.paths import TOKENIZERS

    assert get_mamba_config("2b").hidden_size == 2048
    file = tmp_path / "config.json"
    small = {
        "model_type": "mamba_moai",
        "vocab_size": 9000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    file.write_text(json.dumps(small))
    assert load_mamba_config(str(file)).vocab_size == 9000
    config = MoaiMambaConfig(
        vocab_size=9000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, use_fast_scan=True
    )
    model = MoaiMambaForCausalLM(config)

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "moai_tiny")
    inputs = tokenizer("The future of AI is 인공지능", return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=10)
    assert isinstance(tokenizer.decode(outputs[0], skip_special_tokens=True), str)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(5):
        outputs = model(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(outputs.loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "final")
    again = MoaiMambaForCausalLM.from_pretrained(tmp_path / "final")
    model.eval()
    again.eval()
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
