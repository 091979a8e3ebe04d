"""Extending: what the module promises of ids, text and rows, checked on text of all kinds; models; errors."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_core.checkpoint import load_model, save, save_model
from moai_core.data.tokenize import load_tokenizer
from moai_core.errors import CheckpointError, UsageError
from moai_core.tokenizer.evaluate import open_tokenizer
from moai_core.tokenizer.extend import extend, ids_of
from moai_core.tokenizer.resize import padded
from moai_core.tokenizer.text import Source

DOMAIN = (
    "The amortization schedule lists the collateralized obligations and the debentures.\n"
    "대차대조표와 손익계산서는 감가상각비를 포함한다. 영업이익이 증가했다.\n"
    "貸借対照表と損益計算書。減価償却費を計上しました。\n"
    "资产负债表和利润表，折旧费用。\n"
) * 30


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, report) of moai_tiny extended by a few words of accounting."""
    folder = tmp_path_factory.mktemp("extend")
    (folder / "domain.txt").write_text(DOMAIN, encoding="utf-8")
    return folder, extend("moai_tiny", [Source(str(folder / "domain.txt"))], folder / "out", add=60)


def expansion(base: dict, more: dict) -> dict[str, list[str]]:
    """The old tokens of every new one, read from the merges alone."""
    count = len(base["model"]["merges"])
    stands_for: dict[str, list[str]] = {}
    for merge in more["model"]["merges"][count:]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        assert left + right not in stands_for and left + right not in ids_of(base)
        stands_for[left + right] = stands_for.get(left, [left]) + stands_for.get(right, [right])
    return stands_for


def check(old, new, stands_for, text):
    tokens = new.encode(text, add_special_tokens=False).tokens
    old_tokens = old.encode(text, add_special_tokens=False).tokens
    assert [one for token in tokens for one in stands_for.get(token, [token])] == old_tokens
    return len(old_tokens), len(tokens)


def test_old_ids_stay_and_new_ones_follow(made):
    folder, report = made
    (old, base), (new, more) = open_tokenizer("moai_tiny"), open_tokenizer(str(folder / "out"))
    assert ids_of(base).items() <= ids_of(more).items() and report["added"] == len(more["model"]["merges"]) - 5881
    assert report["first_new_id"] == 6144 and max(ids_of(more).values()) == 6143 + report["added"]
    stands_for = expansion(base, more)
    assert set(stands_for) == set(ids_of(more)) - set(ids_of(base))
    before, after = check(old, new, stands_for, DOMAIN)
    assert after < 0.8 * before and (before, after) == (report["tokens_before"], report["tokens"])
    assert report["health"]["merges"] == report["added"] and report["health"]["seen_under_10"] == 0


def test_any_text_is_the_old_ids_with_runs_replaced(made):
    folder, _ = made
    (old, base), (new, more) = open_tokenizer("moai_tiny"), open_tokenizer(str(folder / "out"))
    stands_for = expansion(base, more)
    parts = [
        *DOMAIN.split("\n")[:4],
        "amort",
        "ization",
        "ized",
        "감가",
        "상각비",
        "負債",
        "<|im_end|>",
        " ",
        "\n",
        "12",
    ]

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(parts), st.text(max_size=8)), max_size=8))
    def hold(pieces):
        text = "".join(pieces)
        check(old, new, stands_for, text)
        assert new.decode(new.encode(text).ids, skip_special_tokens=False) == text

    hold()


def test_a_second_time(made, tmp_path):
    """What was extended can be extended; the first tokens stay."""
    folder, first = made
    (tmp_path / "more.txt").write_text("hypothecation of rehypothecated securities\n" * 50, encoding="utf-8")
    report = extend(str(folder / "out"), [Source(str(tmp_path / "more.txt"))], tmp_path / "two", add=10)
    _, once = open_tokenizer(str(folder / "out"))
    _, twice = open_tokenizer(str(tmp_path / "two"))
    assert ids_of(once).items() <= ids_of(twice).items() and report["first_new_id"] == 6144 + first["added"]
    assert load_tokenizer(tmp_path / "two").chat_template == load_tokenizer("moai_tiny").chat_template


# ---- models ------------------------------------------------------------------------------------------------


def grow(tiny_model, folder, tmp_path, **fields):
    model = tiny_model(**{"vocab_size": 6144, **fields})
    save_model(tmp_path / "model", model, load_tokenizer("moai_tiny"))
    source = [Source(str(folder / "domain.txt"))]
    report = extend("moai_tiny", source, tmp_path / "grown", add=60, model=tmp_path / "model")
    return model, load_model(tmp_path / "grown"), report


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [6144, 6250])
def test_rows(tied, rows, made, tiny_model, tmp_path):
    folder, _ = made
    model, grown, report = grow(tiny_model, folder, tmp_path, vocab_size=rows, tie_word_embeddings=tied)
    assert report["model"] == {"rows_before": rows, "rows": 6272 if rows == 6144 else 6250, "tied": tied}
    _, base = open_tokenizer("moai_tiny")
    _, more = open_tokenizer(str(tmp_path / "grown"))
    ids = ids_of(more)
    pairs = [(model.get_input_embeddings(), grown.get_input_embeddings())]
    pairs += [] if tied else [(model.lm_head, grown.lm_head)]
    for before, after in pairs:
        assert torch.equal(after.weight[:6144], before.weight[:6144])
        for token, parts in expansion(base, more).items():
            mean = torch.stack([before.weight[ids[part]].double() for part in parts]).mean(0)
            assert torch.allclose(after.weight[ids[token]].double(), mean, atol=1e-6)
    assert (grown.lm_head.weight is grown.get_input_embeddings().weight) == tied
    others = {
        name: tensor for name, tensor in model.state_dict().items() if "embed" not in name and "lm_head" not in name
    }
    assert others and all(torch.equal(tensor, grown.state_dict()[name]) for name, tensor in others.items())
    old = torch.tensor([[*range(40, 90)]])
    assert torch.equal(model(old).logits[..., :6144], grown(old).logits[..., :6144]), "old text reads as before"
    assert len(load_tokenizer(tmp_path / "grown").encode("감가상각비")) < len(
        load_tokenizer("moai_tiny").encode("감가상각비")
    )


def test_bf16_stays_bf16(made, tiny_model, tmp_path):
    folder, _ = made
    save_model(tmp_path / "model", tiny_model(vocab_size=6144).bfloat16(), load_tokenizer("moai_tiny"))
    extend(
        str(tmp_path / "model"), [Source(str(folder / "domain.txt"))], tmp_path / "g", add=5, model=tmp_path / "model"
    )
    assert load_model(tmp_path / "g").get_input_embeddings().weight.dtype == torch.bfloat16
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "g").config.vocab_size == 6272
    assert len(AutoTokenizer.from_pretrained(tmp_path / "g")) == 6149


@pytest.mark.parametrize(
    ("needed", "rows", "expected"),
    [(6200, 6144, 6272), (128_001, 128_000, 128_128), (98, 97, 98), (99, 98, 100), (90, 97, 97), (101, 100, 104)],
)
def test_padding(needed, rows, expected):
    assert padded(needed, rows) == expected


# ---- errors ------------------------------------------------------------------------------------------------


def test_models_that_dont_go_with_the_tokenizer(made, tiny_model, tmp_path):
    folder, _ = made
    source = [Source(str(folder / "domain.txt"))]
    (folder / "other.txt").write_text("Kartoffelsalat mit Remoulade. " * 40, encoding="utf-8")
    save_model(tmp_path / "small", tiny_model(vocab_size=97))
    with pytest.raises(UsageError, match="its embedding has 97 rows, the tokenizer has ids up to 6143"):
        extend("moai_tiny", source, tmp_path / "x", add=5, model=tmp_path / "small")
    save_model(tmp_path / "other", tiny_model(vocab_size=6400), load_tokenizer(folder / "out"))
    with pytest.raises(UsageError, match="own tokenizer has other tokens"):
        extend("moai_tiny", source, tmp_path / "x", add=5, model=tmp_path / "other")
    with pytest.raises(CheckpointError, match="doesn't exist"):
        extend("moai_tiny", source, tmp_path / "x", add=5, model=tmp_path / "none")
    run = tmp_path / "run"
    save(run, 3, model=tiny_model(vocab_size=6400), tokenizer=load_tokenizer(folder / "out"))
    with pytest.raises(UsageError, match="own tokenizer has other tokens"):
        extend("moai_tiny", source, tmp_path / "x", add=5, model=run)
    assert not (tmp_path / "x").exists()
    extend(str(run), [Source(str(folder / "other.txt"))], tmp_path / "x", add=2, model=run)  # a run is both
    assert load_model(tmp_path / "x").config.vocab_size == 6400 and (tmp_path / "x" / "chat_template.jinja").is_file()


def test_other_kinds_and_useless_text(tmp_path):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text(" ".join(random.Random(0).sample("abcdefgh", 8)), encoding="utf-8")
    source = [Source(str(tmp_path / "t.txt"))]
    with pytest.raises(CheckpointError, match="only plain BPE can be extended"):
        extend(str(tmp_path), source, tmp_path / "out", add=5)
    with pytest.raises(UsageError, match="no two tokens of moai_tiny stand side by side"):
        extend("moai_tiny", source, tmp_path / "out", add=5)
    with pytest.raises(UsageError, match="--add must lie"):
        extend("moai_tiny", source, tmp_path / "out", add=0)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert state["model"]["type"] == "WordLevel" and not (tmp_path / "out").exists()
