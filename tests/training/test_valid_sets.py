"""Validation sets with names: what each scores, and how a recipe writes them."""

import json
import math

import pytest

from moai_core.errors import RecipeError
from moai_core.evaluate import evaluate_file
from moai_core.recipe import Recipe, Source, load
from moai_core.training import train


def test_named_sets_are_scored_apart_and_together(tiny, corpus, tmp_path):
    lines = (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    paths = {"long": tmp_path / "long.jsonl", "short": tmp_path / "short.jsonl"}
    paths["long"].write_text("".join(lines[40:46]), encoding="utf-8")
    paths["short"].write_text("".join(lines[50:53]), encoding="utf-8")
    sets = f"data.valid={{long: {paths['long']}, short: {paths['short']}}}"
    recipe = tiny(sets, "train.eval_batches=1000", "data.max_length=512", "train.steps=3")
    events = []
    result = train(recipe, output=tmp_path / "run", on_event=events.append)
    row = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "valid_loss" in x][-1]
    assert list(row["sets"]) == ["long", "short"] and result.valid["sets"] == row["sets"]
    assert next(e for e in events if e["event"] == "valid")["sets"] == row["sets"]

    from moai_core.checkpoint import load_model
    from moai_core.data.tokenize import load_tokenizer

    model = load_model(tmp_path / "run/step-3")
    nats = tokens = 0
    for name, path in paths.items():
        alone = evaluate_file(model, load_tokenizer("moai_tiny"), str(path))
        assert row["sets"][name]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)
        assert row["sets"][name]["tokens"] == alone["tokens"]
        nats, tokens = nats + alone["nats"], tokens + alone["tokens"]
    assert row["valid_loss"] == pytest.approx(nats / tokens, rel=1e-5) and math.isfinite(row["valid_loss"])


def test_a_run_with_named_sets_resumes_to_the_same_figures(tiny, corpus, tmp_path):
    sets = f"data.valid={{a: {corpus / 'text.jsonl'}, b: {corpus / 'text.jsonl'}}}"
    sets = (sets, "optim.schedule=constant")
    whole = train(tiny(*sets), output=tmp_path / "whole")
    train(tiny(*sets, "train.steps=3"), output=tmp_path / "cut")
    resumed = train(tiny(*sets), output=tmp_path / "cut")
    assert resumed.resumed_from == 3 and resumed.valid == whole.valid
    assert resumed.valid["sets"]["a"] == resumed.valid["sets"]["b"]


def test_how_a_recipe_names_sets(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("train: {steps: 1}\ndata: {valid: {en: a.txt, ko: [b.txt, {path: c.txt, format: text}]}}\n")
    recipe = load(file)
    assert recipe.data.valid == (
        Source(f"{tmp_path}/a.txt", name="en"),
        Source(f"{tmp_path}/b.txt", name="ko"),
        Source(f"{tmp_path}/c.txt", format="text", name="ko"),
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    plain = load(file, ["data.valid=a.txt"]).to_dict()["data"]["valid"]
    assert "name" not in plain[0], "recipes stored by earlier releases still compare equal"
    assert load(file, ["data.valid={path: a.txt, name: en}"]).data.valid[0].name == "en"
    for wrong in ("{en: {path: a, name: x}}", "{en: {pth: a}}", "{}", "{en: []}"):
        with pytest.raises(RecipeError, match=r"data\.valid"):
            load(file, [f"data.valid={wrong}"])
    with pytest.raises(RecipeError, match=r"unknown key 'data\.train\.en'"):
        load(file, ["data.train={en: a.txt}"])
