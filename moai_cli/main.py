"""The `moai` executable: registers one function a subcommand, turns errors into one line and an exit code.

Commands import the core inside their functions, so that `moai --help` loads neither torch nor transformers.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from moai_cli import console, launch
from moai_core import __version__
from moai_core.errors import Interrupted, MoaiError, UsageError, storage_error

# What Typer returns, without a word, where Ctrl-C met no handler of ours (while libraries are imported).
_CTRL_C = 130

app = typer.Typer(
    name="moai",
    help="Train, talk to and measure pure-Mamba language models.",
    epilog="Start here: `moai train --recipe cpu-tiny`, then `moai chat --model runs/cpu-tiny`.",
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


def _drop_stdout() -> None:
    """What is still buffered can't be written: nothing more to flush at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code. A traceback appears only with --debug."""
    try:
        result = app(argv, standalone_mode=False)
        sys.stdout.flush()
        if result == _CTRL_C:
            raise Interrupted(2)
        return result if isinstance(result, int) else 0
    except TyperException as exc:
        if os.environ.get("MOAI_DEBUG"):
            raise
        context = getattr(exc, "ctx", None)
        if type(exc).__name__ == "NoArgsIsHelpError":
            typer.echo(exc.format_message(), err=True)
            return 2
        hint = f"{context.command_path} --help" if context is not None else "moai --help"
        return console.fail(UsageError(exc.format_message(), hint=hint))
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
    encoding, with `?` for what it can't show; what was closed (`>&-`) takes everything in silence.
    """
    sys.stdout, sys.stderr = (
        stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    raise SystemExit(run())
