"""Tokenizers into GGUF's keys and back. Equality is judged by ids of varied strings, never by looking at the keys alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_helpers import TEXT, byte_level, files_of, sentencepiece, strings
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from moai_core.convert import gguf_tokenizer
from moai_core.convert.gguf_pre import ORIGINS, PRE, as_llama, samples
from moai_core.convert.source import Refused
from moai_core.errors import CheckpointError
from moai_core.paths import TOKENIZERS

WHERE = Path("/models/small")


def rebuilt(keys, rows):
    """The tokenizer as another program's file would give it: without tokenizer.json in it."""
    files, used, _ = gguf_tokenizer.from_keys(
        {k: as_arrays(v) for k, v in keys.items() if k != "tokenizer.huggingface.json"}, rows, WHERE
    )
    return Tokenizer.from_str(files["tokenizer.json"].decode()), files, used


def as_arrays(value):
    import numpy as np

    return np.array(value) if isinstance(value, list) and value and not isinstance(value[0], str) else value


def ids(tokenizer, texts, special=False):
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=special)]


@pytest.mark.parametrize("name", [name for name in PRE if name != "default"])
def test_each_pattern_finds_its_name_and_comes_back(name):
    patterns, whole = ORIGINS.get(name, PRE[name][0]), PRE[name][1]
    tokenizer = byte_level(patterns, whole=whole)
    keys, notes = gguf_tokenizer.to_keys(files_of(tokenizer), 620, WHERE)
    assert keys["tokenizer.ggml.pre"] == name and bool(notes) == (name in ORIGINS)
    assert len(keys["tokenizer.ggml.tokens"]) == 620 and keys["tokenizer.ggml.token_type"][-1] == gguf_tokenizer.UNUSED
    back, _, used = rebuilt(keys, 620)
    texts = strings() + samples()
    assert ids(back, texts) == ids(tokenizer, texts)
    assert used == tokenizer.get_vocab_size()
    assert [back.decode(row) for row in ids(back, texts)] == texts


def test_the_tokenizer_of_gpt2_has_no_pattern_of_its_own():
    tokenizer = byte_level(PRE["gpt-2"][0])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    keys, notes = gguf_tokenizer.to_keys(files_of(tokenizer), 600, WHERE)
    assert keys["tokenizer.ggml.pre"] == "gpt-2" and notes == []
    back, _, _ = rebuilt(keys, 600)
    assert ids(back, strings()) == ids(tokenizer, strings())


@pytest.fixture(scope="module")
def moai_tiny():
    return {file.name: file.read_bytes() for file in (TOKENIZERS / "moai_tiny").iterdir()}


def test_moai_tiny_gets_the_nearest_and_the_difference_is_told(moai_tiny):
    keys, notes = gguf_tokenizer.to_keys(moai_tiny, 6144, WHERE)
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert "splits 187 otherwise" in notes[0] and "generation" in notes[1]
    state = json.loads(moai_tiny["tokenizer.json"])
    assert [keys["tokenizer.ggml.tokens"][index] for index in (0, 1, 2, 6)] == ["<pad>", "<s>", "</s>", "<|im_end|>"]
    assert keys["tokenizer.ggml.token_type"][:8] == [gguf_tokenizer.CONTROL] * 7 + [gguf_tokenizer.NORMAL]
    assert len(keys["tokenizer.ggml.merges"]) == len(state["model"]["merges"])
    special = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown", "eot")}
    assert special == {"bos": 1, "eos": 2, "padding": 0, "unknown": 3, "eot": 6}
    assert keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.ggml.add_eos_token"] is False
    # Running text: what llama.cpp gives is what the tokenizer gives, but after an apostrophe at a word's start
    ours, theirs = (Tokenizer.from_str(moai_tiny["tokenizer.json"].decode()) for _ in range(2))
    as_llama(theirs, *PRE["gpt-2"])
    assert ids(ours, TEXT) == ids(theirs, TEXT)
    differing = [
        text for text, a, b in zip(samples(), ids(ours, samples()), ids(theirs, samples()), strict=True) if a != b
    ]
    assert len(differing) == 187 and all("'" in text for text in differing)


def test_what_moai_wrote_is_read_back_byte_for_byte(moai_tiny):
    keys, _ = gguf_tokenizer.to_keys(moai_tiny, 6144, WHERE)
    files, used, notes = gguf_tokenizer.from_keys({k: as_arrays(v) for k, v in keys.items()}, 6144, WHERE)
    assert used == 6144 and notes == []
    assert files["tokenizer.json"] == moai_tiny["tokenizer.json"]
    assert files["chat_template.jinja"] == moai_tiny["chat_template.jinja"]
    config, old = (json.loads(raw["tokenizer_config.json"]) for raw in (files, moai_tiny))
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side", "clean_up_tokenization_spaces"):
        assert config[name] == old[name]


def test_a_changed_vocabulary_overrules_the_tokenizer_in_the_file(moai_tiny):
    keys, _ = gguf_tokenizer.to_keys(moai_tiny, 6144, WHERE)
    keys["tokenizer.ggml.tokens"][6143] = "changed"
    known = set(keys["tokenizer.ggml.tokens"])
    keys["tokenizer.ggml.merges"] = [
        merge for merge in keys["tokenizer.ggml.merges"] if "".join(merge.split(" ")) in known
    ]
    keys = {key: as_arrays(value) for key, value in keys.items()}
    files, _, _ = gguf_tokenizer.from_keys(keys, 6144, WHERE)
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).token_to_id("changed") == 6143


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_scored_by_its_merges(prefix):
    tokenizer = sentencepiece(prefix)
    keys, notes = gguf_tokenizer.to_keys(files_of(tokenizer, unk_token="<unk>"), 720, WHERE)
    assert keys["tokenizer.ggml.model"] == "llama" and notes == []
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys["tokenizer.ggml.token_type"][:4] == [
        gguf_tokenizer.UNKNOWN,
        gguf_tokenizer.CONTROL,
        gguf_tokenizer.CONTROL,
        gguf_tokenizer.BYTE,
    ]
    back, _, _ = rebuilt(keys, 720)
    texts = strings() + samples()
    assert ids(back, texts) == ids(tokenizer, texts)


def test_bos_and_eos_around_a_text_are_flags(moai_tiny):
    tokenizer = byte_level(PRE["gpt-2"][0])
    for single, flags in (
        ("<s> $A", (True, False)),
        ("$A </s>", (False, True)),
        ("<s> $A </s>", (True, True)),
        ("$A", (False, False)),
    ):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        keys, _ = gguf_tokenizer.to_keys(files_of(tokenizer), 600, WHERE)
        assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == flags
        back, _, _ = rebuilt(keys, 600)
        assert ids(back, TEXT, special=True) == ids(tokenizer, TEXT, special=True)


def test_templates_without_their_marks_render_the_same(moai_tiny):
    from moai_core.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer("moai_tiny")
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": " 안녕\n"},
        {"role": "assistant", "content": "네"},
        {"role": "user", "content": "x"},
    ]
    plain = gguf_tokenizer.plain_template(moai_tiny["chat_template.jinja"].decode())
    assert "generation" not in plain.replace("add_generation_prompt", "")
    for start in (True, False):
        for end in range(1, 5):
            wanted = tokenizer.apply_chat_template(chat[:end], tokenize=False, add_generation_prompt=start)
            assert (
                tokenizer.apply_chat_template(
                    chat[:end], chat_template=plain, tokenize=False, add_generation_prompt=start
                )
                == wanted
            )
    loose = "{% for m in messages %}\n{% generation %}\n  {{ m.content }}\n{%+ endgeneration -%}\n x{% endfor %}"
    same = [
        tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False)
        for text in (loose, gguf_tokenizer.plain_template(loose))
    ]
    assert same[0] == same[1]


def test_sampling_settings_travel():
    given = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
    keys = gguf_tokenizer.settings_to_keys({"generation_config.json": json.dumps(given).encode()}, WHERE)
    assert keys["general.sampling.temp"] == 0.7 and keys["general.sampling.top_k"] == 40
    made = gguf_tokenizer.settings_from_keys(keys, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
    assert json.loads(made["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2, **given}
    greedy = {"generation_config.json": json.dumps({**given, "do_sample": False}).encode()}
    assert gguf_tokenizer.settings_to_keys(greedy, WHERE) == {}


def unigram():
    return Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0, byte_fallback=False))


@pytest.mark.parametrize(
    ("files", "rows", "error", "why"),
    [
        (lambda: {}, 600, Refused, "has no tokenizer.json, and llama.cpp stops"),
        (lambda: {"tokenizer.json": b"{"}, 600, CheckpointError, "not valid JSON"),
        (lambda: {"tokenizer.json": b"{}"}, 600, CheckpointError, "not a usable tokenizer"),
        (lambda: {"tokenizer.json": b"[]"}, 600, CheckpointError, "not a usable tokenizer"),
        (lambda: files_of(unigram()), 600, Refused, "no tokenizer of this kind \\(Unigram\\)"),
        (
            lambda: files_of(byte_level(PRE["gpt-2"][0])),
            500,
            CheckpointError,
            "ids up to 599, the model's embedding has 500 rows",
        ),
        (lambda: files_of(byte_level(["(a+)+$"], size=260)), 600, CheckpointError, "repeats a repetition"),
        (
            lambda: {**files_of(byte_level(PRE["gpt-2"][0])), "tokenizer_config.json": b"[1]"},
            600,
            CheckpointError,
            "not a JSON object",
        ),
    ],
)
def test_what_cannot_be_written_is_told(files, rows, error, why):
    with pytest.raises(error, match=why) as raised:
        gguf_tokenizer.to_keys(files(), rows, WHERE)
    assert "\n" not in raised.value.message and raised.value.exit_code == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]},
            "tokenizer.ggml.tokens is damaged",
        ),
        ({"tokenizer.ggml.token_type": [1, 2, 3]}, "token_type is damaged"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "merges is missing or damaged"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "its tokenizer is damaged"),
        ({"tokenizer.ggml.merges": None}, "merges is missing or damaged"),
        ({"tokenizer.ggml.pre": "whatever"}, "the pre-tokenizer 'whatever' is none that moai knows"),
    ],
)
def test_damaged_keys_are_told(change, why):
    keys, _ = gguf_tokenizer.to_keys(files_of(byte_level(PRE["gpt-2"][0])), 600, WHERE)
    keys = {
        key: as_arrays(value)
        for key, value in {**keys, **change}.items()
        if key != "tokenizer.huggingface.json" and value is not None
    }
    with pytest.raises(CheckpointError, match=why):
        gguf_tokenizer.from_keys(keys, 600, WHERE)


def test_other_kinds_of_tokenizers_are_left_out_and_told():
    for keys in ({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}, {}):
        files, used, notes = gguf_tokenizer.from_keys(keys, 600, WHERE)
        assert files == {} and used is None and "tokenizer" in notes[0]
