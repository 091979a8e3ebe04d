"""A small byte-level tokenizer, made on the spot, and small random models for the tests of generation."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moai_core.model import MoaiMambaConfig, MoaiMambaForCausalLM

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs away over the hills.",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 한국어 문장은 여러 바이트로 되어 있다.",
    "素早い茶色の狐がのろまな犬を飛び越える。日本語の文章。",
    "敏捷的棕色狐狸跳过懒狗。中文句子。",
    "user assistant system hello world 1234567890",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[4:],
        chat_template=template,
    )


def make_model(seed: int = 0, **overrides) -> MoaiMambaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "time_step_rank": 4,
        # Far above the usual 0.02: random weights then give peaked, varied distributions instead of noise around
        # uniform.
        "initializer_range": 0.5,
    }
    return MoaiMambaForCausalLM(MoaiMambaConfig(**{**fields, **overrides})).eval()
