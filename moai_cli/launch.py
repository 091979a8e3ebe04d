"""Several processes for one command: torchrun's agent, run in this process, so that its workers' exit codes become
ours.

torchrun itself ends with exit code 1 and a traceback whatever happened. Here a worker that failed with a documented
code passes it on (it has already said why), one that was killed is named, and a signal to this process reaches the
workers, which save and leave.
"""

from __future__ import annotations

import logging
import os
from signal import Signals
from typing import Any, NoReturn

from moai_core.errors import RankError, UsageError

# The agent kills workers that are still saving after so many seconds.
SAVE_S = 300


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(overrides, launcher arguments): the latter begin at the first that starts with a dash, which only `--` lets
    through.
    """
    first = next((i for i, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    return arguments[:first], arguments[first:]


def launch(launcher: list[str], command: list[str]) -> None:
    """Runs `python -m moai_cli COMMAND` in as many processes as torchrun's arguments `launcher` say.

    Returns when all succeeded. Raises UsageError for arguments torchrun doesn't know, RankError when a worker was
    killed, and SystemExit with the exit code of the worker that failed first.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    def refuse(message: str) -> NoReturn:
        raise UsageError(
            f"launcher arguments: {message}", hint="after `--` come torchrun's, such as --nproc-per-node 4"
        )

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign,assignment]
    placed = any(text.split("=")[0].replace("_", "-") in _PLACES for text in launcher)
    args = parser.parse_args([*([] if placed else ["--standalone"]), *launcher, "-m", "moai_cli", *command])
    if args.training_script != "moai_cli":
        refuse(f"unexpected {args.training_script!r}")
    if args.shutdown_timeout is None:
        args.shutdown_timeout = SAVE_S
    if args.nproc_per_node.isdigit():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, int(args.nproc_per_node)))))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        config, program, program_args = config_from_args(args)
        if args.standalone:
            config.rdzv_backend, config.rdzv_endpoint, config.run_id = "c10d", "localhost:0", f"moai-{os.getpid()}"
        elastic_launch(config, program)(*program_args)
    except ValueError as exc:
        raise UsageError(f"launcher arguments: {exc}") from exc
    except SignalException as exc:
        raise SystemExit(128 + int(exc.sigval)) from None
    except ChildFailedError as exc:
        raise _failure(exc) from None


_PLACES = (
    "--nnodes",
    "--standalone",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--master-addr",
    "--master-port",
    "--node-rank",
)


def _failure(exc: Any) -> BaseException:
    for rank, failure in exc.failures.items():
        # The agent itself ends the others by SIGTERM.
        if failure.exitcode < 0 and -failure.exitcode != Signals.SIGTERM:
            name = Signals(-failure.exitcode).name
            hint = "the checkpoints are intact: start the same command again to resume"
            return RankError(f"rank {rank} (process {failure.pid}) was killed by {name}", hint=hint)
    code = exc.get_first_failure()[1].exitcode
    return SystemExit(code if code > 0 else 128 - code)


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"
