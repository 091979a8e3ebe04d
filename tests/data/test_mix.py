"""`moai data build` from files to a mix: what is kept, dropped, held out and told."""

import json
import random
import re
from pathlib import Path

import pytest
import zstandard

from moai_core.data import mix
from moai_core.data.mix import report, verify
from moai_core.data.mix.recipe import check
from moai_core.errors import CheckpointError, DataError, RecipeError, UsageError
from moai_core.paths import RECIPES


def sentence(draw):
    """Fourteen words that nobody has used before, so that no two sentences share a window by chance."""
    words = ["".join(draw.choice("bdfglmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(14)]
    return " ".join(words).capitalize() + "."


@pytest.fixture
def corpus(tmp_path):
    """Prose in blocks, a second file sliced out of a packed one, chats, CSV pairs, and text held out elsewhere."""
    root, draw = tmp_path / "root", random.Random(7)
    root.mkdir()
    blocks = ["\n".join(sentence(draw) for _ in range(4)) for _ in range(120)]
    blocks[7] = blocks[3]
    blocks[11] = blocks[5][:-30].upper()
    blocks[20] = "Menu | Next | 3 | 4"
    (root / "prose.txt").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    other = "".join(sentence(draw) + "\n" for _ in range(60))
    whole = ("skipped, not read\n" * 3 + other + "tail\n").encode()
    (root / "lines.txt.zst").write_bytes(zstandard.compress(whole))
    chats = [
        {"source": "a" if n % 2 else "b", "messages": [
            {"role": "user", "content": f"Is {sentence(draw)}"}, {"role": "assistant", "content": sentence(draw)}]}
        for n in range(40)
    ]  # fmt: skip
    (root / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    (root / "pairs.csv").write_text(
        'Q,A,label\r\n"안녕, 반가워","네, ""반가워요""!",0\r\n날씨 어때?,맑아요,1\r\n', encoding="utf-8"
    )
    (root / "held.txt").write_text(blocks[40].split("\n")[1] + "\n" + blocks[50] + "\n", encoding="utf-8")
    return root, blocks, len("skipped, not read\n") * 3, len(other.encode())


def recipe_text(first, size, extra=""):
    tail = "licence: CC0-1.0, origin: made up"
    return f"""
seed: 3
valid: 0.1
calib: 0.1
against: [held.txt]
filters:
  prose: {{min_chars: 40, min_letters: 0.6, drop_lines: ['^Menu'], replace: {{'XX': 'yy'}}}}
sources:
  - {{name: prose, path: prose.txt, lang: en, split: blocks, filter: [prose], weight: 2, near: 0.6, {tail}}}
  - {{name: lines, path: lines.txt.zst, slice: [{first}, {size}], lang: en, split: lines, join_chars: 300, shuffle: true,
     weight: 0.5, {tail}}}
  - {{name: chat, path: chat.jsonl, lang: en, group: chat, where: {{source: a}}, {tail}}}
  - {{name: pairs, path: pairs.csv, lang: ko, group: chat, columns: {{Q: user, A: assistant}}, valid: 0, calib: 0, {tail}}}
{extra}"""


@pytest.fixture
def made(corpus, tmp_path):
    root, blocks, first, size = corpus
    file = tmp_path / "small.yaml"
    file.write_text(recipe_text(first, size), encoding="utf-8")
    out = tmp_path / "mix"
    return mix.build(mix.load(file), out, root=root), out, file, root, blocks


def texts(out, part, source):
    return [text for name, text in report.records(out, part) if name == source]


def test_every_unit_is_accounted_for(made):
    told, out, *_ = made
    assert told == json.loads((out / "mix.json").read_text())
    for source in told["sources"]:
        gone = sum(c["units"] for c in source["dropped"].values())
        kept = sum(c["units"] for part, c in source["kept"].items() if part != "train with weight")
        assert source["read"]["units"] == gone + kept, source["name"]
        for part in ("train", "valid", "calib"):
            records = texts(out, part, source["name"])
            seen = source["kept"].get("train with weight" if part == "train" else part, {"records": 0, "bytes": 0})
            assert len(records) == seen["records"]
            if source["name"] in ("prose", "lines"):
                assert sum(len(text.encode()) for text in records) == seen["bytes"]
    assert {"read", "dropped", "kept", "cut", "bytes_by_language"} == set(told["totals"])


def test_duplicates_go_and_weights_repeat(made):
    told, out, _, _, blocks = made
    prose = told["sources"][0]
    assert prose["dropped"]["duplicate"]["units"] == 1 and prose["dropped"]["near duplicate"]["units"] == 1
    assert prose["dropped"]["short"]["units"] == 1, "the menu's only line was cut"
    every = {text for part in ("train", "valid", "calib") for text in texts(out, part, "prose")}
    assert blocks[3] in every and blocks[5] in every and blocks[11] not in every
    train = texts(out, "train", "prose")
    assert len(train) == 2 * len(set(train)) and sorted(train)[::2] == sorted(train)[1::2]
    assert len(texts(out, "valid", "prose")) == len(set(texts(out, "valid", "prose"))) > 3
    half = told["sources"][1]["kept"]
    assert 0 < half["train with weight"]["records"] < half["train"]["records"]


def test_held_out_text_is_nowhere_in_training(made):
    _, out, _, _, blocks = made
    train = "\n".join(text for _, text in report.records(out, "train"))
    lines = {line for part in ("valid", "calib") for _, text in report.records(out, part) for line in text.split("\n")}
    assert lines and not [line for line in lines if len(line) > 30 and line in train]
    assert blocks[40].split("\n")[1] not in train, "one line near to `against` is cut"
    assert blocks[40].split("\n")[3] in "\n".join(
        text for p in ("train", "valid", "calib") for _, text in report.records(out, p)
    )
    assert blocks[50] not in train, "a unit that is near as a whole goes"
    assert verify.folder(out)["errors"] == []


def test_what_is_read_is_what_was_asked_for(made):
    told, out, *_ = made
    pairs = texts(out, "train", "pairs")
    assert pairs == ['user: 안녕, 반가워\nassistant: 네, "반가워요"!', "user: 날씨 어때?\nassistant: 맑아요"]
    lines = [
        one for part in ("train", "valid", "calib") for text in texts(out, part, "lines") for one in text.split("\n")
    ]
    assert not [line for line in lines if line.startswith(("skipped", "tail"))]
    assert told["sources"][1]["read"]["units"] == 60 and told["sources"][2]["read"]["units"] == 20
    assert {name.rsplit("-", 1)[0] for name in told["files"]} >= {"train-en", "valid-en", "train-chat"}
    attribution = (out / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert (
        all(f"| {name} | " in attribution for name in ("prose", "lines", "chat", "pairs")) and "CC0-1.0" in attribution
    )


def test_the_same_input_gives_the_same_bytes(made, tmp_path):
    told, out, file, root, _ = made
    mix.build(mix.load(file), tmp_path / "again", root=root)
    assert (out / "manifest.json").read_bytes() == (tmp_path / "again/manifest.json").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        mix.build(mix.load(file), out, root=root)
    (root / "prose.txt").write_text("Only one, but long enough to be kept by every rule there is.\n")
    smaller = mix.build(mix.load(file), out, root=root, force=True)
    assert smaller["sources"][0]["read"]["units"] == 1
    before, after = (one["sources"][1]["kept"]["valid"] for one in (told, smaller))
    assert before["units"] == after["units"], "other sources move nothing into or out of the held-out part"


def test_shards_and_levels_hold_the_same_records(made, tmp_path):
    told, out, file, root, _ = made
    split = mix.build(mix.load(file), tmp_path / "split", root=root, shard_bytes=4000, level=19)
    assert len(split["files"]) > len(told["files"]) and split["totals"] == told["totals"]
    for part in ("train", "valid", "calib"):
        assert list(report.records(tmp_path / "split", part)) == list(report.records(out, part))


def test_interrupted_or_failed_builds_leave_nothing(corpus, tmp_path):
    root, _, first, size = corpus
    file = tmp_path / "r.yaml"
    file.write_text(recipe_text(first, size))

    def interrupt(event):
        if event.get("task") == "write" and event["done"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mix.build(mix.load(file), tmp_path / "mix", root=root, on_event=interrupt)
    (root / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\nnot json\n')
    with pytest.raises(DataError, match=r"chat\.jsonl:2: not valid JSON"):
        mix.build(mix.load(file), tmp_path / "mix", root=root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "r.yaml", "root"] or sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["r.yaml", "root"]


def test_damage_and_leaks_are_found(made):
    _, out, *_ = made
    name = next(path for path in out.glob("train-en-*"))
    raw = name.read_bytes()
    name.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="train-en"):
        verify.folder(out)
    name.write_bytes(raw)
    leak = texts(out, "valid", "prose")[0]
    line = json.dumps({"source": "prose", "lang": "en", "text": leak}).encode() + b"\n"
    name.write_bytes(raw + zstandard.compress(line))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"][name.name]["size"] == len(raw)
    (out / "manifest.json").unlink()
    from moai_core import storage

    for path in out.iterdir():
        manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": storage.sha256(path)}
    (out / "manifest.json").write_bytes(storage._manifest_bytes(manifest["files"]))
    found = verify.folder(out)["errors"]
    assert len(found) == 1 and re.search(r"4 lines of prose in training stand in held-out text", found[0].message)


WRONG = {
    "sources: []": "sources must be a list",
    "seed: x\nsources: []": "seed must be a whole number",
    "sauces: 1": "unknown key 'sauces'; did you mean sources?",
    "filters: {a: {min_char: 3}}": "unknown key 'filters.a.min_char'; did you mean min_chars?",
    "filters: {a: {drop: ['(']}}": "filters.a.drop: not a regular expression",
    "filters: {a: {replace: {'(': x}}}": "filters.a.replace: not a regular expression",
    "sources: [{name: a, path: b, lang: en, licence: MIT}]": "sources[0] has no origin",
    "sources: [{name: a/b, path: b, lang: en, licence: MIT, origin: x}]": "sources[0].name must be letters",
    "sources: [{name: a, path: b, lang: en, licence: MIT, origin: x, filter: [z]}]": "no filter 'z'",
    "sources: [{name: a, path: b, lang: en, licence: MIT, origin: x, weight: 0}]": "weight must be a number > 0",
    "sources: [{name: a, path: b, lang: en, licence: MIT, origin: x, splitt: lines}]": "did you mean split?",
    "sources: [{name: a, path: b, lang: en, licence: MIT, origin: x, columns: {Q: human}}]": "columns.Q must be text, user",
    "sources: [{name: a, path: b, lang: en, licence: MIT, origin: x, valid: 0.7, calib: 0.7}]": "more than all of it",
    "sources: [{name: a, path: b, lang: en, licence: M, origin: x}, {name: a, path: b, lang: en, licence: M, origin: x}]": "name 'a' is taken",
    "sources: [1]": "sources[0] must be a mapping",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes_name_file_and_line(tmp_path, text):
    file = tmp_path / "r.yaml"
    file.write_text("# a comment\n" + text)
    found, errors = check(file)
    assert found is None and any(WRONG[text] in error.message for error in errors), [e.message for e in errors]
    assert all(error.message.startswith(f"{file}:") for error in errors)
    with pytest.raises(RecipeError):
        mix.load(file)


def test_missing_and_changed_files(corpus, tmp_path):
    root, _, first, size = corpus
    file = tmp_path / "r.yaml"
    file.write_text(recipe_text(first, size).replace("prose.txt", "nowhere.txt"))
    assert [e.message for e in verify.files(mix.load(file), root)] == [
        f"{file}:9: {root}/nowhere.txt: no such file or folder"
    ]
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        mix.build(mix.load(file), tmp_path / "mix", root=root)
    file.write_text(recipe_text(first, size).replace("split: lines", f"split: lines, sha256: {'0' * 64}"))
    with pytest.raises(DataError, match=r"lines\.txt\.zst holds other bytes than the recipe was made for"):
        mix.build(mix.load(file), tmp_path / "mix", root=root)
    file.write_text(recipe_text(first, 10**6))
    with pytest.raises(DataError, match=r"ends at byte \d+, \d+ bytes before the slice does"):
        mix.build(mix.load(file), tmp_path / "mix", root=root)


@pytest.mark.parametrize("file", sorted((RECIPES / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_recipes_are_valid(file):
    found, errors = check(file)
    assert found is not None, [error.message for error in errors]
    assert mix.find(file.stem) == file and found.description
    assert all(source.licence and source.origin for source in found.sources)
    assert Path(file).read_text(encoding="utf-8").isprintable() is False


def test_a_source_may_be_a_hub_dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [
        {"text": f"A row of its own, with the words {n * 7919} and {n * n + 31}.", "topic": n % 2} for n in range(10)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "r.yaml"
    tail = "lang: en, licence: MIT, origin: here, near: 1"
    file.write_text(f"sources: [{{name: hub, path: 'hf://{folder}', where: {{topic: 1}}, {tail}}}]")
    made = mix.build(mix.load(file), tmp_path / "mix", root=tmp_path)
    assert texts(tmp_path / "mix", "train", "hub") == [row["text"] for row in rows if row["topic"]]
    assert made["totals"]["read"]["units"] == 5
    file.write_text(f"sources: [{{name: hub, path: 'hf://{folder}x', {tail}}}]")
    with pytest.raises(DataError, match="no such folder"):
        mix.build(mix.load(file), tmp_path / "again", root=tmp_path)
