"""The transformer twin against transformers' own Llama, one document at a time; the pair's runs and their comparison."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import transformers
from torch.nn import functional as F

from moai_core import config, footprint
from moai_core import recipe as recipes
from moai_core.bench import twin, twin_llama
from moai_core.errors import CheckpointError, RecipeError, UsageError
from moai_core.training import StopFlag, train

SIZES = [
    {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "state_size": 8, "vocab_size": 6144},
    {"hidden_size": 384, "intermediate_size": 896, "num_hidden_layers": 12, "vocab_size": 12288},
    {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "tie_word_embeddings": True,
        "vocab_size": 8000,
    },
    {"hidden_size": 192, "ffn": "none", "num_hidden_layers": 9, "vocab_size": 3000},
    {"hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 97, "dt_bc_norm": False},
]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size["hidden_size"]))
def test_parameters_agree_within_one_percent(size):
    numbers = config.fields(**size)
    shape = twin_llama.shape(numbers)
    model = twin_llama.make(shape, 0)
    count = sum(p.numel() for p in model.parameters())
    assert count == twin_llama.parameters(shape)
    assert abs(count / footprint.parameters(numbers)["total"] - 1) <= 0.01
    assert model.config.head_dim == (64 if size["hidden_size"] % 64 == 0 else 40) and model.config.hidden_act == "silu"
    assert model.config.num_key_value_heads * model.config.head_dim == size["hidden_size"]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    head = 0 if not shape["tie_word_embeddings"] else model.lm_head.weight.numel()
    assert twin_llama.flops(model) == 6 * (sum(p.numel() for p in matrices) + head)


def test_a_width_without_heads_is_refused():
    with pytest.raises(UsageError, match="no even divisor"):
        twin_llama.shape(config.fields(hidden_size=33, vocab_size=97, intermediate_size=40, num_hidden_layers=1))


@pytest.fixture
def pair():
    """A twin, and transformers' own Llama with its weights and plain attention."""
    fields = twin_llama.shape(
        config.fields(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=97, initializer_range=0.2)
    )
    model = twin_llama.make(fields, 3)
    own = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, attn_implementation="eager"))
    own.load_state_dict(model.state_dict())
    return model, own


def packed():
    """(ids, labels, seq_idx): two rows of documents of odd lengths, padding at the end, labels missing here and there."""
    torch.manual_seed(5)
    ids = torch.randint(7, 97, (2, 41))
    seq_idx = torch.zeros(2, 41, dtype=torch.int32)
    seq_idx[0, 15:], seq_idx[0, 31:], seq_idx[1, 1:], seq_idx[1, 35:] = 1, 2, 1, -1
    labels = ids.masked_fill((torch.rand(ids.shape) < 0.2) | (seq_idx < 0), -100)
    return ids, labels, seq_idx


def test_packed_rows_cost_what_transformers_says_of_each_document(pair):
    model, own = pair
    ids, labels, seq_idx = packed()
    loss = model(input_ids=ids, labels=labels, seq_idx=seq_idx, num_items=7, use_cache=False).loss
    loss.backward()
    total = torch.zeros(())
    for row in range(2):
        for number in range(3):
            mine = seq_idx[row] == number
            targets = labels[row][mine]
            if (count := int((targets[1:] != -100).sum())) > 0:
                total = total + own(input_ids=ids[row][mine][None], labels=targets[None]).loss * count
    (total / 7).backward()
    assert loss.item() == pytest.approx(total.item() / 7, rel=1e-5)
    for (name, one), other in zip(model.named_parameters(), own.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_documents_know_positions_and_borders():
    _, _, seq_idx = packed()
    documents = twin_llama.Documents(seq_idx)
    assert documents.borders.tolist() == [0, 15, 31, 41, 42, 76, 82]
    assert documents.positions[0].tolist() == [*range(15), *range(16), *range(10)]
    for row, one, other in ((0, 14, 15), (1, 34, 35)):
        assert not documents.mask[row, 0, other:, : one + 1].any()
    assert not documents.mask.triu(1).any() and bool(documents.mask.diagonal(dim1=2, dim2=3).all())


def test_flash_attention_is_told_the_borders(monkeypatch):
    """The kernel's place is taken by a loop over what it is told."""

    def kernel(q, k, v, borders, same, longest, _, dropout, causal, debug, *, scale):
        assert borders.dtype == torch.int32 and torch.equal(borders, same) and causal and not dropout and longest == 41
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        parts = [[t[a:b].transpose(0, 1).float() for t in (q, k, v)] for a, b in pairwise(borders.tolist())]
        done = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale) for part in parts]
        return torch.cat([one.transpose(0, 1) for one in done]).to(q.dtype), *(torch.zeros(()),) * 4

    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 41, 16) for _ in range(3))
    seq_idx = packed()[2]
    wanted = twin_llama.Documents(seq_idx).attend(q, k, v, 0.3)
    monkeypatch.setattr(twin_llama, "_flash", lambda value: True)
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", kernel, "CPU")
        found = twin_llama.Documents(seq_idx).attend(q, k, v.bfloat16(), 0.3)
    finally:
        library._destroy()
    assert found.shape == wanted.shape == (2, 41, 3, 16)
    assert (found.float() - wanted).norm() < 1e-2 * wanted.norm()


def test_without_documents_it_is_transformers_own(pair, tmp_path):
    model, own = pair
    ids = torch.randint(7, 97, (3, 19))
    assert (model(ids).logits - own(ids).logits).norm() < 1e-5 * own(ids).logits.norm()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, attention_mask=mask, **call), own.generate(ids, attention_mask=mask, **call))
    model.save_pretrained(tmp_path)
    again = twin_llama.load(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = twin_llama.load(tmp_path, dtype=torch.bfloat16)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32 and half.lm_head.weight.dtype == torch.bfloat16
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is transformers.LlamaForCausalLM
    assert (loaded(ids).logits - own(ids).logits).norm() < 1e-5 * own(ids).logits.norm()


# ---- the runs


@pytest.fixture
def overrides(tmp_path):
    """Words for a run of milliseconds a step."""
    words = ["the quick brown fox", "오늘은 날씨가 좋다", "今日は天気が良い", "今天天气很好"]
    for split, count in (("train", 40), ("valid", 6)):
        (tmp_path / split).mkdir()
        for language, word in zip(("en", "ko"), words, strict=False):
            lines = [json.dumps({"text": f"{word} " * (1 + (i * 5) % 9)}, ensure_ascii=False) for i in range(count)]
            (tmp_path / split / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "model.state_size=4",
        "model.tie_word_embeddings=true", f"data.train={tmp_path / 'train'}", f"data.valid={tmp_path / 'valid'}",
        "data.max_length=32", f"data.cache={tmp_path / 'cache'}", "optim.warmup_steps=2", "train.steps=4",
        "train.batch_size=2", "train.save_every=2", "train.eval_every=2", "train.eval_batches=2",
        "train.sample_every=4", "train.sample_prompts=[the]", "train.sample_tokens=3", "train.threads=1",
    ]  # fmt: skip


def test_a_twin_resumes_bit_for_bit(overrides, tmp_path):
    recipe = recipes.load("cpu-tiny", overrides)
    kind = twin_llama.kind()
    whole = train(recipe, output=tmp_path / "whole", kind=kind)
    stop = StopFlag()

    def halt(event):
        if event["event"] == "checkpoint" and event["step"] == 2:
            stop.request()

    with pytest.raises(Exception, match="stopped by SIGTERM"):
        train(recipe, output=tmp_path / "parts", kind=kind, stop=stop, on_event=halt)
    parts = train(recipe, output=tmp_path / "parts", kind=kind)
    assert parts.resumed_from is not None and parts.resumed_from < 4
    one, other = (twin_llama.load(result.checkpoint).state_dict() for result in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.sample is not None and whole.valid == parts.valid
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        train(recipe, output=tmp_path / "parts")


def test_the_pair_is_trained_compared_and_drawn(overrides, tmp_path):
    events = []
    call = {
        "recipe": "cpu-tiny",
        "overrides": overrides,
        "output": tmp_path / "pair",
        "rates": [1e-2, 1e-3],
        "sweep": 2,
    }
    call |= {"contexts": [8, 16], "plot": tmp_path / "pair.png"}
    found = json.loads(json.dumps(twin.run(**call, on_event=events.append)))
    ours, theirs = (found["models"][name] for name in ("moai", "llama"))
    assert abs(ours["parameters"] / theirs["parameters"] - 1) <= 0.01
    assert ours["tokens"] == theirs["tokens"] > 0 and ours["steps"] == theirs["steps"] == 4
    for one in (ours, theirs):
        assert set(one["tried"]) == {"0.01", "0.001"} and one["lr"] == float(min(one["tried"], key=one["tried"].get))
        assert one["valid"]["step"] == 4
    rows = {(row["language"], row["context"]): row for row in found["results"]}
    assert set(rows) == {(a, b) for a in ("en", "ko", "all") for b in (8, 16, "whole")}
    assert len({row["tokens"] for row in found["results"] if row["language"] == "ko"}) == 1
    assert set(rows["ko", 8]["models"]) == {"moai", "llama"} and set(rows["ko", "whole"]["models"]) == {"moai"}
    assert (tmp_path / "pair.png").read_bytes().startswith(b"\x89PNG")
    assert [len(table.rows) for table in twin.tables(found)] == [2, 9]
    trained = [event for event in events if event["event"] == "progress" and "context" not in event["task"]]
    assert trained
    # Given again, it trains nothing and says the same.
    events.clear()
    again = json.loads(json.dumps(twin.run(**call, on_event=events.append)))
    assert not [event for event in events if event["event"] == "progress" and "context" not in event["task"]]
    assert again["results"] == found["results"]
    assert again["models"] == found["models"]
    assert any("chose the highest rate tried" in note or "chose the lowest" in note for note in found["notes"])


def test_wrong_values(overrides, tmp_path):
    call = {"recipe": "cpu-tiny", "output": tmp_path / "pair"}
    for flags, error, words in (
        ({"overrides": [*overrides, "train.eval_every=0"]}, RecipeError, "train.eval_every"),
        ({"overrides": [*overrides, "~data.valid"]}, RecipeError, "data.valid is not set"),
        ({"overrides": overrides, "rates": [-1.0]}, UsageError, "--lr"),
        ({"overrides": overrides, "contexts": [7]}, UsageError, "--context must be even"),
        ({"overrides": [*overrides, "train.checkpointing=full"], "rates": [1e-2]}, RecipeError, "must be none"),
    ):
        with pytest.raises(error, match=words):
            twin.run(**call, **flags)
    with pytest.raises(UsageError, match="--lr must be numbers"):
        twin.numbers("1e-3,x")
