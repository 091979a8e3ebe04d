"""A conversation on the terminal or through a pipe: reads messages, streams answers, obeys the commands of `moai chat`.

Errors end a pipe, but not a conversation on a terminal. What a session is, and that each turn reads only its own new
tokens, is moai_core.generation.session's; lines, editing and history are lines.py's.
"""

from __future__ import annotations

import difflib
import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_cli import console
from moai_cli.lines import Lines
from moai_core.errors import CheckpointError, Interrupted, StorageError, UsageError, shell

if TYPE_CHECKING:
    from moai_core.generation import Completion, Session


class Talk:
    """The conversation on the terminal: reads messages, streams answers, obeys commands."""

    session: Session

    def __init__(self, model: Any, tokenizer: Any, about: dict[str, str], file: Path | None) -> None:
        """about: keyword arguments for every Session; file: where the conversation is saved at the end, if anywhere."""
        self.model, self.tokenizer, self.about, self.file = model, tokenizer, about, file
        # Files of this conversation, which /save may replace without asking.
        self.own: set[Path] = set() if file is None else {file}
        self.lines = Lines(list(COMMANDS))
        self.reading = console.ReadingBar()
        self.last: Completion | None = None
        self.over = False

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until /exit, the end of the input, or a second Ctrl-C."""
        before = {
            s: signal.signal(s, h)
            for s, h in ((signal.SIGTERM, _terminated), (signal.SIGINT, signal.default_int_handler))
        }
        if self.lines.terminal:
            console.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        warned = False
        try:
            while not self.over:
                try:
                    message = self.lines.read()
                    if message is None:
                        break
                    warned = False
                    self.obey(message)
                except KeyboardInterrupt:
                    if not self.lines.terminal:
                        raise
                    if warned:
                        break
                    warned = True
                    console.show("\n")
                    console.note("Ctrl-C again, Ctrl-D or /exit leaves")
            if self.lines.terminal:
                console.show("\n")
        finally:
            self.lines.close()
            if self.file is not None and hasattr(self, "session"):
                self.session.save(self.file)
                console.note(f"saved to {self.file}")
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def obey(self, message: str) -> None:
        """Answer a message or carry out a command. Errors end a pipe, but not a conversation on a terminal."""
        try:
            if message.startswith("/"):
                self.command(message)
            elif message.strip():
                self.answer(lambda **hooks: self.session.say(message, **hooks))
        except (UsageError, CheckpointError, StorageError) as exc:
            if not self.lines.terminal:
                raise
            console.fail(exc)

    def command(self, message: str) -> None:
        """Carry out `/name argument`."""
        name, _, argument = message.partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else "/help lists the commands; a space in front makes it a message"
            )
            raise UsageError(f"unknown command {name[:40]!r}", hint=hint)
        COMMANDS[name][0](self, argument.strip())

    def answer(self, ask: Callable[..., Completion]) -> None:
        """Stream an answer; the first Ctrl-C ends it with what was said, a second one takes the turn back."""
        asked = False

        def interrupt(signum: int, frame: Any) -> None:
            nonlocal asked
            if asked:
                raise KeyboardInterrupt
            asked = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            self.last = ask(on_text=console.show, stop=lambda: asked)
        finally:
            signal.signal(signal.SIGINT, before)
            self.reading.close()
            console.show("\n")
        if self.last.finish_reason == "interrupted":
            console.note("stopped" if self.last.tokens else "stopped before the answer; the message was taken back")
            if not self.lines.terminal:
                raise Interrupted(signal.SIGINT)
        elif self.last.finish_reason == "length":
            console.note(f"cut at {len(self.last.tokens)} tokens; /set max_new_tokens N changes that")

    def on_event(self, event: dict[str, Any]) -> None:
        """What the session reports."""
        if event["event"] == "reread":
            console.note(f"reading the conversation again ({event['tokens']} tokens)")
        self.reading(event)

    # ---- commands ---------------------------------------------------------------------------------------------------

    def load(self, path: Path) -> None:
        """Go on with the conversation of a file."""
        from moai_core.generation import Session

        self.session = Session.load(path, self.model, self.tokenizer, on_event=self.on_event, **self.about)
        self.own.add(path)
        about = self.session.stats()
        console.note(f"{path}: {about['turns']} turns, {about['tokens']} tokens read")

    def _help(self, _: str) -> None:
        console.table(
            ("command", "what it does"), [(f"{name} {COMMANDS[name][1]}", COMMANDS[name][2]) for name in COMMANDS]
        )

    def _system(self, text: str) -> None:
        if text:
            self.session.set_system(None if text == "-" else text)
        console.note("no system message" if self.session.system is None else f"system: {self.session.system}")

    def _set(self, text: str) -> None:
        from moai_core.generation.sampling import SETTINGS, check_settings

        if not text:
            console.table(
                ("setting", "value"), [(name, _shown(getattr(self.session.settings, name))) for name in SETTINGS]
            )
            return
        name, _, value = text.partition(" ")
        name = name.lstrip("-").replace("-", "_")
        if name not in SETTINGS or name == "logprobs":
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            raise UsageError(
                f"unknown setting {name[:40]!r}", hint=f"did you mean {near[0]}?" if near else "/set shows them all"
            )
        parsed = _value(name, value.strip())
        check_settings({name: parsed}, lambda setting: f"/set {setting}")
        self.session.configure(**{name: parsed})
        console.note(f"{name} = {_shown(getattr(self.session.settings, name))}")

    def _retry(self, _: str) -> None:
        self.answer(self.session.retry)

    def _undo(self, _: str) -> None:
        console.note(f"taken back: {_short(self.session.undo())}")

    def _clear(self, _: str) -> None:
        self.session.clear()
        console.note("a new conversation")

    def _save(self, text: str) -> None:
        *names, flag = [*_words(text), ""] if not text.endswith("--force") else _words(text)
        path = Path(names[0]).expanduser() if len(names) == 1 else self.file if not names else None
        if path is None:
            raise _no_file("/save", names)
        if path.exists() and path not in self.own and flag != "--force":
            raise UsageError(f"{path}: exists already", hint=f"/save {shell(path)} --force replaces it")
        self.session.save(path)
        self.own.add(path)
        console.note(f"saved to {path}")

    def _load(self, text: str) -> None:
        names = _words(text)
        if len(names) != 1:
            raise _no_file("/load", names)
        self.load(Path(names[0]).expanduser())

    def _stats(self, _: str) -> None:
        from moai_core.generation import decode_batch

        about: dict[str, Any] = self.session.stats()
        rows = [(name.replace("_", " "), value) for name, value in about.items()]
        rows.append(("engine", decode_batch.describe(self.model, self.session.engine)))
        if self.last is not None:
            rows.append(("last answer", self.last.summary()))
        console.table(("what", "value"), rows, right=())

    def _exit(self, _: str) -> None:
        self.over = True


COMMANDS: dict[str, tuple[Callable[[Talk, str], None], str, str]] = {
    "/help": (Talk._help, "", "this list"),
    "/system": (Talk._system, "[TEXT]", "show or change the system message (- removes it)"),
    "/set": (Talk._set, "[NAME VALUE]", "show or change a setting: temperature, top_k, top_p, min_p, seed, stop, …"),
    "/retry": (Talk._retry, "", "answer the last message again"),
    "/undo": (Talk._undo, "", "take the last message and its answer back"),
    "/clear": (Talk._clear, "", "begin anew; system message and settings stay"),
    "/save": (Talk._save, "[FILE] [--force]", "save the conversation and the model's state"),
    "/load": (Talk._load, "FILE", "go on with a saved conversation"),
    "/stats": (Talk._stats, "", "tokens, state, speed"),
    "/exit": (Talk._exit, "", "leave; so do Ctrl-D and a second Ctrl-C"),
}


def _terminated(signum: int, frame: Any) -> None:
    raise Interrupted(signum)


def _value(name: str, text: str) -> Any:
    """What was typed, as the setting's type: JSON where it is JSON (numbers, lists), else the text itself."""
    if name == "stop" and not text.startswith(("[", '"')):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise UsageError(f"can't read the file name: {exc}", hint="close the quotes") from exc


def _no_file(command: str, names: list[str]) -> UsageError:
    if names:
        hint = f"quote a name with spaces: {command} {shell(' '.join(names))}"
        return UsageError(f"{command} takes one file name (got {len(names)})", hint=hint)
    return UsageError(f"{command} needs a file name", hint=f"{command} friday.session")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
