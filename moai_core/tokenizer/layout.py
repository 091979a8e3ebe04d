"""What moai's tokenizers have in common: special tokens, the borders of pieces, the chat template, the files.

Borders are drawn in two steps. The first is Qwen 2's pattern: words with a space or mark before them, single digits,
runs of marks, runs of space. The second cuts words where the script changes among Hangul, Han, hiragana and katakana
(docs/bench/tokenizers.md says what that costs and gains). As every border of the first step stays one, llama.cpp, which
knows the first (`qwen2`) and nothing like the second, makes the same ids: no merge was learnt across the second's.
Kanji keep the hiragana after them, which makes pieces of the length of a Japanese phrase (行きました, 東京には).

No normalizer: text comes back byte for byte. Nothing is put before or after a text.
tokenizer.json is written small: no white space, a merge as one string, which the library reads as well as pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_core import storage
from moai_core.data.tokenize import compact
from moai_core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SCRIPTS = r"[^\p{L}]?(?:\p{Hangul}+|[\p{Han}々〆]+[\p{Hiragana}ー]*|[\p{Katakana}ー]+|[\p{Hiragana}ー]+)"
# While it learns, a piece ends after so many characters: a line of dashes or a key in base64 is no word.
LONGEST = 24

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000000,
    "padding_side": "left",
}
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pre_tokenizer(patterns: tuple[str, ...] = (WORDS, SCRIPTS), *, longest: int | None = None) -> Any:
    """The library's pre-tokenizer for these patterns, applied one after the other; `longest` cuts what is left."""
    from tokenizers import Regex, pre_tokenizers

    if longest:
        patterns = (*patterns, f"[\\s\\S]{{1,{longest}}}")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    return pre_tokenizers.Sequence([*splits, last])


def load_backend(raw: bytes, where: Path) -> Tokenizer:
    """The library's tokenizer of a tokenizer.json. Raises CheckpointError naming `where`."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(raw.decode())
    except Exception as exc:  # the Rust side raises bare Exception
        why = (str(exc).splitlines() or [type(exc).__name__])[0][:120]
        raise CheckpointError(f"{where}: not a usable tokenizer ({why})") from exc


def own_files(state: dict[str, Any], notice: Path | None = None) -> dict[str, bytes]:
    """The files of a folder for a tokenizer of moai's own kind, whose tokenizer.json is `state`."""
    files = {
        "tokenizer.json": compact(state),
        "tokenizer_config.json": (json.dumps(CONFIG, ensure_ascii=False, indent=2) + "\n").encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    return files | notice_file(notice)


def notice_file(notice: Path | None) -> dict[str, bytes]:
    """The note of what text a tokenizer learnt from, under the name it has in the folder. Raises UsageError."""
    if notice is None:
        return {}
    try:
        return {"ATTRIBUTION.md": notice.read_bytes()}
    except OSError as exc:
        raise UsageError(
            f"--notice {notice}: can't be read ({exc.strerror})", hint="a file that says what text it learnt from"
        ) from exc


def check_target(out: Path, force: bool) -> None:
    """Raises UsageError unless `out` is free, or `force` allows to replace the tokenizer that it is."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise UsageError(f"{out}: already exists", hint="choose another name, or --force")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if "tokenizer.json" not in names or any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names):
        raise UsageError(f"{out}: is no tokenizer's folder, so --force doesn't replace it", hint="choose another name")


def write_folder(out: Path, files: dict[str, bytes], *, force: bool = False) -> None:
    """Writes the folder as a whole, in place of another where `force` says so; the tokenizer in it is read back before.
    Raises StorageError, CheckpointError.
    """
    load_backend(files["tokenizer.json"], out / "tokenizer.json")
    with storage.new_folder(out, replace=force) as writer:
        for name, raw in files.items():
            writer.write(name, raw)
