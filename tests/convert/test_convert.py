"""A conversion as a whole: what travels along, what the check does, what is left behind by what goes wrong (nothing)."""

from __future__ import annotations

import json
import os
import struct
from types import SimpleNamespace

import pytest
import torch
import transformers

from moai_core import convert as package
from moai_core import storage
from moai_core.convert import convert, jamba, parity
from moai_core.convert import folder as hf
from moai_core.errors import CheckpointError, StorageError, UsageError


@pytest.fixture
def tokenizer():
    from moai_core.data.tokenize import load_tokenizer

    return load_tokenizer("moai_tiny")


# ---- what travels along


@pytest.mark.parametrize("to", ["jamba", "moai"])
def test_tokenizer_template_special_tokens_and_card_travel(to, make, tokenizer, tmp_path):
    folder, model = make(vocab_size=len(tokenizer), tokenizer=tokenizer)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# 이야기\n\nOf my own.\n", encoding="utf-8")
    (folder / "LICENSE").write_text("MIT")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "trainer.json").write_text("{}")
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    (folder / "generation_config.json").write_text(model.generation_config.to_json_string())
    convert(folder, tmp_path / "out", to, check=False)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "안녕하세요 <|im_end|> hello"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template and again.chat_template
    assert again.eos_token == tokenizer.eos_token and again.pad_token == tokenizer.pad_token
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.7
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n---\n# 이야기\n") and "## Conversion" in card and to in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    assert not any((tmp_path / "out" / name).exists() for name in ("evil.py", "trainer.json"))
    storage.verify(tmp_path / "out")


def test_a_card_is_made_where_there_was_none(make, tmp_path):
    folder, _ = make()
    report = convert(folder, tmp_path / "out", "jamba")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# moai\n") and f"{report['parity']['max_delta']:.2e}" in card
    assert f"{report['parameters']:,} parameters" in card and "64 of 64 greedy steps" in card


def test_a_run_is_converted_from_its_latest_step(make, tmp_path, stored, same):
    from moai_core import checkpoint

    _, model = make()
    for step in (3, 12):
        with torch.no_grad():
            model.model.final_layernorm.weight.add_(step)
        checkpoint.save(tmp_path / "run", step, model=model)
    report = convert(tmp_path / "run", tmp_path / "out", "jamba", check=False)
    assert report["notes"][0] == "the latest checkpoint was taken: step-12" and report["source"]["name"] == "run"
    assert torch.equal(stored(tmp_path / "out")["model.final_layernorm.weight"], model.model.final_layernorm.weight)


@pytest.mark.parametrize(
    ("outtype", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)]
)
def test_outtype_casts_all_but_what_the_recurrence_multiplies(outtype, dtype, make, stored, tmp_path):
    folder, _ = make()
    report = convert(folder, tmp_path / "out", "jamba", outtype=outtype)
    tensors = stored(tmp_path / "out")
    fp32 = {n for n in tensors if n.endswith(("A_log", ".D", "dt_proj.bias"))}
    assert {tensors[n].dtype for n in fp32} == {torch.float32}
    assert {tensors[n].dtype for n in tensors.keys() - fp32} == {dtype}
    assert report["parity"]["argmax"] > 80 and (outtype == "f32") == (report["parity"]["max_delta"] < 1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_trim_vocab_goes_by_the_tokenizer(make, tokenizer, stored, tmp_path):
    folder, _ = make(vocab_size=len(tokenizer) + 10, tokenizer=tokenizer)
    report = convert(folder, tmp_path / "out", "jamba", trim_vocab=True)
    assert report["vocab_size"] == len(tokenizer) and report["parity"]["max_delta"] < 1e-4
    before, after = stored(folder), stored(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name][: len(tokenizer)])
    report = convert(tmp_path / "out", tmp_path / "again", "moai", trim_vocab=True, check=False)
    assert f"the vocabulary of {len(tokenizer)} has no padding" in report["notes"]


def test_trim_vocab_without_a_tokenizer_says_what_it_needs(make, tmp_path):
    folder, _ = make()
    with pytest.raises(UsageError, match="can't tell which of the 97 entries"):
        convert(folder, tmp_path / "out", "jamba", trim_vocab=True)


def test_shards_are_written_and_read(make, stored, same, tmp_path, monkeypatch):
    folder, _ = make()
    write = hf.write
    monkeypatch.setattr(hf, "write", lambda *args, **kwargs: write(*args, **kwargs, max_shard_size=20_000))
    convert(folder, tmp_path / "jamba", "jamba")
    assert len(list((tmp_path / "jamba").glob("model-*.safetensors"))) > 3
    convert(tmp_path / "jamba", tmp_path / "back", "moai", check=False)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    assert same(stored(folder), stored(tmp_path / "back"))


def test_events_count_the_tensors(make, tmp_path):
    folder, _ = make()
    seen = []
    report = convert(folder, tmp_path / "out", "moai", on_event=seen.append)
    tensors = [event for event in seen if event["event"] == "tensor"]
    assert [event["done"] for event in tensors] == list(range(1, report["tensors"] + 1))
    assert {event["total"] for event in tensors} == {report["tensors"]}
    assert [event["event"] for event in seen[len(tensors) :]] == ["check", "compared"]


def test_one_tensor_at_a_time_is_in_memory(make, tmp_path, monkeypatch):
    """Every tensor that was read is gone when the next but one is read."""
    import weakref

    folder, _ = make(num_hidden_layers=4)
    alive, most = weakref.WeakSet(), 0
    reader = hf.reader

    def watched(file, name):
        load = reader(file, name)

        def loaded():
            nonlocal most
            tensor = load()
            alive.add(tensor.untyped_storage())
            alive.add(tensor)
            most = max(most, sum(isinstance(thing, torch.Tensor) for thing in alive))
            return tensor

        return loaded

    monkeypatch.setattr(hf, "reader", watched)
    convert(folder, tmp_path / "out", "jamba", check=False)
    assert 1 <= most <= 2


# ---- the check


def test_a_conversion_that_changes_the_model_is_not_kept(make, tmp_path, monkeypatch):
    folder, _ = make()
    write = hf.write

    def wrong(target, values, found, *rest):
        name = "model.layers.1.mamba.D"
        return write(target, values, {**found, name: found[name].map(lambda D: D * 1.01)}, *rest)

    monkeypatch.setattr(hf, "write", wrong)
    with pytest.raises(CheckpointError, match="check failed, nothing was kept: logits differ by") as caught:
        convert(folder, tmp_path / "out", "jamba")
    assert caught.value.exit_code == 3 and [p.name for p in tmp_path.iterdir()] == ["moai"]
    report = convert(folder, tmp_path / "out", "jamba", check=False)
    assert report["parity"] == {"skipped": "--no-check"}


@pytest.mark.parametrize(
    ("outtype", "hint"), [(None, "please report it"), ("f32", "please report it"), ("bf16", "a wider --outtype")]
)
def test_a_failed_check_says_what_to_do(outtype, hint, make, tmp_path, monkeypatch):
    folder, _ = make()
    monkeypatch.setattr(parity, "judge", lambda found, options: "the two differ")
    with pytest.raises(CheckpointError, match="the two differ") as caught:
        convert(folder, tmp_path / "out", "jamba", outtype=outtype)
    assert hint in caught.value.hint and "--no-check" in caught.value.hint


def test_nan_is_never_an_agreement(make, tmp_path, monkeypatch):
    folder, _ = make()
    write = hf.write

    def wrong(target, values, found, *rest):
        return write(target, values, {n: f.map(lambda t: t * torch.nan) for n, f in found.items()}, *rest)

    monkeypatch.setattr(hf, "write", wrong)
    with pytest.raises(CheckpointError, match="logits differ by inf"):
        convert(folder, tmp_path / "out", "jamba")


def test_a_model_that_the_other_runtime_cannot_load_is_not_kept(make, tmp_path, monkeypatch):
    folder, _ = make()

    def open_runtime(path, format):
        raise ValueError("attention layer offset (4)\nmust be smaller")

    monkeypatch.setattr(jamba, "open_runtime", open_runtime)
    with pytest.raises(CheckpointError, match="check failed, nothing was kept: ValueError: attention") as caught:
        convert(folder, tmp_path / "out", "jamba")
    assert "\n" not in caught.value.message and [p.name for p in tmp_path.iterdir()] == ["moai"]


def test_the_check_is_skipped_with_words_where_the_memory_is_short(make, tmp_path, monkeypatch):
    folder, _ = make()
    monkeypatch.setattr(parity.device, "memory", lambda: (1 << 30, 1 << 28))
    report = convert(folder, tmp_path / "out", "jamba")
    assert report["parity"] == {"skipped": "it needs 1.0 GiB of memory, 0.2 are free"}
    assert "not compared with the original: it needs" in (tmp_path / "out" / "README.md").read_text()


def test_the_check_is_skipped_with_words_where_the_runtime_is_missing(make, tmp_path, monkeypatch):
    folder, _ = make()
    missing = jamba.TransformersRuntime
    monkeypatch.setattr(jamba, "TransformersRuntime", lambda path, name: missing(path, "JambaOfTomorrow"))
    report = convert(folder, tmp_path / "out", "jamba")
    assert "has no JambaOfTomorrow" in report["parity"]["skipped"]


# ---- what goes wrong


def intact(path):
    """Nothing but the source is left."""
    return sorted(entry.name for entry in path.iterdir()) == ["moai"]


@pytest.mark.parametrize("at", ["first tensor", "last tensor", "check", "compared"])
def test_an_interruption_leaves_nothing(at, make, tmp_path):
    folder, _ = make()

    def on_event(event):
        if (event["event"] == at) or (
            event["event"] == "tensor" and event["done"] == {"first tensor": 1, "last tensor": event["total"]}.get(at)
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", "jamba", on_event=on_event)
    assert intact(tmp_path)


def test_what_a_killed_conversion_left_goes_with_the_next(make, tmp_path):
    import subprocess

    folder, _ = make()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"out.tmp-{dead.pid}", f"out.tmp-{os.getppid()}", f"other.tmp-{dead.pid}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    convert(folder, tmp_path / "out", "moai", check=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"moai", "out", f"out.tmp-{os.getppid()}", f"other.tmp-{dead.pid}"}


def test_what_another_process_made_meanwhile_is_kept(make, tmp_path):
    folder, _ = make()
    target = tmp_path / "out"

    def on_event(event):
        if event["event"] == "tensor" and event["done"] == 1:
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(StorageError, match="another process has made it meanwhile"):
        convert(folder, target, "jamba", check=False, on_event=on_event)
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert {path.name for path in tmp_path.iterdir()} == {"moai", target.name}


def test_so_is_a_file(tmp_path):
    file = tmp_path / "out.gguf"
    with pytest.raises(StorageError, match="meanwhile"), package._new_file(file, replace=False) as ours:
        ours.write_text("ours")
        file.write_text("theirs")
    assert file.read_text() == "theirs" and list(tmp_path.iterdir()) == [file]


def test_a_model_whose_numbers_are_none_is_named(make, tmp_path):
    _, model = make()
    with torch.no_grad():
        model.model.layers[0].mamba.D[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mamba\.D holds NaN or infinity"):
        convert(tmp_path / "nan", tmp_path / "out", "jamba")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(make, tmp_path, monkeypatch):
    import errno

    folder, _ = make()
    monkeypatch.setattr(
        os, "write", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(StorageError, match="disk full"):
        convert(folder, tmp_path / "out", "jamba")
    monkeypatch.undo()
    assert intact(tmp_path)


def header(file, change):
    """Rewrites a safetensors file's header."""
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    new = json.dumps(change(json.loads(raw[8 : 8 + size]))).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


def values(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def index(folder, **changes):
    names = list(__import__("safetensors").safe_open(folder / "model.safetensors", "pt").keys())
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = {**dict.fromkeys(names, "model-00001-of-00001.safetensors"), **changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


D = "model.layers.0.mamba.D"
BAD = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 9000), "model.safetensors: .*truncated"),
    "cut in the header": (lambda f: os.truncate(f / "model.safetensors", 100), "truncated or not a safetensors file"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "truncated or not a safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "missing shard": (lambda f: index(f, **{D: "model-00002-of-00002.safetensors"}), "model-00002-of-00002.safetensors: missing"),
    "shard outside": (lambda f: index(f, **{D: "../model.safetensors"}), r"points to '../model.safetensors'"),
    "absolute shard": (lambda f: index(f, **{D: "/etc/passwd.safetensors"}), "not a .safetensors file of this folder"),
    "model type": (lambda f: values(f, model_type="llama"), "model_type is 'llama', which is none"),
    "no model type": (lambda f: values(f, model_type=None), "model_type"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "layers": (lambda f: values(f, num_hidden_layers=3), "num_hidden_layers is 3, the weights have 2"),
    "a million layers": (lambda f: values(f, num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "huge": (lambda f: values(f, hidden_size=1 << 40), "hidden_size"),
    "shape": (lambda f: values(f, hidden_size=25), r"embed_tokens.weight has the shape \[97, 24\], config.json makes it \[97, 25\]"),
    "dtype": (lambda f: header(f / "model.safetensors", lambda h: {**h, D: {**h[D], "dtype": "I32"}}), f"{D} holds int32"),
    "no tensor": (lambda f: header(f / "model.safetensors", lambda h: {"x" if n == D else n: v for n, v in h.items()}), f"{D} is missing"),
}  # fmt: skip


@pytest.mark.parametrize("format", ["jamba", "moai"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_clear_line_and_nothing_is_written(name, format, make, tmp_path):
    folder, _ = make()
    if format == "jamba":
        convert(folder, tmp_path / "jamba", "jamba", check=False)
        (folder / "x").touch()
        __import__("shutil").rmtree(folder)
        (tmp_path / "jamba").rename(folder)
        layers = 3
    else:
        layers = 2
    breaks, what = BAD[name]
    if name == "layers":
        breaks, what = (lambda f: values(f, num_hidden_layers=7)), f"num_hidden_layers is 7, the weights have {layers}"
    (folder / "manifest.json").unlink(missing_ok=True)  # with one, it would know
    breaks(folder)
    with pytest.raises(CheckpointError, match=what) as caught:
        convert(folder, tmp_path / "out", "jamba" if format == "moai" else "moai")
    assert caught.value.exit_code == 3 and "\n" not in caught.value.message and intact(tmp_path)


def test_an_unknown_tensor_is_named(make, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = make()
    (folder / "manifest.json").unlink()
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.layers.1.surprise": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.surprise: config.json has no place for it"):
        convert(folder, tmp_path / "out", "jamba")


def test_a_tied_head_that_differs_is_refused(make, tmp_path):
    folder, _ = make()
    (folder / "manifest.json").unlink()
    values(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight to model.embed_tokens.weight, but the two differ"):
        convert(folder, tmp_path / "out", "jamba")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"to": "llama"}, "--to can't be 'llama'"),
        ({"to": "jamba", "outtype": "q4_0"}, "--outtype q4_0 is for --to gguf"),
        ({"to": "jamba", "outtype": "q5"}, "--outtype can't be 'q5'"),
        ({"to": "jamba", "dst": "moai"}, "already exists"),
        ({"to": "jamba", "dst": "moai", "force": True}, "would replace the source"),
        ({"to": "jamba", "dst": "mine"}, "already exists"),
        ({"to": "jamba", "dst": "mine", "force": True}, "is nothing that moai wrote"),
        ({"to": "gguf", "dst": "mine", "force": True}, "is nothing that moai wrote"),
        ({"to": "gguf", "dst": "mine/thesis.txt", "force": True}, "is nothing that moai wrote"),
    ],
)
def test_arguments_are_checked_before_any_work(arguments, what, make, tmp_path):
    folder, _ = make()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    arguments = {"dst": "out", **arguments}
    with pytest.raises(UsageError, match=what):
        convert(folder, tmp_path / arguments.pop("dst"), **arguments)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work" and (folder / "config.json").exists()


def test_an_empty_source_is_not_the_current_folder(tmp_path):
    with pytest.raises(UsageError, match="the source's name is empty"):
        convert("", tmp_path / "out", "jamba")


def test_force_replaces_an_earlier_result(make, tmp_path):
    folder, _ = make()
    (tmp_path / "out").mkdir()  # an empty folder is no obstacle
    convert(folder, tmp_path / "out", "jamba", check=False)
    convert(folder, tmp_path / "out", "moai", check=False, force=True)
    assert package.detect(tmp_path / "out") == "moai"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moai", "out"]


# ---- names of the hub


def hub_lists(monkeypatch, files):
    """Makes the hub have one repository, with these files."""
    import huggingface_hub

    found = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, timeout: found)


def test_a_name_of_the_hub_without_a_connection_is_one_clear_line(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("state-spaces/mamba-9b", "hf://state-spaces/mamba-9b"):
        with pytest.raises(
            StorageError, match=r"^state-spaces/mamba-9b: no such path, and the hub can't be reached .*refused"
        ) as caught:
            convert(name, tmp_path / "out", "moai")
    assert "\n" not in caught.value.message and not (tmp_path / "out").exists()


def test_only_the_needed_files_are_fetched(make, tmp_path, monkeypatch):
    import huggingface_hub

    folder, _ = make()
    there = [path.name for path in folder.iterdir()]
    asked = {}

    def snapshot_download(repo, allow_patterns):
        asked["repo"], asked["files"] = repo, allow_patterns
        return str(folder)

    more = ["flax_model.msgpack", "pytorch_model.bin", "onnx/model.onnx", "modeling_evil.py", "a.gguf"]
    hub_lists(monkeypatch, there + more)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    report = convert("someone/tiny-moai", tmp_path / "out", "jamba", check=False)
    assert asked == {
        "repo": "someone/tiny-moai",
        "files": [f for f in there if f in ("config.json", "generation_config.json")] + ["model.safetensors"],
    }
    assert report["source"]["name"] == "someone/tiny-moai"
    assert "Converted from `someone/tiny-moai` (moai) to jamba" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("files", "what"),
    [(["a.gguf", "b.gguf"], "has 2 GGUF files"), (["config.json"], "has no weights"), ([], "has no weights")],
)
def test_a_repository_that_cannot_be_converted(files, what, tmp_path, monkeypatch):
    hub_lists(monkeypatch, files)
    with pytest.raises(UsageError, match=what):
        convert("someone/thing", tmp_path / "out", "moai")


def test_paths_that_are_no_names():
    with pytest.raises(CheckpointError, match="doesn't exist"):
        convert("/no/such/place", "/tmp/never", "moai")


# ---- through llama.cpp


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("to", ["moai", "jamba", "gguf"])
def test_a_gguf_file_is_judged_by_what_llama_cpp_rounds(to, outtype, make, tokenizer, tmp_path):
    pytest.importorskip("llama_cpp")
    folder, _ = make(
        vocab_size=len(tokenizer), tokenizer=tokenizer, hidden_size=64, intermediate_size=64, state_size=16
    )
    convert(folder, tmp_path / "model.gguf", "gguf", outtype=outtype)
    report = convert(tmp_path / "model.gguf", tmp_path / "out", to)
    assert report["parity"]["runtimes"][1].startswith("llama-cpp-python")
    assert (report["parity"]["max_delta"] < 1e-3) == (outtype == "f32")
