"""What a record means: text, a chat, an instruction, a prompt with its completion; each becomes ordered segments
(text, trainable, role).

| kind | keys | becomes |
|---|---|---|
| `text` | `text` | one trainable segment |
| `messages` | `messages`: [{role, content}] (OpenAI; content a string or a list of text parts) | a chat |
| `conversations` | `conversations`: [{from, value}] (ShareGPT: human/gpt/system/tool) | a chat |
| `instruction` | `instruction`, `input`, `output`, optional `system` (Alpaca) | a chat: instruction + input -> output |
| `prompt` | `prompt`, `completion` (strings or messages) | plain text, only the completion trainable; or a chat |

Chat segments carry a role and get the tokenizer's chat template later (tokenize.py); plain segments don't. Roles must
alternate: an optional system message first, then user, assistant, user, …; `tool` results may follow an assistant's
message. An empty system message counts as none. Left out: tool calls, images, per-message weights. Sources: the
record formats of OpenAI fine-tuning, ShareGPT, Stanford Alpaca and TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moai_core.errors import DataError

BAD_LINE = (
    "mend the line, or leave such lines out and count them: data.on_error=skip in a recipe, --on-error skip as a flag"
)
KINDS = ("text", "messages", "conversations", "instruction", "prompt")
ALIASES = {
    "chat": "messages",
    "openai": "messages",
    "chatml": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "completion": "prompt",
}
_KEYS = {
    "text": ("text",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
# Asked in this order, so that a chat with a `text` column beside it is a chat.
_DETECT = ("messages", "conversations", "prompt", "instruction", "text")
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


class Segment(NamedTuple):
    """A piece of a document: its text, whether the loss counts it (`train_on: assistant`), and the chat role or
    None for plain text.
    """

    text: str
    trainable: bool
    role: str | None = None


class Document(NamedTuple):
    """One document, or a part of a very long one (`first`/`last` say which); `file` and `line` (1-based) say where
    it began.
    """

    segments: list[Segment]
    file: str
    line: int
    first: bool = True
    last: bool = True


class BadRecord(ValueError):
    """Why a record can't be used; the reader adds `file:line:`."""


@dataclass
class Problems:
    """What `on_error` decides, the exact count of what was left out, and how far the reader is.

    skipped: bad records; empty: valid records without text; examples: the first messages; consumed: bytes read from
    the disk; kind: what the last file's records are; origin: bytes of its byte order mark."""

    on_error: str = "stop"
    skipped: int = 0
    empty: int = 0
    examples: list[str] = field(default_factory=list)
    consumed: int = 0
    kind: str = "auto"
    origin: int = 0

    def bad(self, file: str, line: int, why: str) -> None:
        """A record can't be used: counted where bad ones are skipped, else DataError with `file:line: why`."""
        message = f"{file}:{line}: {why}"
        if self.on_error != "skip":
            raise DataError(message, hint=BAD_LINE)
        self.skipped += 1
        if len(self.examples) < 20:
            self.examples.append(message)


def left_out(skipped: int, examples: list[str]) -> str:
    """`3 bad lines left out, the first: file:line: why`; empty for none."""
    return f"{skipped} bad line{'s' * (skipped != 1)} left out, the first: {examples[0]}" if skipped else ""


def kind_of(record: Any) -> str:
    """The kind of a record, by its keys. Raises BadRecord naming the keys that were found."""
    fields = _object(record)
    for kind in _DETECT:
        if all(key in fields for key in _KEYS[kind]):
            return kind
    found = ", ".join(repr(str(key))[:40] for key in list(fields)[:6]) or "no keys"
    raise BadRecord(
        f"unknown kind of record (keys: {found}); expected 'text', 'messages', 'conversations', "
        "'instruction' with 'output', or 'prompt' with 'completion'"
    )


def segments_of(record: Any, kind: str) -> list[Segment]:
    """The segments of one record of a known kind; empty when the record is valid and holds no text. Raises
    BadRecord saying what is wrong.
    """
    fields = _object(record)
    for key in _KEYS[kind]:
        if key not in fields:
            raise BadRecord(f"key {key!r} is missing (expected a record of kind {kind!r})")
    if kind == "text":
        text = _text(fields["text"], "text")
        return [Segment(text, True)] if text else []
    if kind in ("messages", "conversations"):
        return _chat(fields[kind], kind)
    if kind == "instruction":
        return _instruction(fields)
    return _prompt(fields)


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, got {_name(record)}")
    return record


def _instruction(fields: dict[str, Any]) -> list[Segment]:
    asked = _text(fields["instruction"], "instruction")
    extra = _text("" if fields.get("input") is None else fields["input"], "input")
    system = _text("" if fields.get("system") is None else fields["system"], "system")
    asked = f"{asked}\n\n{extra}" if asked and extra else asked or extra
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(fields["output"], "output")}]
    return _chat([{"role": "system", "content": system}, *turns] if system else turns, "instruction")


def _prompt(fields: dict[str, Any]) -> list[Segment]:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(prompt + completion, "prompt + completion")
    text, answer = _text(prompt, "prompt"), _text(completion, "completion")
    if not answer:
        raise BadRecord("'completion' is empty: nothing to learn")
    return [Segment(text, False), Segment(answer, True)] if text else [Segment(answer, True)]


def _chat(turns: Any, where: str) -> list[Segment]:
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{where!r} must be a list of messages, got {'an empty list' if turns == [] else _name(turns)}")
    made: list[Segment] = []
    for number, turn in enumerate(turns, 1):
        role, content = _turn(turn, f"{where}[{number}]")
        if role == "system" and not content:
            continue
        if not content:
            raise BadRecord(f"{where}[{number}] ({role}) is empty")
        before = made[-1].role if made else None
        if role == "system" and number > 1:
            raise BadRecord(f"{where}[{number}] is a system message; only the first may be one")
        if role == before and role != "tool":
            raise BadRecord(f"{where}[{number}] is a second {role!r} message in a row; roles must alternate")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRecord(f"{where}[{number}] is a tool result that follows no assistant message")
        made.append(Segment(content, role == "assistant", role))
    if not any(segment.trainable for segment in made):
        raise BadRecord(f"{where!r} has no assistant message: nothing to learn")
    return made


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise BadRecord(f"{where} must be an object with 'role' and 'content', got {_name(turn)}")
    name, value = ("role", "content") if "role" in turn else ("from", "value")
    for key in (name, value):
        if key not in turn:
            raise BadRecord(f"{where} has no {key!r}")
    if turn.get("tool_calls"):
        raise BadRecord(f"{where} has tool calls, which are not supported")
    said = turn[name]
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        shown = repr(said)[:40] if isinstance(said, str) else _name(said)
        raise BadRecord(f"{where} has an unknown role {shown}; expected system, user, assistant or tool")
    content = turn[value]
    if isinstance(content, list):
        return role, "".join(_part(part, where) for part in content)
    return role, _text(content, f"{where}.{value}")


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return _text(part.get("text"), f"{where}.text")
    kind = part.get("type") if isinstance(part, dict) else _name(part)
    raise BadRecord(f"{where} has a part that is not text ({str(kind)[:40]})")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{where!r} must be a string, got {_name(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise BadRecord(
                f"{where!r} has half a surrogate pair (\\u{ord(value[exc.start]):04x}) at character {exc.start}"
            ) from exc
    return value


def _name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
