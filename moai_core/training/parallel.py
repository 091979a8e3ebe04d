"""This process among the processes of a run: device, collectives that can fail, and what rank 0 does for all.

accelerate places the model and wraps it for data parallelism; gradients travel over NCCL or gloo, and the few numbers
that ranks agree on every step (token counts, loss, a wish to stop) over a gloo group of their own, so that they cost a
GPU no synchronisation. A process that dies or hangs makes the others raise RankError: at once where a connection
breaks, else after `RANK_TIMEOUT_S` ($MOAI_RANK_TIMEOUT, seconds). Left out: FSDP2; `Ranks.prepare` is where a sharded
model would be made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from moai_core.errors import MoaiError, RankError, UsageError

T = TypeVar("T")

RANK_TIMEOUT_S = 600.0
# Reading and tokenizing on rank 0 may take hours on a large corpus: the others wait that long, and see at once if rank
# 0 dies.
_SETUP_S = 7 * 86400.0


def _timeout() -> timedelta:
    text = os.environ.get("MOAI_RANK_TIMEOUT", "")
    try:
        return timedelta(seconds=float(text) if text else RANK_TIMEOUT_S)
    except ValueError:
        raise UsageError(f"MOAI_RANK_TIMEOUT must be a number of seconds (got {text!r})") from None


class Ranks:
    """`rank`, `world`, `main` (rank 0), `device`; collectives are no-ops in a world of one."""

    def __init__(self, *, cpu: bool, mixed: bool) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        # accelerate keeps one state a process; a second run in the same process may want another precision.
        AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
        handlers = [
            InitProcessGroupKwargs(timeout=_timeout()),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        with self.guard():
            self.accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if mixed else "no", kwargs_handlers=handlers)
            self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
            if self.world > 1:
                self._control = dist.new_group(backend="gloo", timeout=_timeout())
                self._patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=_SETUP_S))
        self.main = self.rank == 0
        self.device: torch.device = self.accelerator.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on its device, under autocast where precision is mixed, wrapped for data parallelism where there
        are several ranks.
        """
        with self.guard():
            return self.accelerator.prepare_model(model)

    def unsynchronised(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside, a backward pass leaves gradients local: for all micro-batches of a step but the last."""
        return self.accelerator.no_sync(model) if self.world > 1 else nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass, for calls beside the prepared model."""
        return self.accelerator.autocast()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turns the errors of a broken or timed-out collective into RankError."""
        try:
            yield
        except RuntimeError as exc:
            if not self._from_peers(exc):
                raise
            why = str(exc).strip().splitlines()[0][:160]
            hint = "the checkpoints are intact: start the same command again to resume"
            raise RankError(f"another process of this run died or hung ({why})", hint=hint) from exc

    def _from_peers(self, exc: RuntimeError) -> bool:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return False
        signs = (
            "gloo",
            "NCCL",
            "Connection closed",
            "Connection reset",
            "Timed out",
            "timed out",
            "Socket",
            "process group",
        )
        return isinstance(exc, dist.DistError) or any(sign in str(exc) for sign in signs)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64; the same bits on every rank."""
        if self.world == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        with self.guard():
            dist.all_reduce(tensor, group=self._control)
        return tensor.tolist()

    def on_main(self, work: Callable[[], T], *, patient: bool = False) -> T | None:
        """Runs `work` on rank 0 while the others wait; its result there, None elsewhere.

        What `work` raises ends every rank with the same exit code; only rank 0 has the error to report, the others
        leave by SystemExit.
        """
        if self.world == 1:
            return work()
        result, failure = None, None
        if self.main:
            try:
                result = work()
            except Exception as exc:
                failure = exc
        code = 0 if failure is None else failure.exit_code if isinstance(failure, MoaiError) else 1
        code = self._wait(code) if patient else int(self.sum(code)[0])
        if failure is not None:
            raise failure
        if code:
            raise SystemExit(code)
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0, then on the others, who find what rank 0 has put into the cache."""
        result = self.on_main(work, patient=True)
        return result if self.main else work()  # type: ignore[return-value]

    def _wait(self, code: int) -> int:
        tensor = torch.tensor([code], dtype=torch.int64)
        with self.guard():
            pending = dist.all_reduce(tensor, group=self._patient, async_op=True)
            # Polled, so that a signal reaches Python's handler during a wait of hours.
            while not pending.is_completed():
                time.sleep(0.05)
            pending.wait()
        return int(tensor)

    def close(self) -> None:
        """Ends the process group after a run that went well, or ended for a reason that all ranks share."""
        if self.world > 1 and dist.is_initialized():
            with self.guard():
                dist.barrier(group=self._control)
            dist.destroy_process_group()
