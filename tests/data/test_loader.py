"""Batches: the accounting identity, masks, exact resuming at any worker count and world size, mixtures, shards,
streams, held-out text.
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moai_core.data.loader import make_loader
from moai_core.data.rows import Turns, permutation
from moai_core.data.tokenize import Encoder, token_bytes
from moai_core.errors import DataError, StorageError, UsageError

WORDS = ["상태는", "커지지", "않는다", "吾輩は", "猫である", "床前明月光", "scan", "state", "the", "mamba"]


def corpus(path, count, *, seed=0, long=5, mark=""):
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            words = rng.choice(WORDS, size=int(rng.integers(1, 12)) * (20 if index % long == 0 else 1))
            file.write(json.dumps({"text": f"{mark}{index} " + " ".join(words)}, ensure_ascii=False) + "\n")
    return str(path)


def chats(path, count):
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            turns = [
                {"role": "user", "content": f"질문 {index}?"},
                {"role": "assistant", "content": f"답 {index}." * (index % 4 + 1)},
            ]
            file.write(json.dumps({"messages": turns * (index % 3 + 1)}, ensure_ascii=False) + "\n")
    return str(path)


@pytest.fixture
def text(tmp_path):
    return corpus(tmp_path / "말뭉치 a.jsonl", 120)


def take(loader, count):
    """The next batches as plain lists."""
    return [flat(batch) for batch in itertools.islice(iter(loader), count)]


def flat(batch):
    return [batch[name].tolist() for name in ("input_ids", "labels", "seq_idx")] + [batch["bytes"]]


def saved(loader):
    return json.loads(json.dumps(loader.state_dict()))


# ---- what a batch is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_an_epoch_holds_every_token_once_and_the_account_agrees(tmp_path, tokenizer, section, kind, train_on):
    path = corpus(tmp_path / "a.jsonl", 120) if kind == "text" else chats(tmp_path / "c.jsonl", 120)
    loader = make_loader(section(train=path, train_on=train_on), tokenizer, batch_size=3)
    account, table = loader.account, token_bytes(tokenizer)
    seen, trained, padding, first = [], 0, 0, 0
    for batch in loader.once():
        ids, labels, seq_idx = batch["input_ids"], batch["labels"], batch["seq_idx"]
        assert ids.shape == labels.shape == seq_idx.shape == (3, 32)
        assert (ids.dtype, labels.dtype, seq_idx.dtype) == (torch.int64, torch.int64, torch.int32)
        real = seq_idx >= 0
        assert (ids[~real] == 0).all()
        assert (labels[~real] == -100).all()
        counted = labels >= 0
        assert (labels[counted] == ids[counted]).all()
        assert batch["bytes"] == int(table[labels[counted].numpy()].sum())
        step = torch.diff(seq_idx, dim=1)
        assert ((step == 0) | (step == 1) | (seq_idx[:, 1:] < 0)).all()
        starts = real & torch.cat([torch.ones(3, 1, dtype=torch.bool), step == 1], dim=1)
        assert not (labels[starts] >= 0).any()
        assert (seq_idx[:, 0] <= 0).all()
        seen += ids[real].tolist()
        trained += int(counted.sum())
        first += int(starts.sum())
        padding += int((~real).sum())
    documents = [e for d in read_all(path) for e in Encoder(tokenizer).encode([d])]
    assert sorted(seen) == sorted(int(i) for e in documents for i in e.ids)
    assert account["tokens"] == len(seen) == account["trained"] + account["first"] + account["masked"]
    assert (account["trained"], account["first"]) == (trained, first)
    assert account["rows"] * 32 == account["tokens"] + account["padding"]
    assert padding - account["padding"] == (-account["rows"] % 3) * 32  # once() fills its last batch with empty rows
    assert (account["masked"] == 0) == (kind == "text" or train_on == "all")
    assert account["documents"] == 120


def read_all(path):
    from moai_core.data.read import find_files, read_documents

    return read_documents(find_files(path)[0])


def test_labels_never_hold_what_a_user_said(tmp_path, tokenizer, section):
    path = tmp_path / "c.jsonl"
    with open(path, "w") as file:
        for _ in range(40):
            file.write(
                json.dumps({"messages": [{"role": "user", "content": "QQQQ"}, {"role": "assistant", "content": "zz"}]})
                + "\n"
            )
    loader = make_loader(section(train=str(path)), tokenizer, batch_size=2)
    allowed = {
        *tokenizer("zz", add_special_tokens=False)["input_ids"],
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        -100,
    }
    for batch in loader.once():
        assert set(batch["labels"].unique().tolist()) <= allowed
    both = make_loader(section(train={"path": str(path), "train_on": "all"}), tokenizer, batch_size=2)
    assert both.account["trained"] > loader.account["trained"]


def test_each_row_is_read_back_as_the_documents_it_holds(text, tokenizer, section):
    documents = {d.segments[0].text for d in read_all(text)}
    loader = make_loader(section(train=text, max_length=4096), tokenizer, batch_size=1)
    found = set()
    for batch in loader.once():
        for number in range(int(batch["seq_idx"].max()) + 1):
            ids = batch["input_ids"][batch["seq_idx"] == number]
            found.add(tokenizer.decode(ids[1:-1]))
            assert ids[-1] == tokenizer.eos_token_id
    assert found == documents


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_resuming_is_exact_across_epochs_and_workers(text, tokenizer, section, workers, streaming):
    def make(workers):
        data = section(train=text, workers=workers, streaming=streaming, max_length=1024)
        return make_loader(data, tokenizer, batch_size=4, seed=3)

    whole = take(make(0), 30)
    loader = make(workers[0])
    assert take(loader, 7) == whole[:7]
    again = make(workers[1])
    again.load_state_dict(saved(loader))
    assert take(again, 11) == whole[7:18]
    last = make(workers[0])
    last.load_state_dict(saved(again))
    assert take(last, 12) == whole[18:]
    assert last.epoch >= 1
    assert len(json.dumps(last.state_dict())) < 1000


def test_resuming_at_every_batch(text, tokenizer, section):
    make = lambda: make_loader(section(train=text, max_length=128), tokenizer, batch_size=5, seed=1)  # noqa: E731
    loader = make()
    whole = take(make(), 40)
    for k, batch in enumerate(itertools.islice(iter(loader), 39)):
        assert flat(batch) == whole[k]
        again = make()
        again.load_state_dict(saved(loader))
        assert take(again, 1) == [whole[k + 1]]


def test_epochs_differ_and_hold_the_same_rows(text, tokenizer, section):
    loader = make_loader(section(train=text), tokenizer, batch_size=1, seed=5)
    one, two = take(loader, loader.len_rows), take(loader, loader.len_rows)
    assert one != two
    assert sorted(map(str, one)) == sorted(map(str, two))
    assert loader.epoch == 2
    other = make_loader(section(train=text), tokenizer, batch_size=1, seed=6)
    assert take(other, loader.len_rows) != one


def test_without_shuffling_rows_come_in_the_files_order(text, tokenizer, section):
    loader = make_loader(section(train=text, shuffle=False, max_length=8), tokenizer, batch_size=1)
    first = tokenizer(json.loads(Path(text).read_text(encoding="utf-8").splitlines()[0])["text"])["input_ids"]
    assert take(loader, 1)[0][0][0] == first[:8]
    assert take(loader, 1)[0][0][0] == first[8:16]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_sequence_of_rows_does_not_depend_on_the_world_size(text, tokenizer, section, streaming):
    def rows(world, batch_size, count, state=None):
        loaders = [
            make_loader(
                section(train=text, streaming=streaming), tokenizer, batch_size=batch_size, rank=r, world_size=world
            )
            for r in range(world)
        ]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        made = []
        for batches in itertools.islice(zip(*map(iter, loaders), strict=True), count):
            made += [batches[i % world]["input_ids"][i // world].tolist() for i in range(world * batch_size)]
        states = [saved(loader) for loader in loaders]
        assert all(state == states[0] for state in states)
        return made, states[0]

    one, _ = rows(1, 1, 96)
    assert rows(4, 2, 12)[0] == one
    begun, state = rows(3, 2, 8)
    rest, _ = rows(2, 3, 8, state)
    assert begun + rest == one


def test_another_position_is_refused(text, tmp_path, tokenizer, section):
    loader = make_loader(section(train=text), tokenizer, batch_size=2)
    take(loader, 3)
    state = saved(loader)
    for values in (
        {"max_length": 64},
        {"train": corpus(tmp_path / "b.jsonl", 50)},
        {"shuffle": False},
        {"valid_fraction": 0.5},
    ):
        other = make_loader(section(**({"train": text} | values)), tokenizer, batch_size=2)
        with pytest.raises(DataError, match="its position means nothing"):
            other.load_state_dict(state)
    for bad in ({}, {"version": 9}, {**state, "rows": -1}, {**state, "rows": "x"}):
        with pytest.raises(DataError):
            make_loader(section(train=text), tokenizer, batch_size=2).load_state_dict(bad)


def test_the_global_random_state_is_not_touched(text, tokenizer, section):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()
    take(make_loader(section(train=text, workers=2), tokenizer, batch_size=2), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_permutations_are_fixed_for_ever():
    assert permutation(8, 0, 0).tolist() == permutation(8, 0, 0).tolist()
    assert sorted(permutation(1000, 7, 3).tolist()) == list(range(1000))
    assert permutation(10, 1, 0).tolist() == FIXED


FIXED = permutation(10, 1, 0).tolist()


# ---- mixtures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [3, 1, 2], [0.333, 0.667], [1e-9, 1], [1 / 3, 2 / 3], [5.0]])
def test_turns_hold_the_weights_exactly_and_evenly(weights):
    turns = Turns(weights)
    picked = [turns.pick(n) for n in range(turns.period * 2)]
    share = np.array(weights) / sum(weights)
    for source in range(len(weights)):
        mine = [(n, row) for n, (s, row) in enumerate(picked) if s == source]
        assert [row for _, row in mine] == list(range(len(mine)))
        assert abs(len(mine) / len(picked) - share[source]) <= 1.0001 / 10_000
        if turns.period < 100:
            assert len(mine) / len(picked) == pytest.approx(share[source], abs=1e-12)
        # evenly: never more than a row or so ahead of its share, for each source
        for count, (n, _) in enumerate(mine[:200]):
            assert abs(count - n * share[source]) <= len(weights) + 1


def test_mixtures_in_batches(tmp_path, tokenizer, section):
    paths = [corpus(tmp_path / f"{mark}.jsonl", 60, seed=i, mark=mark) for i, mark in enumerate("AB")]
    listed = [{"path": paths[0], "weight": 3}, {"path": paths[1], "weight": 1}]
    loader = make_loader(section(train=listed, max_length=4096), tokenizer, batch_size=2, seed=2)
    seen = {"A": 0, "B": 0}
    for batch in itertools.islice(iter(loader), 40):
        for row, numbers in zip(batch["input_ids"], batch["seq_idx"], strict=True):
            marks = {tokenizer.decode(row[numbers == n])[3] for n in range(int(numbers.max()) + 1)}
            assert len(marks) == 1
            seen[marks.pop()] += 1
    assert seen == {"A": 60, "B": 20}
    whole = take(make_loader(section(train=listed), tokenizer, batch_size=2, seed=2), 60)
    half = make_loader(section(train=listed, workers=2), tokenizer, batch_size=2, seed=2)
    take(half, 33)
    again = make_loader(section(train=listed), tokenizer, batch_size=2, seed=2)
    again.load_state_dict(saved(half))
    assert take(again, 27) == whole[33:]


def test_a_mixture_of_a_stream_and_a_file_resumes(tmp_path, text, tokenizer, section):
    hub = tmp_path / "hub"
    hub.mkdir()
    corpus(hub / "train.jsonl", 90, seed=9)
    listed = [{"path": text, "weight": 1}, {"path": f"hf://{hub}", "weight": 2}]
    make = lambda: make_loader(section(train=listed), tokenizer, batch_size=3, seed=2)  # noqa: E731
    whole = take(make(), 60)
    loader = make()
    take(loader, 25)
    again = make()
    again.load_state_dict(saved(loader))
    assert take(again, 35) == whole[25:]
    assert loader.len_rows is None


# ---- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_gives_each_document_once_an_epoch(text, tokenizer, section, monkeypatch):
    from moai_core.data import stream

    monkeypatch.setattr(stream, "DOCUMENTS", 16)
    loader = make_loader(section(train=text, streaming=True, max_length=4096), tokenizer, batch_size=1)
    found = []
    for batch in loader:
        if loader.epoch:
            break
        found += [
            tokenizer.decode(batch["input_ids"][batch["seq_idx"] == n][1:-1])
            for n in range(int(batch["seq_idx"].max()) + 1)
        ]
        counts = loader.account
    assert sorted(found) == sorted(d.segments[0].text for d in read_all(text))
    assert counts["documents"] == 120
    assert counts["tokens"] == counts["trained"] + counts["first"] + counts["masked"]
    assert counts["rows"] * 4096 == counts["tokens"] + counts["padding"]


def test_hub_streams_resume_exactly(tmp_path, tokenizer, section, monkeypatch):
    from moai_core.data import stream

    monkeypatch.setattr(stream, "DOCUMENTS", 16)
    hub = tmp_path / "내 데이터"
    hub.mkdir()
    corpus(hub / "a.jsonl", 50)
    corpus(hub / "b.jsonl", 50, seed=1)
    make = lambda workers=0: make_loader(section(train=f"hf://{hub}", workers=workers), tokenizer, batch_size=4)  # noqa: E731
    whole = take(make(), 70)
    for stop, workers in ((1, 0), (13, 2), (40, 0), (61, 2)):
        loader = make(workers)
        take(loader, stop)
        again = make()
        again.load_state_dict(saved(loader))
        assert take(again, 8) == whole[stop : stop + 8]


@pytest.mark.parametrize("end", ["raise", "leave"])
def test_workers_end_with_the_process(tmp_path, end):
    """A run that ends by an error, or just ends, must not wait for workers that ignore SIGTERM."""
    text = tmp_path / "text.txt"
    text.write_text("상태는 커지지 않는다. " * 40, encoding="utf-8")
    code = (
        "import sys\n"
        "from moai_core import recipe\n"
        "from moai_core.data.loader import make_loader\n"
        "from moai_core.data.tokenize import load_tokenizer\n"
        f"made = recipe.load('cpu-tiny', ['data.train={text}', '~data.valid', 'data.valid_fraction=0', "
        f"'data.max_length=16', 'data.workers=2', 'data.cache={tmp_path / 'cache'}'])\n"
        "loader = make_loader(made.data, load_tokenizer('moai_tiny'), batch_size=2)\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        "print('one')\n"
        f"{'raise SystemExit(3)' if end == 'raise' else 'keep = batches'}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3 if end == "raise" else 0, "one\n"), done.stderr


@pytest.fixture
def unreachable(monkeypatch):
    """A hub at an address where nobody listens, and no patience for a second try."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(module, name, "http://127.0.0.1:9")
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail("waits for another try"))


def test_a_hub_that_does_not_answer_is_told_at_once(tokenizer, section, unreachable):
    with pytest.raises(StorageError) as caught:
        take(make_loader(section(train="hf://someone/some_set/train"), tokenizer, batch_size=1), 1)
    found = caught.value
    assert found.message.startswith("hf://someone/some_set/train: not in the cache, and the hub can't be reached (")
    assert (
        "refused" in found.message
        and "\n" not in found.message
        and "hf download --repo-type dataset someone/some_set" in found.hint
    )


def test_without_the_hub_its_cache_is_read(tmp_path, tokenizer, section, unreachable, monkeypatch):
    """The library's cache, filled by the library from a folder, laid where it keeps a dataset of that name."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "some_set").mkdir()
    corpus(tmp_path / "some_set" / "train.jsonl", 30)
    datasets.load_dataset(str(tmp_path / "some_set"), cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made" / "some_set").iterdir()
    shutil.copytree(made, tmp_path / "cache" / "someone___some_set" / "default")
    loader = make_loader(section(train="hf://someone/some_set", max_length=4096), tokenizer, batch_size=1)
    take(loader, 1)
    assert loader.account["documents"] == 30
    assert not datasets.config.HF_HUB_OFFLINE


def test_bad_streams(tmp_path, tokenizer, section):
    with pytest.raises(DataError, match="no such folder"):
        take(make_loader(section(train=f"hf://{tmp_path}/nothing"), tokenizer, batch_size=1), 1)
    with pytest.raises(DataError, match="expected hf://name"):
        take(make_loader(section(train="hf://a/b/c/d"), tokenizer, batch_size=1), 1)
    with pytest.raises(UsageError, match="always streamed"):
        make_loader(section(train=f"hf://{tmp_path}", streaming=False), tokenizer, batch_size=1)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no text"):
        take(make_loader(section(train=str(tmp_path / "blank.jsonl"), streaming=True), tokenizer, batch_size=1), 1)
    (tmp_path / "bad.jsonl").write_text('{"text": "ok"}\nbroken\n')
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"bad\.jsonl:2: not valid JSON"):
            take(
                make_loader(
                    section(train=str(tmp_path / "bad.jsonl"), streaming=True, workers=workers), tokenizer, batch_size=1
                ),
                9,
            )
    loader = make_loader(
        section(train=str(tmp_path / "bad.jsonl"), streaming=True, on_error="skip"), tokenizer, batch_size=1
    )
    take(loader, 1)
    assert loader.account["skipped"] == 1


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("hf://squad", ("squad", None, "train")),
        ("hf://squad/validation", ("squad", None, "validation")),
        ("hf://user/set", ("user/set", None, "train")),
        ("hf://user/set/test", ("user/set", None, "test")),
        ("hf://wikimedia/wikipedia:20231101.ko", ("wikimedia/wikipedia", "20231101.ko", "train")),
        ("hf://wikimedia/wikipedia:20231101.ko/train[:1%]", ("wikimedia/wikipedia", "20231101.ko", "train[:1%]")),
        ("hf://odd:/split", ("odd", None, "split")),
        ("hf:///data/my set", ("/data/my set", None, "train")),
        ("hf:///data/my set:default/test", ("/data/my set", "default", "test")),
    ],
)
def test_hub_paths(path, parts):
    from moai_core.data.hub import parse_hub

    assert parse_hub(path) == parts


# ---- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_train_and_held_out_text_never_overlap(text, tokenizer, section, streaming):
    data = section(train=text, valid_fraction=0.2, max_length=64, streaming=streaming)
    train, valid = (make_loader(data, tokenizer, split=split, batch_size=1) for split in ("train", "valid"))
    if streaming:
        take(train, 1), take(valid, 1)
    both = make_loader(section(train=text, max_length=64), tokenizer, batch_size=1)
    a, b = train.account, valid.account
    assert a["tokens"] + b["tokens"] == both.account["tokens"]
    assert a["pieces"] + b["pieces"] == both.account["pieces"]
    assert 0.05 < b["pieces"] / both.account["pieces"] < 0.4

    def pieces(loader):
        found = set()
        for batch in loader.once(30 if streaming else None):
            numbers = batch["seq_idx"][0]
            found |= {tuple(batch["input_ids"][0][numbers == k].tolist()) for k in range(int(numbers.max()) + 1)}
        return {piece for piece in found if len(piece) > 20}  # a rest of a few words may occur twice in the text itself

    assert pieces(valid)
    assert not pieces(train) & pieces(valid)


def test_validation_is_the_same_each_time_and_whole(text, tokenizer, section):
    data = section(train=text, valid=text, max_length=64)
    loader = make_loader(data, tokenizer, split="valid", batch_size=7, seed=1)
    one = [flat(batch) for batch in loader.once()]
    assert one == [flat(batch) for batch in loader.once()]
    assert one == [flat(batch) for batch in make_loader(data, tokenizer, split="valid", batch_size=7, seed=2).once()]
    assert len(list(loader.once(2))) == 2
    shards = [
        list(make_loader(data, tokenizer, split="valid", batch_size=3, rank=r, world_size=2).once()) for r in range(2)
    ]
    assert len(shards[0]) == len(shards[1])
    tokens = sum(int((batch["seq_idx"] >= 0).sum()) for shard in shards for batch in shard)
    assert tokens == loader.account["tokens"]


def test_no_validation_data(tmp_path, text, tokenizer, section):
    assert make_loader(section(train=text), tokenizer, split="valid", batch_size=1) is None
    (tmp_path / "one.txt").write_text("a short text")
    events = []
    data = section(train=str(tmp_path / "one.txt"), valid_fraction=0.1)
    assert make_loader(data, tokenizer, split="valid", batch_size=1, on_event=events.append) is None
    assert "too little text" in events[-1]["message"]
    assert make_loader(data, tokenizer, batch_size=1).account["pieces"] == 1


def test_a_single_long_text_is_held_out_by_pieces(tmp_path, tokenizer, section):
    (tmp_path / "book.txt").write_text("".join(f"line {i} of a book\n" for i in range(2000)))
    data = section(train=str(tmp_path / "book.txt"), valid_fraction=0.1)
    train, valid = (make_loader(data, tokenizer, split=split, batch_size=1).account for split in ("train", "valid"))
    assert 0.05 < valid["tokens"] / (train["tokens"] + valid["tokens"]) < 0.2


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_nothing_to_train_on(tmp_path, tokenizer, section):
    with pytest.raises(UsageError, match=r"data\.train is not set"):
        make_loader(section(), tokenizer, batch_size=1)
    with pytest.raises(DataError, match="no such file"):
        make_loader(section(train=str(tmp_path / "nothing")), tokenizer, batch_size=1)
    chats(tmp_path / "c.jsonl", 3)
    with pytest.raises(DataError, match="no token that the loss counts"):
        make_loader(section(train=str(tmp_path / "c.jsonl"), max_length=1), tokenizer, batch_size=1)
