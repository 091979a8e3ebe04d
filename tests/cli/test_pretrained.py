"""The model that comes with moai: whole, small, what its card says, and an answer to a command without --model."""

from __future__ import annotations

import json
import re

import pytest

from moai_core import config as sizes
from moai_core import footprint, paths, storage


@pytest.fixture(scope="module")
def folder():
    found = paths.pretrained()
    assert found is not None, "the package lacks its model: moai_core/pretrained/moai-30m"
    return found


def test_it_is_whole_small_and_quantized(folder):
    storage.verify(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 20_000_000
    values = json.loads((folder / "config.json").read_text())
    formats = {name: one["format"] for name, one in values["quantization"]["modules"].items()}
    assert formats["embed_tokens"] == "int8" and formats["in_proj"] == formats["down_proj"] == "int4"
    numbers = sizes.fields(**{name: values[name] for name in sizes.DEFAULTS if name in values})
    assert footprint.parameters(numbers)["total"] == 28_681_248
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (paths.TOKENIZERS / "moai_small" / name).read_bytes()


def test_its_card_is_complete(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    headings = [
        "Use",
        "Size",
        "Training",
        "Data",
        "Licence",
        "Held-out text",
        "Samples",
        "Quantization",
        "What it can't do",
    ]
    assert [name for name in headings if f"\n## {name}\n" not in text] == []
    linked = re.findall(r"\]\(([\w.-]+)\)", text)
    assert {"ATTRIBUTION.md", "loss-1.png", "loss-2.png"} <= set(linked)
    assert all((folder / name).is_file() for name in linked)
    for language in ("en", "ko", "ja", "zh"):
        assert re.search(rf"^\| {language} \| \d\.\d{{4}} \|", text, re.MULTILINE), language
        assert re.search(rf"^\| {language}, before quantization \| \d\.\d{{4}} \|", text, re.MULTILINE), language


@pytest.mark.parametrize(
    ("prompt", "letters"),
    [
        ("Once upon a time", "[a-zA-Z]"),
        ("어느 날 아침, 아이는", "[가-힣]"),
        ("ある日、小さな村に", "[ぁ-んァ-ヶ一-龯]"),
        ("从前，山里有一个", "[一-龯]"),
    ],
    ids=["en", "ko", "ja", "zh"],
)
def test_it_goes_on_in_the_language_of_the_prompt(folder, moai, prompt, letters):
    """Greedy, the same twice, in the script of the prompt, and not the same word over and over."""
    command = ["generate", prompt, "-n", "24", "-t", "0", "--repetition-penalty", "1.2", "--seed", "0", "--json"]
    code, out, err = moai(*command)
    assert code == 0 and "using moai-30m, the model that comes with moai (28.7M parameters" in err, err
    found = json.loads(out)
    text = found["results"][0]["text"]
    assert found["model"] == str(folder) and json.loads(moai(*command)[1])["results"][0]["text"] == text
    assert len(re.findall(letters, text)) > 0.7 * sum(map(str.isalpha, text)) and len(set(text)) > 6, text


def test_it_answers_in_a_chat(moai):
    code, out, err = moai("chat", "--seed", "0", "-t", "0", "-n", "32", stdin=b"Hello! How are you?\n")
    assert code == 0 and len(re.findall(r"[a-z]{2,}", out)) >= 3, (out, err)


@pytest.mark.parametrize("language", ["en", "ko", "ja", "zh"])
def test_it_predicts_text_far_better_than_chance(language, moai):
    """Bits per byte on the packaged validation text: 8 is chance."""
    data = paths.RECIPES / "corpus" / "valid" / f"{language}.jsonl"
    code, out, _ = moai("eval", "--data", data, "--limit", "40", "--batch-size", "1", "--json")
    assert code == 0 and json.loads(out)["bits_per_byte"] < 2.2
