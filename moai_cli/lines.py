"""What a person types, a message at a time: lines with editing and history on a terminal, plain lines from a pipe.

A message goes on after a line that ends with a backslash, and from a line that begins with three double quotes to
one that ends with them.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from moai_core.errors import DataError
from moai_core.paths import cache_dir

QUOTES = '"""'
_HISTORY = 1000


class Lines:
    """Messages from stdin. On a terminal (both ends) with a prompt, history and completion of `words`, where
    readline is there."""

    def __init__(self, words: list[str]) -> None:
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._number = 0
        self._history: Path | None = None
        if self.terminal:
            with suppress(ImportError):
                self._edit(words)

    def _edit(self, words: list[str]) -> None:
        import readline

        def complete(text: str, state: int) -> str | None:
            fitting = [word for word in words if word.startswith(text)] if text.startswith("/") else []
            return fitting[state] if state < len(fitting) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \t")
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(_HISTORY)
        self._history = cache_dir() / "chat_history"
        # A history that can't be read or kept is no reason not to talk.
        with suppress(OSError):
            readline.read_history_file(self._history)

    def close(self) -> None:
        """Keep the history, for this user alone."""
        if self._history is None:
            return
        import readline

        with suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(self._history)

    def read(self) -> str | None:
        """The next message, or None at the end of the input. Raises DataError for bytes that are not UTF-8,
        KeyboardInterrupt."""
        line = self._line("> ")
        if line is None:
            return None
        if line.startswith(QUOTES):
            lines = [line[len(QUOTES) :]]
            while not (lines[-1].endswith(QUOTES) and (len(lines) > 1 or len(lines[0]) > 0)):
                more = self._line("… ")
                if more is None:
                    return "\n".join(lines).strip("\n")
                lines.append(more)
            lines[-1] = lines[-1][: -len(QUOTES)]
            return "\n".join(lines).strip("\n")
        while line.endswith("\\"):
            more = self._line("… ")
            line = line[:-1] + "\n" + (more or "")
            if more is None:
                break
        return line

    def _line(self, prompt: str) -> str | None:
        if self.terminal:
            try:
                return input(prompt)
            except EOFError:
                return None
        raw = sys.stdin.buffer.readline()
        self._number += 1
        if not raw:
            return None
        try:
            return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as exc:
            raise DataError(f"stdin:{self._number}: not valid UTF-8 (byte {exc.start + 1} of the line)") from exc
