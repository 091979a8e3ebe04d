"""From text to tokens and back while it streams: prompts, chat templates, incremental detokenizing, stop strings.

Why not `tokenizer.decode` on every token: it costs time that grows with the answer, and a character of Korean,
Japanese, Chinese or an emoji often spans two to four tokens of a byte-level vocabulary, so that naive streaming
shows U+FFFD in its place. Here bytes are kept back until they form characters. A chat is tokenized as in training
(data/tokenize.py): `<|im_end|>` inside a message is text, never the special token. A raw prompt may spell special
tokens, so that any template can be written by hand.
Left out: tool calls, images.

Source of the byte alphabet: GPT-2's byte-level BPE (Radford et al. 2019), as in the `tokenizers` library's ByteLevel
decoder.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from moai_core.data.tokenize import Encoder, check_tokenizer
from moai_core.errors import UsageError

ROLES = ("system", "user", "assistant")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_alphabet()


class Vocabulary:
    """What generation needs to know of a tokenizer, found out once."""

    def __init__(self, tokenizer: Any, *, vocab_size: int | None = None, extra_eos: Sequence[int] = ()) -> None:
        """vocab_size: of the model; extra_eos: more ids that end an answer. Raises UsageError if tokenizer and model
        don't belong together."""
        from tokenizers import decoders

        self.tokenizer = tokenizer
        self.size = max(tokenizer.get_vocab().values()) + 1
        if vocab_size is not None:
            check_tokenizer(tokenizer, vocab_size)
        self.special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.skipped = frozenset(self.special.values())
        named = (self.special.get(name) for name in ("<|im_end|>", "<|endoftext|>"))
        self.eos = frozenset(id for id in (tokenizer.eos_token_id, *named, *extra_eos) if id is not None)
        self.byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    def bytes(self, token: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary stands for; none for a special token."""
        known = self._bytes.get(token)
        if known is None:
            text = "" if token in self.skipped else self.tokenizer.backend_tokenizer.id_to_token(token) or ""
            # As the ByteLevel decoder does: an added token with a character outside the alphabet stands for itself.
            known = bytes(_BYTES[c] for c in text) if all(c in _BYTES for c in text) else text.encode()
            self._bytes[token] = known
        return known

    @cached_property
    def encoder(self) -> Encoder:
        """Chats to tokens, as training does it."""
        return Encoder(self.tokenizer)

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool) -> list[int]:
        """Token ids of a conversation; answer: followed by the head of the assistant's turn. Raises UsageError for
        messages that `check_messages` or the template refuses, and for a tokenizer without a template."""
        check_messages(messages)
        if not self.tokenizer.chat_template:
            raise UsageError(
                "the model's tokenizer has no chat template",
                hint="use `moai generate` with plain prompts, or a model trained on chats",
            )
        return self.encoder.encode_chat([dict(message) for message in messages], add_generation_prompt=answer)

    def prompt(self, prompt: str | Sequence[int] | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a prompt: text, ids, or chat messages (the template then asks for the assistant's answer).
        Never empty: an empty text begins where a document begins, with `<s>` (or the end-of-document token of a
        vocabulary without `<s>`).

        Raises UsageError for text that is not valid Unicode, ids outside the vocabulary and messages that `chat`
        refuses.
        """
        if isinstance(prompt, str):
            check_text(prompt, "the prompt")
            ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.chat(prompt, answer=True)  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
            wrong = [id for id in ids if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < self.size]
            if wrong:
                raise UsageError(f"token id {wrong[0]!r} is not one of the vocabulary's 0 to {self.size - 1}")
        if ids:
            return ids
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if start is None:
            raise UsageError(
                "the prompt is empty, and the tokenizer has no <s> to start from", hint="give at least one character"
            )
        return [start]

    def spelling(self, tokens: Sequence[int], text: str) -> list[int] | None:
        """The first of `tokens` that spell exactly `text`; None where no number of them does (broken characters,
        special tokens between, a token that goes on)."""
        if not self.byte_level:
            return next(
                (list(t) for t in (tokens, tokens[:-1]) if not self.skipped & set(t) and self.text(t) == text), None
            )
        wanted, spelled = text.encode(), bytearray()
        for count in range(len(tokens) + 1):
            if len(spelled) == len(wanted):
                return list(tokens[:count]) if spelled == wanted else None
            if len(spelled) > len(wanted) or count == len(tokens) or tokens[count] in self.skipped:
                return None
            spelled += self.bytes(tokens[count])
        return None

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens spell, special ones included, broken characters as U+FFFD."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_text(text: str, where: str) -> None:
    """Raise UsageError for a lone surrogate: what Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"{where} is not valid UTF-8 (character {exc.start + 1})") from exc


def check_messages(messages: Any, where: str = "messages") -> None:
    """Raise UsageError, beginning with `where`, unless `messages` is a non-empty list of {"role", "content"} with a
    known role and text."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError(f'{where} must be a list of {{"role", "content"}}, at least one')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise UsageError(f'{where}, message {number}: must have exactly the keys "role" and "content"')
        if message["role"] not in ROLES:
            raise UsageError(
                f"{where}, message {number}: role must be one of {', '.join(ROLES)} (got {str(message['role'])[:40]!r})"
            )
        if not isinstance(message["content"], str):
            raise UsageError(f"{where}, message {number}: content must be a text")
        check_text(message["content"], f"{where}, message {number}")


class Detokenizer:
    """Tokens in, text out, a character as soon as it is whole. The pieces add up to `tokenizer.decode(tokens,
    skip_special_tokens=True)`, less an unfinished character at the very end."""

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int] = ()) -> None:
        """context: the last tokens of the prompt; vocabularies that write spaces into words need them."""
        self.vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # For other than byte-level vocabularies: a window of tokens, of which the first `_shown` have been shown.
        self._window = list(context[-4:])
        self._shown = len(self._window)

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        if token in self.vocabulary.skipped:
            return ""
        if self.vocabulary.byte_level:
            return self._utf8.decode(self.vocabulary.bytes(token))
        self._window.append(token)
        before, text = self._decode(self._window[: self._shown]), self._decode(self._window)
        # A character of byte tokens has at most four; what is still broken then stays broken.
        if len(text) <= len(before) or (text.endswith("\ufffd") and len(self._window) - self._shown < 4):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.vocabulary.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Finds the stop string that is complete first, and keeps back text that may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def add(self, text: str) -> str:
        """The part of the text so far that can be shown now; `found` is set once a stop string is complete."""
        if not self.stops:
            return text
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            shown, self._held = self._held[:at], ""
            return shown
        keep = max(self._tail(stop) for stop in self.stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _tail(self, stop: str) -> int:
        """Length of the longest end of the held text with which `stop` begins."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

    def rest(self) -> str:
        """What was kept back, at the end of an answer that no stop string ended."""
        shown, self._held = self._held, ""
        return shown
