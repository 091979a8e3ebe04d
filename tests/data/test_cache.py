"""The token cache: what it holds, when it is made again, what damage does, two processes at once."""

import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from moai_core.data.cache import tokenized
from moai_core.data.read import find_files, read_documents
from moai_core.data.tokenize import Encoder
from moai_core.errors import DataError, StorageError

CHAT = {"messages": [{"role": "user", "content": "질문?"}, {"role": "assistant", "content": "답."}]}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "내 데이터"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"문서 {i} " * (i % 9 + 1)}) + "\n" for i in range(300))
    )
    (folder / "b.jsonl").write_text("".join(json.dumps(CHAT) + "\n" for _ in range(11)))
    (folder / "c.txt").write_text("plain text\n" * 50)
    old = time.time() - 60
    for file in folder.iterdir():
        os.utime(file, (old, old))
    return folder


def events_of(source, tokenizer, **options):
    events = []
    return tokenized(str(source), tokenizer, on_event=events.append, **options), events


def worked(events):
    return any(event["event"] == "progress" for event in events)


def test_it_holds_what_the_encoder_gives(source, tokenizer):
    made, events = events_of(source, tokenizer)
    encoder = Encoder(tokenizer)
    documents = list(read_documents(find_files(source)[0]))
    start = 0
    for encoded, end in zip(encoder.encode(documents), made.ends.tolist(), strict=True):
        assert made.read(start, end - start).tolist() == encoded.ids.tolist()
        want = np.ones(len(encoded.ids), dtype=bool) if encoded.trainable is None else encoded.trainable
        assert made.trainable(start, end - start).tolist() == want.tolist()
        start = end
    assert start == made.tokens == len(made.ids)
    assert made.documents == 312
    assert made.ids.dtype == np.uint16
    assert made.bytes == sum(len(s.text.encode()) for d in documents for s in d.segments)
    done = [e["done"] for e in events if e["event"] == "progress"]
    assert done == sorted(done)
    assert done[-1] == events[-1]["total"] == sum(f.stat().st_size for f in source.iterdir())


def test_masked_tokens_are_counted_over_chunks(source, tokenizer, monkeypatch):
    from moai_core.data import cache

    made, _ = events_of(source, tokenizer)
    flags = made.trainable(0, made.tokens)
    positions = np.random.default_rng(0).integers(0, made.tokens + 1, 500)
    want = [int(np.count_nonzero(~flags[:p])) for p in positions]
    for chunk in (64, 1 << 20):
        monkeypatch.setattr(cache, "_CHUNK", chunk)
        assert made.masked_before(positions).tolist() == want
        assert made.masked_before(np.array([0, made.tokens])).tolist() == [0, int(np.count_nonzero(~flags))]


def test_a_second_time_nothing_is_tokenized(source, tokenizer):
    first, events = events_of(source, tokenizer)
    assert worked(events)
    second, events = events_of(source, tokenizer)
    assert not worked(events)
    assert first.folder == second.folder
    again = pickle.loads(pickle.dumps(second))
    assert (again.ids == second.ids).all()
    assert len(pickle.dumps(second)) < 2000


def test_what_makes_a_new_entry(source, tokenizer, tokenizer_folder):
    from moai_core.data.tokenize import load_tokenizer

    first, _ = events_of(source, tokenizer)
    assert worked(events_of(source, load_tokenizer("moai_tiny"))[1])
    with open(source / "c.txt", "a") as file:
        file.write("more")
    changed, events = events_of(source, tokenizer)
    assert worked(events)
    assert changed.key != first.key
    renamed = source.rename(source.with_name("renamed"))
    assert not worked(events_of(renamed, tokenizer)[1])  # the same contents


def test_a_change_of_equal_size_is_seen(source, tokenizer):
    first, _ = events_of(source, tokenizer)
    text = (source / "c.txt").read_text()
    (source / "c.txt").write_text(text.replace("plain", "PLAIN"))
    assert events_of(source, tokenizer)[0].key != first.key


@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin", "hashes.bin", "mask.bin", "meta.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_seen_and_mended(source, tokenizer, name, how):
    made, _ = events_of(source, tokenizer)
    want = made.ids.tolist()
    path = made.folder / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(raw if how == "flip" else raw[:-1])
    again, events = events_of(source, tokenizer)
    assert again.ids.tolist() == want
    assert [e for e in events if e["event"] == "warning" and "made again" in e["message"]]
    assert not worked(events_of(source, tokenizer)[1])


def test_skipped_lines_are_remembered(source, tokenizer):
    with open(source / "a.jsonl", "a") as file:
        file.write("broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:301: not valid JSON"):
        events_of(source, tokenizer)
    made, events = events_of(source, tokenizer, on_error="skip")
    assert made.skipped == 1
    assert "1 bad line" in events[-1]["message"]
    made, events = events_of(source, tokenizer, on_error="skip")
    assert made.skipped == 1
    assert not worked(events)
    assert "a.jsonl:301" in events[-1]["message"]
    with pytest.raises(DataError, match=r"a\.jsonl:301"):
        events_of(source, tokenizer)


def test_nothing_is_left_of_a_failed_build(source, tokenizer, tmp_path):
    (source / "d.jsonl").write_text("broken")
    with pytest.raises(DataError):
        events_of(source, tokenizer)
    assert [p.name for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()] == []


def test_empty_data(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="holds no text") as caught:
        tokenized(str(tmp_path / "a.txt"), tokenizer)
    assert caught.value.exit_code == 2
    (tmp_path / "b.jsonl").write_text('{"text": ""}\nnope\n')
    with pytest.raises(DataError, match="1 bad line left out, the first: "):
        tokenized(str(tmp_path / "b.jsonl"), tokenizer, on_error="skip")


def test_a_cache_that_cannot_be_written(source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError) as caught:
        tokenized(str(source), tokenizer, cache=tmp_path / "file")
    assert caught.value.exit_code == 4


def test_two_processes_at_once(source, tokenizer_folder, tmp_path):
    code = (
        "import sys; from moai_core.data.cache import tokenized; from moai_core.data.tokenize import load_tokenizer\n"
        "made = tokenized(sys.argv[1], load_tokenizer(sys.argv[2])); print(made.key, made.tokens)"
    )
    with open(source / "big.jsonl", "w") as file:
        for i in range(30_000):
            file.write(json.dumps({"text": f"문서 {i} abc" * 5}) + "\n")
    environment = {**os.environ, "MOAI_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(source), str(tokenizer_folder)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(answers) == 1
    assert len([p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]) == 1
