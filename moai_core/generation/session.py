"""A conversation with a model: what was said, and the state of the model after exactly that.

Why: a pure-Mamba model remembers a conversation in a state of constant size, so a turn reads only its own new
tokens, an earlier point is a copy kept aside, and a whole conversation is one small file that continues bit for bit
on the same machine.
One rule holds after every call: `state` is what the model has after reading `tokens`, and `tokens` are the
transcript as the chat template writes it. An answer cut short (length, stop string, Ctrl-C) is closed like any
other; where the model has read further than the transcript goes (a stop string, half a character), it goes back to
the head of the answer and reads what is kept of it.
Limits: the states before the last `SNAPSHOTS` turns are kept; going back further, or after loading a file, reads the
transcript again. Whoever makes a file can put any words into it: checksums tell damage, not forgery.
Left out: several conversations in one batch (engine.generate takes messages), summaries of long ones (the state
never grows).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moai_core import storage
from moai_core.data.tokenize import fingerprint as tokenizer_fingerprint
from moai_core.errors import CheckpointError, UsageError
from moai_core.generation import decode_batch, files
from moai_core.generation.engine import OnEvent, eos_ids, make_batch, prefill
from moai_core.generation.row import Completion, Row
from moai_core.generation.sampling import SETTINGS, Settings, new_seed
from moai_core.generation.text import Vocabulary, check_messages, check_text
from moai_core.model.state import MoaiState

SNAPSHOTS = 16

Message = dict[str, str]


@dataclass
class Turn:
    """Where a turn began: so many messages and tokens. tokens is None when they have been read anew since; state
    while it is kept."""

    messages: int
    tokens: int | None
    state: MoaiState | None = None


class Session:
    """A chat with one model. Public: `messages`, `tokens`, `state`, `settings`, `draws`, `turns`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Settings = Settings(),
        *,
        system: str | None = None,
        fingerprint: str | None = None,
        engine: str = "auto",
        on_event: OnEvent | None = None,
    ) -> None:
        """system: the system message, if any. fingerprint: of the model, for `save` and `load` (default:
        that of its weights). engine: which one decodes, as for `generate`. on_event: {"event": "prefill", ...} as
        there, and {"event": "reread", "tokens"} when the transcript is read again.

        Raises UsageError for a tokenizer that doesn't fit the model or has no chat template, and for an engine that
        can't run the model.
        """
        decode_batch.pick(model, engine)
        self.model, self.engine = model, engine
        self.vocabulary = Vocabulary(tokenizer, vocab_size=model.config.vocab_size, extra_eos=eos_ids(model))
        self.on_event = on_event
        self._fingerprint = fingerprint
        self.draws = 0
        self.settings = settings
        self.configure()
        self.messages: list[Message] = []
        self.tokens: list[int] = []
        self.state: MoaiState | None = None
        self.turns: list[Turn] = []
        self.vocabulary.chat([{"role": "user", "content": ""}], answer=True)
        if system is not None:
            self.set_system(system)

    # ---- talking --------------------------------------------------------------------------------------------------

    def say(
        self, text: str, *, on_text: Callable[[str], None] | None = None, stop: Callable[[], bool] = lambda: False
    ) -> Completion:
        """The user says `text`; the model answers. on_text(piece) streams the answer; stop() True ends it with what was
        said so far.

        The answer's `prompt_tokens` are the turn's own. While they are still being read, stop() takes the whole turn
        back: the answer is then `interrupted`, with no tokens. After an exception (NonFiniteError, or what on_text
        raises) the session is as it was before. Raises UsageError for text that is not valid Unicode.
        """
        check_text(text, "the message")
        before = self._mark()
        try:
            answer = self._turn(text, on_text, stop)
        except BaseException:
            self._restore(before)
            raise
        if answer is None:
            self._restore(before)
            return Completion(seed=self.settings.seed or 0)
        return answer

    def retry(
        self, *, on_text: Callable[[str], None] | None = None, stop: Callable[[], bool] = lambda: False
    ) -> Completion:
        """Take the last turn back and answer it again, with new random numbers. As `say`; the old answer stays if
        there is no new one. Raises UsageError when nothing has been said."""
        before = self._mark()
        try:
            answer = self.say(self.undo(), on_text=on_text, stop=stop)
        except BaseException:
            self._restore(before)
            raise
        if not answer.tokens:
            self._restore(before)
        return answer

    def undo(self) -> str:
        """Take the last turn (message and answer) back; returns the message. Raises UsageError when nothing has been
        said."""
        if not self.turns:
            raise UsageError("there is no turn to take back")
        turn = self.turns.pop()
        text = self.messages[turn.messages]["content"]
        self.messages = self.messages[: turn.messages]
        if not self.turns:
            self.tokens, self.state = [], None
        elif turn.tokens is not None and turn.state is not None:
            self.tokens, self.state = self.tokens[: turn.tokens], turn.state
        else:
            self._reread(None if turn.tokens is None else self.tokens[: turn.tokens])
        return text

    def clear(self) -> None:
        """Forget every turn; the system message and the settings stay."""
        self.messages = self.messages[:1] if self.system is not None else []
        self.tokens, self.state, self.turns = [], None, []

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Set, replace or (None) remove the system message; what was said since is read again under it. Raises
        UsageError."""
        new = [] if text is None else [{"role": "system", "content": text}]
        if new:
            check_messages(new, "the system message")
        before = self._mark()
        old = 0 if self.system is None else 1
        self.messages = new + self.messages[old:]
        for turn in self.turns:
            turn.messages += len(new) - old
        try:
            if self.turns:
                self._reread(None)
        except BaseException:
            self._restore(before)
            raise

    def configure(self, **changes: Any) -> None:
        """Change settings (those of `Settings`); a new seed starts its random numbers from the first. Raises
        UsageError."""
        settings = replace(self.settings, **changes)
        if "seed" in changes:
            self.draws = 0
        self.settings = replace(settings, seed=new_seed()) if settings.seed is None else settings

    def stats(self) -> dict[str, int]:
        """turns, messages, tokens read, bytes of the state, and how many earlier states are kept."""
        held = [] if self.state is None else self.state.tensors().values()
        return {
            "turns": len(self.turns),
            "messages": len(self.messages),
            "tokens": len(self.tokens),
            "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
            "snapshots": sum(turn.state is not None for turn in self.turns),
        }

    # ---- one turn -------------------------------------------------------------------------------------------------

    def _turn(self, text: str, on_text: Callable[[str], None] | None, stop: Callable[[], bool]) -> Completion | None:
        messages = [*self.messages, {"role": "user", "content": text}]
        new = self._added(messages, answer=True)
        if new is None:
            new = self._start_over(messages, answer=True)
        self.turns.append(Turn(len(self.messages), len(self.tokens) if self._read else 0, self.state))
        for turn in self.turns[:-SNAPSHOTS]:
            turn.state = None
        context = self.tokens + new
        row = Row(self.vocabulary, self.settings, context, draws=self.draws, device=self.model.device, on_text=on_text)
        result = prefill(self.model, new, self.state, on_event=self.on_event, stop=stop)
        if result is None:
            return None
        logits, head = result
        batch = make_batch(self.model, self.vocabulary, self.engine)
        batch.add(row, logits, head)
        while len(batch):
            if stop():
                batch.close()
            else:
                batch.step()
        self.draws = row.sampler.draws
        self.messages, self.tokens = messages, context
        assert row.state is not None
        self._close(row.answer, head, row.state)
        return replace(row.answer, prompt_tokens=len(new))

    def _close(self, answer: Completion, head: MoaiState, state: MoaiState) -> None:
        """Bring transcript and state together. head: the state before the answer; state: after all its tokens but
        the last."""
        said = {"role": "assistant", "content": answer.text}
        tail = self._added([*self.messages, {**said, "content": ""}], opened=True)
        if tail is None:
            self.messages.append(said)
            self._reread(None)
            return
        own, read = self.vocabulary.spelling(answer.tokens, answer.text), len(answer.tokens) - 1
        if own is not None and len(own) >= read:
            missing = own[read:] + tail
        else:
            # The model has read beyond what was said, or what it wrote is no text: it reads the text from the
            # answer's head.
            spelled = self._added([*self.messages, said], opened=True)
            own = own if own is not None else (spelled or tail)[: -len(tail) or None]
            state, missing = head, own + tail
        self.messages.append(said)
        self.tokens += own + tail
        self.state = self._prefill(missing, state)

    @property
    def _read(self) -> int:
        """How many messages the state has read: all or (before the first turn) none."""
        return len(self.messages) if self.tokens else 0

    def _added(self, messages: list[Message], *, answer: bool = False, opened: bool = False) -> list[int] | None:
        """The ids that the template adds when the conversation becomes `messages`, or None if it changes what was read.

        opened: the head of the assistant's turn was read too. As messages are tokenized apart from the template's
        own text, blank ones show what it writes around them.
        """
        blank = [{**message, "content": ""} for message in messages[: self._read]]
        before = self.vocabulary.chat(blank, answer=opened) if blank else []
        after = self.vocabulary.chat([*blank, *messages[self._read :]], answer=answer)
        return after[len(before) :] if after[: len(before)] == before else None

    def _start_over(self, messages: list[Message], *, answer: bool = False) -> list[int]:
        """Forget all that was read; the ids of the whole conversation."""
        self.tokens, self.state = [], None
        for turn in self.turns:
            turn.tokens, turn.state = None, None
        ids = self.vocabulary.chat(messages, answer=answer)
        if self.on_event is not None:
            self.on_event({"event": "reread", "tokens": len(ids)})
        return ids

    def _reread(self, tokens: list[int] | None) -> None:
        """Read the conversation again from the beginning: the tokens as they were, or as the template writes them
        now."""
        if tokens is None:
            tokens = self._start_over(self.messages)
        elif self.on_event is not None:
            self.on_event({"event": "reread", "tokens": len(tokens)})
        self.state = self._prefill(tokens, None)
        self.tokens = tokens

    def _prefill(self, tokens: list[int], state: MoaiState | None) -> MoaiState | None:
        if not tokens:
            return state
        result = prefill(self.model, tokens, state, on_event=self.on_event)
        assert result is not None
        return result[1]

    def _mark(self) -> tuple[Any, ...]:
        turns = [replace(turn) for turn in self.turns]
        return list(self.messages), list(self.tokens), self.state, self.draws, turns

    def _restore(self, mark: tuple[Any, ...]) -> None:
        self.messages, self.tokens, self.state, self.draws, self.turns = mark

    # ---- files ----------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model, as sessions know it."""
        if self._fingerprint is None:
            self._fingerprint = files.model_fingerprint(self.model)
        return self._fingerprint

    def save(self, path: str | Path) -> None:
        """Write the session to one file, atomically. Raises StorageError (disk full, no such folder)."""
        about = {
            "messages": self.messages,
            "settings": asdict(self.settings),
            "draws": self.draws,
            "turns": [[turn.messages, turn.tokens] for turn in self.turns],
        }
        text = json.dumps(about, ensure_ascii=False).encode()
        held = {} if self.state is None else {f"state.{name}": t for name, t in self.state.tensors().items()}
        held["tokens"] = torch.tensor(self.tokens, dtype=torch.int32)
        held["session"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        tokenizer = tokenizer_fingerprint(self.vocabulary.tokenizer)
        files.write_session(path, held, model=self.fingerprint, tokenizer=tokenizer)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        tokenizer: Any,
        *,
        fingerprint: str | None = None,
        engine: str = "auto",
        on_event: OnEvent | None = None,
    ) -> Session:
        """The session of a file that `save` wrote; it continues bit for bit. Arguments as for `Session`.

        Raises CheckpointError: not a session, damaged, or made with another model, precision or tokenizer.
        """
        session = cls(model, tokenizer, fingerprint=fingerprint, engine=engine, on_event=on_event)
        metadata, held = files.read_session(Path(path))
        mine = {"model": session.fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer)}
        for what, value in mine.items():
            if metadata[what] != value:
                raise CheckpointError(
                    f"{path}: this session was made with another {what} ({metadata[what][:12]}, here {value[:12]})",
                    hint=f"load it with the {what} it was made with, or start a new session",
                )
        try:
            session._adopt(held)
        except (LookupError, TypeError, ValueError, UsageError) as exc:
            raise CheckpointError(f"{path}: not a valid session ({exc})") from exc
        return session

    def _adopt(self, held: dict[str, Tensor]) -> None:
        """Take over a file's content. Raises CheckpointError, LookupError, TypeError, ValueError or UsageError
        for what can't be."""
        about = storage.parse_json(held["session"].numpy().tobytes(), "session")
        if not isinstance(about, dict) or set(about) != {"messages", "settings", "draws", "turns"}:
            raise ValueError("unknown content")
        if about["messages"] != []:
            check_messages(about["messages"])
        unknown = set(about["settings"]) - set(SETTINGS)
        if unknown:
            raise ValueError(f"unknown setting {min(unknown)!r}")
        settings = Settings(**about["settings"])
        tokens = held["tokens"].tolist()
        counts = [about["draws"], *(value for turn in about["turns"] for value in turn if value is not None)]
        if any(type(value) is not int or not 0 <= value < 1 << 62 for value in counts):
            raise ValueError("impossible counts")
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocabulary.size:
            raise ValueError("tokens outside the vocabulary")
        turns = [Turn(messages, read) for messages, read in about["turns"]]
        if any(
            about["messages"][turn.messages]["role"] != "user" or (turn.tokens or 0) > len(tokens) for turn in turns
        ):
            raise ValueError("impossible turns")
        self.state = self._checked_state(held) if tokens else None
        if self.state is not None and self.state.seen.tolist() != [len(tokens)]:
            raise ValueError("the state has not read the transcript's tokens")
        self.messages, self.tokens, self.turns = about["messages"], tokens, turns
        self.settings, self.draws = settings, about["draws"]

    @torch.inference_mode()
    def _checked_state(self, held: dict[str, Tensor]) -> MoaiState:
        """The file's state, in the shapes and types of this model's own."""
        model = self.model
        own = model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True).state.tensors()
        found = {name.removeprefix("state."): tensor for name, tensor in held.items() if name.startswith("state.")}
        if set(found) != set(own):
            raise ValueError("the state is not this model's")
        for name, tensor in own.items():
            if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
                kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (found[name], tensor)]
                raise ValueError(
                    f"{name} is {kinds[0]}, this model's {kinds[1]}: "
                    "load the model with the precision that the session was made with"
                )
        return MoaiState.from_tensors(found).to(model.device)
