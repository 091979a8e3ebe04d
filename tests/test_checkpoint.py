"""Checkpoints: what is written loads again bit for bit, also in transformers; what is damaged or hostile is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moai_core import checkpoint, storage, tensors
from moai_core.errors import CheckpointError, UsageError


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "말", "言", "horse"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 97, (2, 11), generator=generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


# ---- writing and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "12KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_model_round_trip_also_through_transformers(tiny_model, tmp_path, dtype, shard, tied):
    from transformers import AutoModelForCausalLM

    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    step = checkpoint.save(tmp_path, 7, model=model, max_shard_size=shard)
    assert (step / "model.safetensors.index.json").exists() == (shard == "12KB")
    mine, theirs = checkpoint.load_model(step), AutoModelForCausalLM.from_pretrained(step)
    for loaded in (mine, theirs):
        assert equal(loaded.state_dict(), model.state_dict())
    assert mine.model.layers[0].mamba.A_log.dtype == mine.model.layers[0].mamba.dt_bias.dtype == torch.float32
    assert mine.lm_head.weight.dtype == dtype and (mine.lm_head.weight is mine.model.embed_tokens.weight) == tied
    assert not mine.training and all(parameter.requires_grad for parameter in mine.parameters())
    stored = [name for file in step.glob("*.safetensors") for name in load_file(file)]
    assert len(stored) == len(set(stored)) and ("lm_head.weight" in stored) != tied


@pytest.mark.parametrize("shard", ["5GB", "12KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_loads_what_transformers_saved(tiny_model, tmp_path, shard, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert equal(checkpoint.load_model(tmp_path / "hf").state_dict(), model.state_dict())


def test_cast_keeps_the_recurrence_in_fp32(tiny_model, tmp_path):
    model = tiny_model()
    checkpoint.save_model(tmp_path / "m", model)
    loaded = checkpoint.load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert equal(loaded.state_dict(), model.to(torch.bfloat16).state_dict())
    half = {name: tensor.half() for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items()}
    for file in list((tmp_path / "m").iterdir()):
        if file.name == "manifest.json":
            file.unlink()
    save_file(half, tmp_path / "m" / "model.safetensors")
    foreign = checkpoint.load_model(tmp_path / "m")
    assert foreign.model.layers[1].mamba.D.dtype == torch.float32 and foreign.lm_head.weight.dtype == torch.float16


def test_a_model_is_never_saved_over_something_else(tiny_model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(UsageError, match="exists and is no saved model"):
            checkpoint.save_model(tmp_path / name, tiny_model())
    assert (tmp_path / "thesis" / "chapter-1.tex").read_text() == (tmp_path / "file").read_text() == "x"
    for seed in (1, 2):
        checkpoint.save_model(tmp_path / "new", tiny_model(seed=seed))
    assert equal(checkpoint.load_model(tmp_path / "new").state_dict(), tiny_model(seed=2).state_dict())


def test_run_folder_loads_the_latest_step_and_the_scan_is_picked(tiny_model, tmp_path, tokenizer):
    from transformers import AutoTokenizer

    for step in (1, 2):
        model = tiny_model(seed=step)
        checkpoint.save(tmp_path, step, model=model, tokenizer=tokenizer)
    assert equal(checkpoint.load_model(tmp_path, scan="reference").state_dict(), model.state_dict())
    again = AutoTokenizer.from_pretrained(tmp_path / "step-2")
    assert again("horse 言 x")["input_ids"] == [6, 5, 3]
    assert "tokenizer.json" in storage.read_manifest(tmp_path / "step-2")


@pytest.mark.parametrize("name", ["moai_tiny", "moai_small"])
def test_a_tokenizer_is_saved_small_and_always_the_same(tiny_model, tmp_path, name):
    from transformers import AutoTokenizer

    from moai_core import paths
    from moai_core.data.tokenize import load_tokenizer

    folders = [paths.TOKENIZERS / name, tmp_path / "a", tmp_path / "b"]
    for source, target in itertools.pairwise(folders):
        tokenizer = load_tokenizer(source)
        before = vars(tokenizer).copy()
        checkpoint.save_model(target, tiny_model(), tokenizer)
        assert vars(tokenizer) == before
    first, once, twice = ((folder / "tokenizer.json").read_bytes() for folder in folders)
    assert once == twice and len(once) < len(first) + 500
    text = "The state 상태는 커지지 않는다. 吾輩は猫である 床前明月光 <|im_end|>\n\n  12345 £"
    want = AutoTokenizer.from_pretrained(folders[0])
    assert AutoTokenizer.from_pretrained(folders[2])(text)["input_ids"] == want(text)["input_ids"]
    configs = [(folder / "tokenizer_config.json").read_bytes() for folder in folders[1:]]
    assert configs[0] == configs[1]


def test_generation_config_travels(tiny_model, tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [2, 6]
    checkpoint.save_model(tmp_path / "m", model)
    assert checkpoint.load_model(tmp_path / "m").generation_config.eos_token_id == [2, 6]


def test_training_state_round_trip_continues_bit_for_bit(tiny_model, tmp_path):
    model = tiny_model().train()
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    train(model, optimizer, 3)
    state = checkpoint.optimizer_state(model, optimizer)
    recipe = {"model": {"preset": None}, "name": "말"}
    trainer = {"tokens": 66, "loader": {"epoch": 1}, "lr": 0.1 + 0.2}
    step = checkpoint.save(tmp_path, 3, model=model, optimizer_state=state, trainer=trainer, recipe=recipe)
    restored, stored = checkpoint.load_training(step)
    assert stored == {"format": 1, "step": 3, **trainer, "recipe": recipe}
    assert equal(tensors.flatten(restored)[1], tensors.flatten(state)[1]) and restored["groups"] == state["groups"]
    train(model, optimizer, 3, seed=1)

    other = checkpoint.load_model(step).train()
    small = [p for p in other.parameters() if p.dim() == 1]  # the groups in another order, with other settings
    large = [p for p in other.parameters() if p.dim() > 1]
    again = torch.optim.AdamW([{"params": small[::-1]}, {"params": large}], lr=1.0, weight_decay=7.0)
    checkpoint.load_optimizer_state(other, again, restored)
    assert [group["weight_decay"] for group in again.param_groups] == [0.0, 0.1]
    assert again.param_groups[0]["betas"] == (0.9, 0.95)
    train(other, again, 3, seed=1)
    assert equal(other.state_dict(), model.state_dict())


def test_fp32_moments_of_bf16_weights_stay_fp32(tiny_model):
    model = tiny_model().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": torch.randn(parameter.shape)}
    again = torch.optim.AdamW(model.parameters())
    checkpoint.load_optimizer_state(model, again, checkpoint.optimizer_state(model, optimizer))
    for parameter in model.parameters():
        assert again.state[parameter]["exp_avg"].dtype == torch.float32
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert again.state[parameter]["step"] is not optimizer.state[parameter]["step"]


def test_optimizer_of_another_model_is_refused(tiny_model):
    model, other = tiny_model(), tiny_model(num_hidden_layers=3)
    state = checkpoint.optimizer_state(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError, match=r"no parameter model\.layers\.2\."):
        checkpoint.load_optimizer_state(other, torch.optim.AdamW(other.parameters()), state)


def test_any_tree_of_tensors_and_several_ranks(tiny_model, tmp_path):
    first = {
        "state": {"a/b": {"m": torch.randn(3, 5).bfloat16(), "q": torch.randint(0, 256, (300,), dtype=torch.uint8)}},
        "groups": [{"betas": (0.9, 0.95), "lr": 1 / 3, "fused": None, "empty": [], "flag": True}],
    }
    first["state"]["a"] = {"b": {"m": torch.randn(2).double()}}
    second = {
        "state": {"c": {"m": torch.randn(()), "none": torch.empty(0, 4), "view": torch.arange(12).view(3, 4).t()}}
    }
    step = checkpoint.save(tmp_path, 1, model=tiny_model(), optimizer_state=[first, second])
    assert (step / "optimizer-00002-of-00002.safetensors").exists()
    merged, _ = checkpoint.load_training(step)
    expected = {"state": {**first["state"], **second["state"]}, "groups": first["groups"]}
    (tree, named), (tree_again, named_again) = tensors.flatten(expected), tensors.flatten(merged)
    assert tree == tree_again and equal(named, named_again)
    assert isinstance(merged["groups"][0]["betas"], tuple)
    library = load_file(step / "optimizer-00001-of-00002.safetensors")
    assert sorted((t.dtype for t in library.values()), key=str) == [torch.bfloat16, torch.float64, torch.uint8]


def test_what_is_no_tensor_and_no_json_is_refused():
    with pytest.raises(TypeError, match=r"state/x: a set can't be stored"):
        tensors.flatten({"state": {"x": {1, 2}}})
    with pytest.raises(TypeError, match="must be a string"):
        tensors.flatten({"state": {0: 1}})


def test_rng_states_as_json_integers():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn(3), torch.randn(7)  # odd counts leave a cached Gaussian behind
    state = json.loads(json.dumps(checkpoint.rng_state()))

    def draw():
        return [
            random.gauss(0, 1),
            random.random(),
            *np.random.randn(4),
            *torch.randn(5).tolist(),
            *torch.rand(3).tolist(),
        ]

    expected = draw()
    checkpoint.set_rng_state(state)
    assert draw() == expected
    assert all(isinstance(i, int) for i in state["torch"])
    with pytest.raises(CheckpointError, match="random number generators is malformed"):
        checkpoint.set_rng_state({**state, "torch": state["torch"][:-1]})


def test_fingerprint_tells_weights_apart(tiny_model, tmp_path):
    model = tiny_model()
    one = checkpoint.save(tmp_path / "a", 1, model=model, trainer={"x": 1})
    checkpoint.save(tmp_path / "b", 2, model=model)
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(tmp_path / "b")
    (tmp_path / "b" / "step-2" / "manifest.json").unlink()
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(tmp_path / "b" / "step-2")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert checkpoint.fingerprint(one) != checkpoint.fingerprint(checkpoint.save(tmp_path / "a", 2, model=model))


# ---- runs: order, purge, replacement, leftovers, lock --------------------------------------------


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name != ".lock")


def test_steps_are_ordered_by_number_and_the_oldest_purged(tiny_model, tmp_path):
    events = []
    for step in (9, 10, 100, 11):
        checkpoint.save(tmp_path, step, model=tiny_model(), keep_last=2, on_event=events.append)
    # 100 is newer than the 11 just written: it belongs to another future and is not this save's to delete
    assert names(tmp_path) == ["step-10", "step-100", "step-11"]
    assert [event["step"] for event in events] == [9, 10, 100, 11]
    assert checkpoint.latest(tmp_path).name == "step-100"
    assert checkpoint.latest(tmp_path / "none") is None


def test_purge_counts_only_complete_steps_and_touches_no_others(tiny_model, tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model=tiny_model(), keep_last=None)
    (tmp_path / "step-2" / "manifest.json").unlink()
    os.truncate(tmp_path / "step-3" / "model.safetensors", 100)
    (tmp_path / "step-x").mkdir()
    checkpoint.save(tmp_path, 4, model=tiny_model(), keep_last=2)
    assert names(tmp_path) == ["step-1", "step-2", "step-3", "step-4", "step-x"]
    checkpoint.save(tmp_path, 5, model=tiny_model(), keep_last=2)
    assert names(tmp_path) == ["step-2", "step-3", "step-4", "step-5", "step-x"]
    checkpoint.save(tmp_path, 6, model=tiny_model(), keep_last=1, spare=4)
    assert names(tmp_path) == ["step-2", "step-3", "step-4", "step-6", "step-x"]


def test_an_existing_step_is_replaced_as_a_whole(tiny_model, tmp_path):
    checkpoint.save(tmp_path, 1, model=tiny_model(seed=1), optimizer_state={"a": 1})
    new = tiny_model(seed=2)
    step = checkpoint.save(tmp_path, 1, model=new)
    assert names(tmp_path) == ["step-1"] and not list(step.glob("optimizer*"))
    assert equal(checkpoint.load_model(step).state_dict(), new.state_dict())


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_leftovers_of_the_dead_are_removed_and_of_the_living_are_not(tiny_model, tmp_path):
    checkpoint.save(tmp_path, 1, model=tiny_model())
    dead, alive = dead_pid(), os.getppid()
    for name in (f"step-2.tmp-{dead}", f"step-2.tmp-{alive}", f"step-0.del-{dead}", "step-3.tmp-0", "notes.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / f"metrics.png.tmp-{dead}").write_text("x")
    os.rename(tmp_path / "step-1", tmp_path / f"step-1.old-{dead}")  # killed between the renames of a replacement
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    assert names(tmp_path) == ["notes.tmp", "step-1", f"step-2.tmp-{alive}", "step-3.tmp-0"]


# ---- folders from elsewhere: damaged, foreign, hostile -------------------------------------------


def in_child(work, *, memory: int = 256 << 20, seconds: int = 5) -> str:
    """What `work()` raises, as 'Type: message', in a child with that much more memory and CPU time."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            work()
            answer = "nothing raised"
        except BaseException as exc:
            answer = f"{type(exc).__name__}: {exc}"
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return answer or f"killed: status {status}"


def header(content: object, data: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE_WEIGHTS = {
    "empty": (b"", "truncated"),
    "length beyond the file": (struct.pack("<Q", 1 << 40) + b"{}", "truncated"),
    "length of 2**64-1": (b"\xff" * 8 + b"{}", "truncated"),
    "header too long": (header(b" " * (5 << 20)), "header of 5242880 bytes"),
    "not JSON": (header(b"{not json"), "header: not valid JSON"),
    "not UTF-8": (header(b'{"\xff":1}'), "header: not valid JSON"),
    "nested": (header(b"[" * (1 << 20)), "header: not valid JSON"),
    "long number": (header(b'{"a":' + b"9" * (1 << 20) + b"}"), "header: not valid JSON"),
    "a list": (header([1]), "not a JSON object"),
    "many small values": (header(b"[" + b"{}," * ((4 << 20) // 3 - 2) + b"1]"), "not a JSON object"),
    "many keys": (
        header(b"{" + b",".join(b'"%d":{}' % i for i in range(300_000)) + b"}"),
        "header's entry for '0' is malformed",
    ),
    "a key twice": (header(b'{"a":1,"a":2}'), "a key appears twice"),
    "overlap": (header({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "'b' overlaps another"),
    "gap": (header({"a": entry(), "b": entry(offsets=(9, 17))}, b"\0" * 17), "'b' leaves a gap"),
    "truncated data": (header({"a": entry()}, b"\0" * 7), "truncated or appended"),
    "appended data": (header({"a": entry()}, b"\0" * 9), "truncated or appended"),
    "huge shape": (header({"a": entry(shape=(1 << 40, 1 << 40))}, b"\0" * 8), "needs"),
    "shape of 10**30": (header({"a": entry(shape=(10**30,))}, b"\0" * 8), "malformed"),
    "negative": (header({"a": entry(shape=(-2, -1))}, b"\0" * 8), "malformed"),
    "float shape": (header({"a": entry(shape=(2.0,))}, b"\0" * 8), "malformed"),
    "boolean offset": (header({"a": entry(offsets=(False, 8))}, b"\0" * 8), "malformed"),
    "backwards": (header({"a": entry(offsets=(8, 0))}, b"\0" * 8), "needs 8 bytes"),
    "unknown type": (header({"a": entry(dtype="PICKLE")}, b"\0" * 8), "unsupported type 'PICKLE'"),
    "type is a list": (header({"a": {**entry(), "dtype": []}}, b"\0" * 8), "unsupported type"),
    "no entry": (header({"a": None}), "malformed"),
}


@pytest.fixture
def plain(tiny_model, tmp_path):
    """A folder as from the Hugging Face hub: no manifest."""
    tiny_model().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
    return tmp_path / "hf"


@pytest.mark.parametrize("case", HOSTILE_WEIGHTS)
def test_hostile_weights(plain, case):
    content, message = HOSTILE_WEIGHTS[case]
    (plain / "model.safetensors").write_bytes(content)
    answer = in_child(lambda: checkpoint.load_model(plain))
    assert answer.startswith("CheckpointError") and message in answer and "\n" not in answer
    assert "model.safetensors" in answer


def edit(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))


HOSTILE_CONFIGS = {
    "missing": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "empty": (lambda f: (f / "config.json").write_text(""), "config.json: not valid JSON"),
    "broken": (lambda f: (f / "config.json").write_text('{"model_type": "mamba_moai",'), "config.json: not valid JSON"),
    "binary": (lambda f: (f / "config.json").write_bytes(b"\x80\x04\x95pickle"), "config.json: not valid JSON"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 500_000), "config.json: not valid JSON"),
    "too large": (lambda f: (f / "config.json").write_text(" " * (2 << 20)), "larger than the 1 MiB"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, got list"),
    "a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "can't be read"),
    "auto_map": (lambda f: edit(f, auto_map={"AutoModelForCausalLM": "evil.py--Model"}), "auto_map asks to run code"),
    "llama": (lambda f: edit(f, model_type="llama"), "model_type is 'llama', only 'mamba_moai'"),
    "no type": (lambda f: edit(f, model_type=None), "model_type is 'None'"),
    "hidden size": (lambda f: edit(f, hidden_size=96), "has shape [97, 24], config.json asks for [97, 96]"),
    "astronomic size": (lambda f: edit(f, hidden_size=2**31 - 1, vocab_size=2**31 - 1), "no model has these sizes"),
    "size beyond 64 bits": (lambda f: edit(f, intermediate_size=10**40), "intermediate_size is 1000"),
    "layers": (lambda f: edit(f, num_hidden_layers=1 << 30), f"num_hidden_layers is {1 << 30}, the weights have 2"),
    "state": (lambda f: edit(f, state_size=1 << 30), "config.json asks for"),
    "negative": (lambda f: edit(f, state_size=-1), "state_size must be an integer >= 1"),
    "text": (lambda f: edit(f, hidden_size="24"), "hidden_size"),
    "infinity": (lambda f: edit(f, vocab_size=float("inf")), "vocab_size"),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_hostile_config(plain, case):
    change, message = HOSTILE_CONFIGS[case]
    change(plain)
    answer = in_child(lambda: checkpoint.load_model(plain))
    assert answer.startswith("CheckpointError") and message in answer and "\n" not in answer, answer


def shard(folder: Path, **moved: object) -> None:
    """Make an index for the single file; `moved` overrides where tensors are said to lie."""
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    places: dict = dict.fromkeys(
        load_file(folder / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors"
    )
    places.update(moved)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


HOSTILE_INDEXES = {
    "parent folder": ({"lm_head.weight": "../model.safetensors"}, "is not a .safetensors file of this folder"),
    "absolute": ({"lm_head.weight": "/etc/passwd.safetensors"}, "is not a .safetensors file of this folder"),
    "subfolder": ({"lm_head.weight": "a/b.safetensors"}, "is not a .safetensors file of this folder"),
    "backslash": ({"lm_head.weight": "..\\x.safetensors"}, "is not a .safetensors file of this folder"),
    "control": ({"lm_head.weight": "\x1b[31m.safetensors"}, "is not a .safetensors file of this folder"),
    "pickle": ({"lm_head.weight": "pytorch_model.bin"}, "is not a .safetensors file of this folder"),
    "a number": ({"lm_head.weight": 3}, "is not a .safetensors file of this folder"),
    "missing shard": ({"lm_head.weight": "model-00002-of-00002.safetensors"}, "00002.safetensors: missing, though"),
    "unknown tensor": ({"lm_head.bias": "model-00001-of-00001.safetensors"}, "has no tensor 'lm_head.bias'"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEXES)
def test_hostile_index(plain, case):
    moved, message = HOSTILE_INDEXES[case]
    shard(plain, **moved)
    answer = in_child(lambda: checkpoint.load_model(plain))
    assert answer.startswith("CheckpointError") and message in answer and "\x1b" not in answer, answer


def test_index_that_forgets_a_tensor_or_is_no_index(plain):
    shard(plain)
    assert checkpoint.load_model(plain) is not None
    index = plain / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is not in model\.safetensors\.index\.json"):
        checkpoint.load_model(plain)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        checkpoint.load_model(plain)


def test_an_index_that_would_fill_the_memory(plain):
    limit = 8 << 20
    for size, message in ((limit, "has no weight_map"), (limit + 3, "larger than the 8 MiB")):
        (plain / "model.safetensors.index.json").write_bytes(b"[" + b"{}," * ((size - 3) // 3) + b"1]")
        answer = in_child(lambda: checkpoint.load_model(plain))
        assert answer.startswith("CheckpointError") and message in answer, answer


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


HOSTILE_TENSORS = {
    "shape": (
        lambda w: w.update({"lm_head.weight": torch.zeros(98, 24)}),
        "tensor lm_head.weight has shape [98, 24], config.json asks for [97, 24]",
    ),
    "missing": (lambda w: w.pop("model.layers.1.mamba.D"), "missing tensors: model.layers.1.mamba.D"),
    "several missing": (
        lambda w: [w.pop(name) for name in sorted(w) if "layers.0.mamba" in name and "layernorm" not in name],
        "and 6 more",
    ),
    "unexpected": (lambda w: w.update(extra=torch.zeros(1)), "unexpected tensors: extra"),
    "integers": (lambda w: w.update({"model.layers.0.mamba.D": torch.zeros(48, dtype=torch.int32)}), "floating-point"),
}


@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_tensors_that_do_not_fit_the_config(plain, case):
    change, message = HOSTILE_TENSORS[case]
    rewrite(plain, change)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(plain)
    assert message in str(caught.value) and caught.value.exit_code == 3


def test_a_tied_head_that_differs_is_refused(plain):
    edit(plain, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to the embedding, but the two differ"):
        checkpoint.load_model(plain)
    rewrite(plain, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = checkpoint.load_model(plain)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_are_never_opened(plain, tmp_path):
    exploded = tmp_path / "exploded"
    (plain / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(exploded)}, plain / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickle files can run code") as caught:
        checkpoint.load_model(plain)
    assert "save_pretrained" in caught.value.hint and not exploded.exists()
    os.rename(plain / "pytorch_model.bin", plain / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.load_model(plain)
    assert not exploded.exists()


def test_paths_that_are_no_model(tmp_path, plain):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "step-1").mkdir(parents=True)
    (plain / "model.safetensors").unlink()
    for path, message in [
        (tmp_path / "no", "doesn't exist"),
        (plain / "config.json", "is not a folder"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "broken", "none of its checkpoints is complete"),
        (plain, "no model.safetensors and no model.safetensors.index.json"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_model(path)


def test_a_generation_config_of_nonsense(plain):
    for content in ("[1]", '{"temperature": {"a": ', "3"):
        (plain / "generation_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            checkpoint.load_model(plain)


def test_a_checkpoint_without_its_manifest_is_incomplete(tiny_model, tmp_path):
    step = checkpoint.save(tmp_path, 1, model=tiny_model())
    (step / "manifest.json").unlink()
    for load in (checkpoint.load_model, checkpoint.load_training, checkpoint.verify):
        with pytest.raises(CheckpointError, match=r"incomplete \(manifest\.json is missing\)"):
            load(step)


def test_a_trainer_state_of_another_format(tiny_model, tmp_path):
    step = checkpoint.save(tmp_path, 1, model=tiny_model(), trainer={"format": 2})
    for verified in (False, True):
        with pytest.raises(CheckpointError, match=r"trainer\.json: not of format 1") as caught:
            checkpoint.load_training(step, verified=verified)
        assert "newer moai" in caught.value.hint


def forge(step: Path, files: object) -> None:
    (step / "manifest.json").write_bytes(storage._manifest_bytes(files))


def test_a_forged_manifest(tiny_model, tmp_path):
    step = checkpoint.save(tmp_path, 1, model=tiny_model())
    good = storage.read_manifest(step)
    for extra in (
        {"../x": {"size": 0, "sha256": ""}},
        {"x": 3},
        {"x": {"size": 0}},
        {"/etc/passwd": {"size": 0, "sha256": ""}},
    ):
        forge(step, {**good, **extra})
        with pytest.raises(CheckpointError, match=r"manifest\.json: the entry .* is malformed"):
            checkpoint.verify(step)
    forge(step, {**good, "config.json": {"size": "many", "sha256": None}})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        checkpoint.verify(step)
    for content in (b"", b"{}", b"[]", b'{"files": 3}', b"\0" * 100):
        (step / "manifest.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            checkpoint.verify(step)
