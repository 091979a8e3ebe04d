"""GGUF files in llama.cpp itself: logits, greedy tokens, tokenizers, and what happens where it crashes.

Slow: each case starts llama.cpp in a process of its own. Needs llama-cpp-python (a source build of some minutes)."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf_helpers import TEXT, byte_level, files_of, sentencepiece, source_of, strings
from tokenizers import Tokenizer

from moai_core.convert import gguf, gguf_runtime, gguf_write, parity
from moai_core.convert.gguf_file import inspect
from moai_core.convert.gguf_pre import PRE, samples
from moai_core.convert.source import Options, Parity, Unavailable
from moai_core.paths import TOKENIZERS

pytest.importorskip("gguf", reason="needs the gguf package")
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")

SHAPES = {
    "jamba": {},
    "jamba, tied, odd sizes": {
        "tie_word_embeddings": True,
        "hidden_size": 66,
        "intermediate_size": 100,
        "state_size": 7,
        "time_step_rank": 5,
    },
    "jamba, prime width": {"hidden_size": 131, "conv_kernel_size": 3, "num_hidden_layers": 1},
    "jamba, many heads": {"hidden_size": 640, "intermediate_size": 64, "num_hidden_layers": 1},
    "mamba": {"ffn": "none", "dt_bc_norm": False},
    "falcon-mamba": {"ffn": "none", "dt_bc_norm": True},
    "learned norms, no ffn": {"ffn": "none", "dt_bc_norm": True, "learned": True},
    "padded vocabulary": {"vocab_size": 6200},
}


class Moai:
    name = "moai"

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def logits(self, ids):
        return self.model(torch.tensor([ids])).logits[0].float()

    def close(self):
        pass


@pytest.fixture(scope="module")
def moai_tiny():
    return {file.name: file.read_bytes() for file in (TOKENIZERS / "moai_tiny").iterdir()}


@pytest.fixture
def made_of(tiny_model, moai_tiny):
    def made(files=None, dtype=torch.float32, **fields):
        learned = fields.pop("learned", False)
        fields = {
            "vocab_size": 6144,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "state_size": 16,
            "initializer_range": 0.1,
            **fields,
        }
        model = tiny_model(**fields)
        if fields.get("ffn") == "none" and not learned:
            for name, parameter in model.named_parameters():
                if name.endswith(("dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight")):
                    parameter.data.fill_(1)
        rounded = model.to(dtype)
        source = source_of(copy.deepcopy(rounded), files or moai_tiny)
        return rounded.float(), source

    return made


def compared(model, source, path, outtype):
    gguf.write(source, path, Options("gguf", outtype))
    found = parity.compare(
        lambda: Moai(model), lambda: gguf.open_runtime(path, "gguf"), vocab=source.config["vocab_size"]
    )
    assert gguf.judge(found, Options("gguf", outtype)) is None
    return found


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_f32_gives_moais_logits(made_of, tmp_path, name):
    model, source = made_of(**SHAPES[name])
    found = compared(model, source, tmp_path / "m.gguf", "f32")
    assert found.max_delta <= 1e-4 and found.spread > 0.5
    assert found.argmax == found.positions == 96 and found.greedy == found.tokens == 64


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_0", None])
@pytest.mark.parametrize("name", ["jamba", "mamba"])
def test_rounded_types_run_and_keep_most_of_the_likeliest_tokens(made_of, tmp_path, name, outtype):
    model, source = made_of(hidden_size=128, dtype=torch.bfloat16 if outtype is None else torch.float32, **SHAPES[name])
    found = compared(model, source, tmp_path / "m.gguf", outtype)
    assert found.runtimes[1].endswith((outtype or "bf16").upper())
    limit = {"f16": 0.05, "bf16": 0.3, None: 0.3, "q8_0": 0.5, "q4_0": 6.0}[outtype]
    assert found.max_delta <= limit * found.spread


@needs_llama
@pytest.mark.slow
def test_the_command_compares_both_ways(tiny_model, tmp_path):
    from moai_core import convert
    from moai_core.checkpoint import save_model
    from moai_core.data.tokenize import load_tokenizer

    model = tiny_model(vocab_size=6144, hidden_size=64, num_hidden_layers=4, state_size=16)
    save_model(tmp_path / "in", model, load_tokenizer("moai_tiny"))
    for source, target, to in (("in", "m.gguf", "gguf"), ("m.gguf", "out", "moai")):
        found = convert.convert(tmp_path / source, tmp_path / target, to, outtype="f32")["parity"]
        assert found["max_delta"] <= 1e-4 * max(1, found["largest"]), found
        assert (found["argmax"], found["greedy"]) == (found["positions"], 64)


@needs_llama
@pytest.mark.slow
def test_a_sequence_continued_is_a_sequence_whole(made_of, tmp_path):
    _, source = made_of()
    gguf.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    runtime = gguf.open_runtime(tmp_path / "m.gguf", "gguf")
    try:
        prompt = list(range(10, 30))
        greedy = runtime.greedy(prompt, 300, 6144)  # beyond the room that the prompt alone gets
        whole = runtime.logits(prompt + greedy)
        assert greedy == whole[len(prompt) - 1 : -1].argmax(-1).tolist()
    finally:
        runtime.close()


def tokenizer_called(name):
    if name in PRE:
        return byte_level(PRE[name][0], whole=PRE[name][1])
    if name == "added":  # runs of spaces, as GPT-NeoX has them
        tokenizer = byte_level(PRE["gpt-2"][0])
        tokenizer.add_tokens([" " * width for width in range(2, 9)] + ["\t\t", "HTTP"])
        return tokenizer
    return sentencepiece(name == "sentencepiece")


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*(name for name in PRE if name != "default"), "sentencepiece", "sentencepiece bare", "added"]
)
def test_llama_cpp_tokenizes_as_the_tokenizer_does(made_of, tmp_path, name):
    tokenizer = tokenizer_called(name)
    _, source = made_of(files_of(tokenizer, unk_token="<unk>"), vocab_size=720, num_hidden_layers=1)
    gguf.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    assert not source.notes
    runtime = gguf.open_runtime(tmp_path / "m.gguf", "gguf")
    texts = [text for text in strings() + samples() + TEXT if text]
    try:
        wanted = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        differing = [text for text, ids in zip(texts, wanted, strict=True) if runtime.tokenize(text) != ids]
    finally:
        runtime.close()
    assert not differing, f"{len(differing)} of {len(texts)}: {differing[:5]}"


@needs_llama
@pytest.mark.slow
def test_llama_cpp_tokenizes_moai_tiny_as_the_note_says(made_of, moai_tiny, tmp_path):
    _, source = made_of(num_hidden_layers=1)
    gguf.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    tokenizer = Tokenizer.from_str(moai_tiny["tokenizer.json"].decode())
    runtime = gguf.open_runtime(tmp_path / "m.gguf", "gguf")
    try:
        differing = [text for text in samples() if runtime.tokenize(text) != tokenizer.encode(text).ids]
        assert all(runtime.tokenize(text) == tokenizer.encode(text).ids for text in TEXT)
        chat = "<|im_start|>user\n안녕, 'it' 1 2 3<|im_end|>\n<|im_start|>assistant\n"
        assert runtime.tokenize(chat, special=True) == tokenizer.encode(chat).ids
    finally:
        runtime.close()
    assert len(differing) == 187 and f"splits {len(differing)} otherwise" in source.notes[0]


@needs_llama
@pytest.mark.slow
def test_the_chat_template_renders_in_llama_cpp_python(made_of, tmp_path):
    from llama_cpp import llama_chat_format

    from moai_core.data.tokenize import load_tokenizer

    _, source = made_of(num_hidden_layers=1)
    gguf.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    template = inspect(tmp_path / "m.gguf").keys["tokenizer.chat_template"]
    chat = [
        {"role": "user", "content": "안녕"},
        {"role": "assistant", "content": "네"},
        {"role": "user", "content": "또"},
    ]
    render = llama_chat_format.Jinja2ChatFormatter(template=template, eos_token="</s>", bos_token="<s>")
    wanted = load_tokenizer("moai_tiny").apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert render(messages=chat).prompt == wanted


@needs_llama
@pytest.mark.slow
def test_a_crash_of_llama_cpp_is_an_error_and_not_ours(made_of, tmp_path, monkeypatch):
    """Without the null layer llama.cpp stops its process at the first token: the reason for that layer."""
    _, source = made_of()
    parts = gguf_write._parts
    monkeypatch.setattr(
        gguf_write, "_parts", lambda *given: [part for part in parts(*given) if not part.name.startswith("blk.4.")]
    )
    keys = gguf_write._keys
    monkeypatch.setattr(
        gguf_write,
        "_keys",
        lambda *given: {**keys(*given), "jamba.block_count": 4, "jamba.attention.head_count_kv": [0] * 4},
    )
    gguf.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    with pytest.raises(RuntimeError, match="ended with SIG"):
        runtime = gguf.open_runtime(tmp_path / "m.gguf", "gguf")
        runtime.logits([1, 2, 3])


@needs_llama
@pytest.mark.slow
def test_a_file_that_llama_cpp_refuses_is_an_error(made_of, tmp_path, monkeypatch):
    _, source = made_of()
    keys = gguf_write._keys
    monkeypatch.setattr(gguf_write, "_keys", lambda *given: {**keys(*given), "jamba.ssm.state_size": 9})
    gguf.write(source, tmp_path / "m.gguf", Options("gguf", "f32"))
    with pytest.raises(RuntimeError, match="doesn't load the file"):
        gguf.open_runtime(tmp_path / "m.gguf", "gguf")


# ---- without llama.cpp: fast -------------------------------------------------------------------------


def test_without_llama_cpp_the_check_is_unavailable(monkeypatch):
    monkeypatch.setattr(gguf_runtime, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"pip install 'moai\[llama\]'"):
        gguf_runtime.open_runtime(Path("m.gguf"), "gguf")


@pytest.mark.parametrize(
    ("outtype", "stored", "delta", "argmax", "why"),
    [
        ("f32", "F32", 0.009, 96, None),
        ("f32", "F32", 0.011, 96, "logits differ by 1.10e-02"),
        ("f32", "F32", float("inf"), 96, "logits differ"),
        ("f32", "F32", 0.001, 94, "only 94 of 96"),
        (None, "F32", 0.011, 96, "logits differ"),
        (None, "BF16", 0.2, 90, None),
        ("bf16", "BF16", 0.2, 60, "only 60 of 96"),
        ("q4_0", "Q4_0", 2.0, 40, None),
        ("q4_0", "Q4_0", 2.0, 3, "only 3 of 96"),
    ],
)
def test_judgement(outtype, stored, delta, argmax, why):
    found = Parity(("moai", f"llama-cpp-python 0.3.36 {stored}"), 96, delta, 1.0, 3.0, argmax, 60, 64)
    said = gguf.judge(found, Options("gguf", outtype))
    assert said is None if why is None else why in said


@pytest.mark.parametrize(("before", "after", "argmax", "fine"), [
    ("Q4_0", "F32", 91, True), ("Q4_0", "F32", 3, False), ("BF16", "F32", 94, True), ("F32", "F32", 96, False),
])  # fmt: skip
def test_of_two_files_the_one_that_rounds_more_decides(before, after, argmax, fine):
    names = (f"llama-cpp-python 0.3.36 {before}", f"llama-cpp-python 0.3.36 {after}")
    said = gguf.judge(Parity(names, 96, 0.1, 0.8, 3.0, argmax, 60, 64), Options("gguf", None))
    assert (said is None) == fine
