"""What the tests of GGUF share: small tokenizers of every kind, varied strings, a model as the Source of its folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moai_core.convert.source import Lazy, Source

TEXT = [
    "The quick brown foxes don't jump over 'lazy' dogs; they've 1234 reasons, 5678 more, and it's 3.14.\n\nNew paragraph.",
    "def main(argv: list[str]) -> int:\n    total = 0\n    for x in argv:\n        total += int(x)  # 12 + 345\n\treturn total\n",
    "안녕하세요. 오늘은 날씨가 좋네요! 모델을 학습합니다. 안녕하세요 안녕하세요",
    "日本語のテキストです。データを読み込みます。日本語、データー。カタカナとひらがな。",
    "中文文本也需要分词，模型需要训练。中文分词，二〇二六年。",
    "Привет, мир! Ça va? naïve café e\u0301te\u0301 हिन्दी में लिखा है। ภาษาไทย 😀👍🏽 ... ?! -- => != ((()))",
]


def strings(count=300):
    """Varied strings: pieces of the texts in any order, cut anywhere, and the samples that the code itself judges by."""
    rng, words = random.Random(5), [word for text in TEXT for word in text.split(" ")]
    made = []
    for _ in range(count):
        text = "".join(
            rng.choice(words) + rng.choice(["", " ", "  ", "\n", "\n\n", "\t", "\r\n", "    "]) for _ in range(8)
        )
        begin = rng.randrange(len(text))
        made.append(text[begin : begin + rng.randrange(1, 60)])
    return made


def byte_level(patterns, *, whole=False, size=600):
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def sentencepiece(prefix=True):
    """A BPE as Llama 2 and Mistral have it: ▁ for spaces, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    first = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator([word for text in TEXT for word in text.split("\n")] * 2, trainer)
    state = json.loads(tokenizer.to_str())
    # As sentencepiece: whatever two neighbours make is a token that they may make, in the order of the tokens
    vocab = state["model"]["vocab"]
    order = sorted((index, token) for token, index in vocab.items() if index >= 259)
    state["model"]["merges"] = [
        [t[:at], t[at:]] for _, t in order for at in range(1, len(t)) if t[:at] in vocab and t[at:] in vocab
    ]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    return Tokenizer.from_str(json.dumps(state))


def files_of(tokenizer, **config):
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}).encode(),
    }


def source_of(model, files):
    """What reading a folder with this model and these files gives."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    lazy = {key: Lazy(value.dtype, tuple(value.shape), value.clone, key) for key, value in state.items()}
    return Source(Path("/models/small"), "moai", model.config.numbers(), lazy, dict(files))
