"""The `moai` executable: registers one function a subcommand, turns errors into one line and an exit code.

Commands import the core inside their functions, so that `moai --help` loads neither torch nor transformers.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from moai_cli import console, interrupt, launch
from moai_core import __version__
from moai_core.errors import Interrupted, MoaiError, UsageError, storage_error

app = typer.Typer(
    name="moai",
    help="Train, talk to and measure pure-Mamba language models.",
    epilog="Start here: `moai chat` talks to the model that comes with moai; `moai train --recipe cpu-tiny` trains "
    "one of your own, for `moai chat --model runs/cpu-tiny`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"moai {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["MOAI_DEBUG"] = "1"
    if launch.is_first():
        console.show_log()


def _register() -> None:
    from moai_cli.commands import (
        bench,
        chat,
        convert,
        data,
        doctor,
        eval,
        generate,
        init,
        qat,
        quantize,
        recipes,
        tokenizer,
        train,
    )

    app.command(name="init")(init.init)
    app.command(name="train")(train.train)
    app.command(name="generate")(generate.generate)
    app.command(name="chat")(chat.chat)
    app.command(name="eval")(eval.evaluate)
    app.command(name="qat")(qat.qat)
    app.command(name="quantize")(quantize.quantize)
    app.command(name="convert")(convert.convert)
    app.add_typer(data.app, name="data")
    app.add_typer(bench.app, name="bench")
    app.add_typer(recipes.app, name="recipes")
    app.add_typer(tokenizer.app, name="tokenizer")
    app.command(name="doctor")(doctor.doctor)


def _error(exc: BaseException) -> MoaiError | None:
    """The user-facing error for `exc`, or None where it is a bug."""
    if isinstance(exc, MoaiError):
        return exc
    if isinstance(exc, (KeyboardInterrupt, typer.Abort)):
        return Interrupted(2)
    if isinstance(exc, OSError) and (exc.filename is not None or exc.errno == errno.ENOSPC):
        # Without a name it was the result on its way out (`moai ... > file`).
        return storage_error(exc, exc.filename or "stdout")
    return None


_KINDS = {"int_parsing": "a whole number", "float_parsing": "a number", "int_parsing_size": "a smaller number"}
_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _wrong_value(exc: TyperException) -> str | None:
    """`--flag must be a whole number (got 'x')`; None where Typer says better what is wrong. Its own words for a value
    of the wrong type, which are pydantic's, don't show the value."""
    parameter, cause = getattr(exc, "param", None), exc.__cause__
    errors = getattr(cause, "errors", None)
    if parameter is None or errors is None:
        return None
    problem = errors()[0]
    limits = [f"{sign} {problem['ctx'][key]}" for key, sign in _LIMITS.items() if key in problem.get("ctx", {})]
    wanted = limits[0] if limits else _KINDS.get(problem["type"])
    name = parameter.opts[0] if parameter.opts else parameter.human_readable_name
    return wanted and f"{name} must be {wanted} (got {problem['input']!r})"


def _command(argv: Sequence[str]) -> str:
    """`moai bench scan`, of a command line that begins so."""
    found, command = ["moai"], typer.main.get_command(app)
    for word in argv:
        if (inner := getattr(command, "commands", {}).get(word)) is None:
            break
        found.append(word)
        command = inner
    return " ".join(found)


def _drop_stdout() -> None:
    """What is still buffered can't be written: nothing more to flush at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code. A traceback appears only with --debug."""
    try:
        result = app(argv, standalone_mode=False)
        sys.stdout.flush()
        if result == interrupt.CODE:  # what Typer makes of Ctrl-C, without a word
            raise Interrupted(2)
        return result if isinstance(result, int) else 0
    except TyperException as exc:
        if os.environ.get("MOAI_DEBUG"):
            raise
        if type(exc).__name__ == "NoArgsIsHelpError":
            typer.echo(exc.format_message(), err=True)
            return 2
        asked = _command(sys.argv[1:] if argv is None else argv)
        return console.fail(UsageError(_wrong_value(exc) or exc.format_message(), hint=f"{asked} --help"))
    except typer.Exit as exc:
        return exc.exit_code
    except BaseException as exc:
        if isinstance(exc, BrokenPipeError) or isinstance(exc.__context__, BrokenPipeError):
            # The reader of our pipe left (`moai ... | head`): nothing to say. (Typer makes SystemExit of it.)
            _drop_stdout()
            return 0
        if os.environ.get("MOAI_DEBUG") or isinstance(exc, SystemExit):
            raise
        error = _error(exc)
        if error is None:
            error = MoaiError(
                f"internal: {type(exc).__name__}: {exc}",
                hint="run again with `moai --debug ...` and report the traceback",
            )
        elif isinstance(exc, OSError) and exc.filename is None:
            _drop_stdout()
        return console.fail(error)


_register()


def main() -> NoReturn:
    """Entry point of the `moai` executable. Pipes and files get UTF-8 whatever the locale; a terminal gets its own
    encoding, with `?` for what it can't show; what was closed takes everything in silence (`>&-`) or is empty (`<&-`).
    """
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY))
    sys.stdout, sys.stderr = (
        stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    raise SystemExit(run())
