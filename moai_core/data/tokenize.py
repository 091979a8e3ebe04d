"""Tokenizers and what they make of a document: ids, and which of them the loss counts.

Text becomes what the tokenizer's post-processor puts before it (`<s>` or nothing) + tokens + `</s>`. A chat becomes
what the tokenizer's chat template (ChatML for moai's own) renders, + `</s>` unless it ends so; trainable are each
assistant's content and the token that ends its turn (`<|im_end|>`). Text of users never becomes a special token: the
template's own text and the messages are tokenized apart, the latter as plain text. So the borders are the same in
training and generation (`encode_chat`), and `<|im_end|>` inside a message stays the ten characters that it is.

Safety: only tokenizer.json (data) is read, never code; `auto_map` is refused, and so are oversized files and patterns
that can backtrack without end (Oniguruma has no time limit). Templates render in transformers' sandbox, and are tried
first with limits of time and memory. Left out: slow (Python, sentencepiece) tokenizers. Source: tokenizers' file
format; Hugging Face chat templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moai_core.data.records import Document, Segment
from moai_core.errors import CheckpointError, UsageError
from moai_core.paths import TOKENIZERS
from moai_core.storage import read_limited, tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LIMITS = {"tokenizer.json": 128 << 20, "tokenizer_config.json": 16 << 20, "chat_template.jinja": 1 << 20}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARK = "\uf8ff"


# ---- loading -------------------------------------------------------------------------------------------------------


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder (with tokenizer.json; a tokenizer's, a model's or a run's), or by name one of those
    that come with moai.

    Raises UsageError when there is none, CheckpointError when its files are damaged or unsafe.
    """
    from transformers import PreTrainedTokenizerFast

    from moai_core.data.regexes import check_patterns
    from moai_core.data.templates import check_template

    folder = _folder(path_or_name)
    raw, config = _read(folder / "tokenizer.json"), {}
    backend = _json(raw, folder / "tokenizer.json")
    if (folder / "tokenizer_config.json").exists():
        config = _json(_read(folder / "tokenizer_config.json"), folder / "tokenizer_config.json")
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: has auto_map: it wants to run code of its own, which moai never does"
        )
    check_patterns(backend, folder / "tokenizer.json")
    template, source = config.get("chat_template"), folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").exists():
        source = folder / "chat_template.jinja"
        template = _text(_read(source), source)
    if isinstance(template, list):  # several by name; the default one is the chat's
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    special = {key: _content(config[key]) for key in _SPECIAL if config.get(key)}
    if template:
        check_template(str(template), special, source)
    extra = {key: config[key] for key in ("model_max_length", "padding_side") if key in config}
    try:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False, **special, **extra
        )
    except Exception as exc:  # the Rust side raises bare Exception
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: not a usable tokenizer ({str(exc).splitlines()[0][:120]})"
        ) from exc
    if template:
        tokenizer.chat_template = str(template)
    tokenizer.name_or_path = str(path_or_name)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{folder}: the tokenizer names no eos_token; documents end with it",
            hint="set eos_token in tokenizer_config.json",
        )
    return tokenizer


def compact(state: dict[str, Any]) -> bytes:
    """A tokenizer.json as small as the library still reads it. `state` is changed."""
    model = state["model"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model.get("merges", ())]
    # One string a merge says the same where no token holds a space, as in a byte-level vocabulary.
    if pairs and not any(" " in part for pair in pairs for part in pair):
        model["merges"] = [" ".join(pair) for pair in pairs]
    return json.dumps(state, ensure_ascii=False, separators=(",", ":")).encode()


def _folder(path_or_name: str | Path) -> Path:
    found = tokenizer_folder(path_or_name)
    if found is None:
        names = (
            sorted(p.name for p in TOKENIZERS.glob("*") if (p / "tokenizer.json").exists())
            if TOKENIZERS.is_dir()
            else []
        )
        raise UsageError(
            f"tokenizer {str(path_or_name)!r}: no such folder or name",
            hint=f"moai has {', '.join(names) or 'none'}; or give a folder with tokenizer.json, a model's or a run's",
        )
    if not (found / "tokenizer.json").exists():
        raise UsageError(
            f"{found}: no tokenizer.json", hint="moai reads fast tokenizers; transformers' save_pretrained writes one"
        )
    return found


def _read(path: Path) -> bytes:
    return read_limited(path, _LIMITS[path.name])


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        wrong = f"byte {exc.start} (0x{raw[exc.start]:02x})"
        raise CheckpointError(f"{path}: {wrong} is not valid UTF-8", hint="save the file as UTF-8") from exc


def _json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: not valid JSON ({str(exc)[:100]})") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Raises UsageError unless every id of `tokenizer` fits a model with `vocab_size` rows (more rows than ids are
    fine).
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        name = tokenizer.name_or_path or "the tokenizer"
        raise UsageError(
            f"{name} has ids up to {highest}, but the model's vocab_size is {vocab_size}",
            hint=f"use the model's own tokenizer, or set model.vocab_size to at least {highest + 1}",
        )


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides what a text becomes: the backend, the chat template, the special ids."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), json.dumps(ids)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """(ids,) int32: the UTF-8 bytes of text each token stands for; special tokens 0.

    Exact for byte-level tokenizers (a token is a string of bytes; what the normalizer changed counts as changed) and
    for byte fallback; for others the length of the token's text, with a word border counted as one space."""
    vocab = tokenizer.get_vocab()
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    table = np.zeros(max(vocab.values()) + 1, dtype=np.int32)
    for token, index in vocab.items():
        if byte_level:
            table[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            table[index] = 1
        else:
            table[index] = len(token.removeprefix("##").replace("\u2581", " ").encode())
    for index, added in tokenizer.added_tokens_decoder.items():
        table[index] = 0 if added.special else len(added.content.encode())
    for index in tokenizer.all_special_ids:
        table[index] = 0
    return table


# ---- encoding ------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A document's ids (uint32) and which of them the loss counts; `trainable` is None when it counts all."""

    ids: np.ndarray
    trainable: np.ndarray | None


class Encoder:
    """Documents to ids, a batch at a time on all threads that the tokenizers library takes. Holds its own copy of
    the backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.plain = _plain(tokenizer)
        before = tokenizer("")["input_ids"]
        self.prefix = [tokenizer.bos_token_id] if before and before[0] == tokenizer.bos_token_id else []
        self.eos = tokenizer.eos_token_id
        self._layout = lru_cache(4096)(self._render)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """One `Encoded` a document (or part). Raises UsageError when a chat needs a template that the tokenizer
        lacks.
        """
        texts = [segment.text for document in documents for segment in document.segments]
        ids = iter(self.plain.encode_batch_fast(texts, add_special_tokens=False))
        return [self._assemble(document, [next(ids).ids for _ in document.segments]) for document in documents]

    def _assemble(self, document: Document, contents: list[list[int]]) -> Encoded:
        segments = document.segments
        if segments and segments[0].role is not None:
            return self._chat(segments, contents)
        ids = list(self.prefix) if document.first else []
        runs = [(len(ids), not segments or segments[0].trainable)]
        for segment, content in zip(segments, contents, strict=True):
            ids += content
            runs.append((len(content), segment.trainable))
        if document.last:
            ids.append(self.eos)
            runs.append((1, True))
        return _encoded(ids, runs)

    def _chat(self, segments: list[Segment], contents: list[list[int]]) -> Encoded:
        fixed = self._layout(tuple(str(segment.role) for segment in segments), False)
        ids, runs = list(fixed[0][0]), [(len(fixed[0][0]), False)]
        for segment, content, (after, ends) in zip(segments, contents, fixed[1:], strict=True):
            taught = ends if segment.trainable else 0
            ids += content
            ids += after
            runs += [(len(content), segment.trainable), (taught, True), (len(after) - taught, False)]
        if ids[-1] != self.eos:
            ids.append(self.eos)
            runs.append((1, segments[-1].trainable and not fixed[-1][1]))
        return _encoded(ids, runs)

    def _render(self, roles: tuple[str, ...], prompt: bool) -> list[tuple[list[int], int]]:
        """The template's own text before, between and after the messages, as (ids, how many of them end the turn
        before).

        The template sees a mark in place of each content, so nothing that a user wrote can steer it.
        """
        if not self.tokenizer.chat_template:
            raise UsageError(
                "the data holds chats, but the tokenizer has no chat template",
                hint="add chat_template.jinja to the tokenizer's folder",
            )
        marks = [f"{_MARK}{index}{_MARK}" for index in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as exc:  # jinja's errors, and whatever the template raises itself
            raise UsageError(
                f"the tokenizer's chat template refuses the roles {', '.join(roles)}: {str(exc)[:160]}"
            ) from exc
        pieces, rest = [], str(text)
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                raise UsageError(
                    "the tokenizer's chat template leaves out or reorders messages, so answers can't be told apart"
                )
            pieces.append(piece)
        backend, special = self.tokenizer.backend_tokenizer, set(self.tokenizer.all_special_ids)
        special |= {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        fixed = []
        for piece in [*pieces, rest]:
            ids = backend.encode(piece, add_special_tokens=False).ids if piece else []
            fixed.append((ids, 1 if ids and ids[0] in special else 0))
        return fixed

    def encode_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """The ids of a chat as training sees them, without the final `</s>`; with the start of the assistant's turn
        if asked.
        """
        fixed = self._layout(tuple(message["role"] for message in messages), add_generation_prompt)
        contents = self.plain.encode_batch_fast([message["content"] for message in messages], add_special_tokens=False)
        ids = list(fixed[0][0])
        for content, (after, _) in zip(contents, fixed[1:], strict=True):
            ids += content.ids
            ids += after
        return ids


def _encoded(ids: list[int], runs: list[tuple[int, bool]]) -> Encoded:
    array = np.array(ids, dtype=np.uint32)
    if all(flag for length, flag in runs if length):
        return Encoded(array, None)
    lengths = [length for length, _ in runs]
    return Encoded(array, np.repeat(np.array([flag for _, flag in runs]), lengths))


def _plain(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A copy of the backend that takes no text for a special token, however it is written."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state.get("added_tokens", []):
        text = token["content"]
        # Some files declare their control tokens as ordinary added ones; in a user's text they are no less dangerous.
        token["special"] = token["special"] or (text[:1] in "<[" and text[-1:] in ">]")
    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend
