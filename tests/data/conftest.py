"""A small byte-level BPE tokenizer with moai's special tokens, trained once a session, and the mixed text that the
tests write.
"""

import json
from types import SimpleNamespace

import pytest

TEXTS = [
    "The state of a Mamba layer has a fixed size, however long the context grows.",
    "모아이는 순수 맘바 언어 모델을 위한 도구 모음입니다. 상태는 문맥이 길어져도 커지지 않습니다.",
    "状態空間モデルは、長い文書を一定のメモリで読みます。吾輩は猫である。名前はまだ無い。",
    "状态空间模型以固定的内存读取很长的文本。床前明月光，疑是地上霜。",
    "def scan(u, dt):\n    return u * dt  # 12345\n",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from moai_core.data.tokenize import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def section(tmp_path):
    """A recipe's data section with small rows; keyword arguments replace its values."""

    def make(**values):
        made = {
            "train": None, "valid": None, "valid_fraction": 0.0, "max_length": 32, "format": "auto", "on_error": "stop",
            "train_on": "assistant", "streaming": "auto", "shuffle": True, "workers": 0, "cache": None,
        }  # fmt: skip
        return SimpleNamespace(**(made | values))

    return make
