"""The `moai` executable, also as `python -m moai_cli`."""

from __future__ import annotations

from typing import NoReturn

from moai_cli import interrupt


def main() -> NoReturn:
    """Entry point: Ctrl-C has a word from here on, also while the command line itself is imported."""
    interrupt.catch()
    from moai_cli.main import main as run

    run()


if __name__ == "__main__":
    main()
