"""Many kernels as one call: a list of them that torch's threads go through together, meeting after each.

Why: between two kernels called from Python lie ten to twenty microseconds, and a token of a model takes hundreds of
kernels. Here it is one call whose threads wait for one another at a counter; a wait is under a microsecond, and a
thread that waits long lets others run. On a busy machine, where threads wait for one another longer than they work, a
program finds out that one thread is faster; results are the same bits for any number.

A kernel gets the addresses that the list has: whoever builds one keeps the tensors alive, and `slot` says where
an address stands that changes from call to call.
"""

from __future__ import annotations

import ctypes
import os
import time
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moai_core import cpu

_KERNEL = "moai_core.cpu.program_kernel"
# Looks at the counter before a thread lets others run: some ten microseconds.
PATIENCE = 4000
# One run in so many goes the other way, with one thread or with several.
EXPLORE, WARM = 48, 3


class Operation(NamedTuple):
    """A call of a kernel: what `cpu.run` takes."""

    module: str
    kernel: str
    items: int
    work: int
    slots: tuple[int, ...]


class Program:
    """Operations in their order, ready to be run any number of times, by one caller at a time."""

    def __init__(self, operations: list[Operation]) -> None:
        starts, size = [], 0
        for operation in operations:
            starts.append(size)
            size += -(-(2 + len(operation.slots)) // 8) * 8  # a cache line of its own for each counter
        self.starts = np.array(starts)
        memory = np.zeros(size + 8, np.int64)
        # Aligned by hand: two counters in one line would be passed from core to core.
        self.slots = memory[-(memory.ctypes.data // 8) % 8 :][:size]
        for start, operation in zip(starts, operations, strict=True):
            self.slots[start + 1 : start + 2 + len(operation.slots)] = (operation.items, *operation.slots)
        base = self.slots.ctypes.data
        addresses = (_address(cpu.entry(operation.module, operation.kernel)) for operation in operations)
        pairs = [(address, base + 8 * start) for address, start in zip(addresses, starts, strict=True)]
        self.table = np.array(pairs, np.int64)
        self.small = sum(operation.work for operation in operations) < 16 * cpu.SMALL
        self.entry = cpu.entry(_KERNEL, "run_all")
        self.head = np.zeros(16, np.int64)
        self.head[8:10] = len(operations), self.table.ctypes.data
        self.head[12] = PATIENCE
        self.runs, self.slow, self.seconds = 0, False, {False: 0.0, True: 0.0}

    def slot(self, operation: int, number: int) -> int:
        """Where in `slots` an operation has its number: 0 is the first after the items."""
        return int(self.starts[operation]) + 2 + number

    def run(self) -> None:
        """Goes through all operations, in as many threads as torch has or, where that has been faster, in one."""
        threads = 1 if self.small else cpu.threads()
        # The other choice is tried now and then, since other programs come and go.
        if threads > 1 and self.slow != (self.runs % EXPLORE == WARM):
            threads = 1
        self.slots[self.starts] = 0
        self.head[1], self.head[2] = threads, 0
        self.head[10:12] = _helpers()
        begin = time.perf_counter()
        cpu.start(self.entry, self.head.ctypes.data, threads)
        self._learn(threads > 1, time.perf_counter() - begin)

    def _learn(self, several: bool, seconds: float) -> None:
        """Threads that wait for one another lose to a single one where other programs keep the cores busy."""
        self.runs += 1
        if self.runs <= WARM:
            return  # memory that is touched for the first time
        known, tried = self.seconds[several], several == self.slow
        self.seconds[several] = seconds if known == 0 or tried else 0.8 * known + 0.2 * seconds
        self.slow = 0 < self.seconds[False] < self.seconds[True]


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _helpers() -> tuple[int, int]:
    """Addresses of `omp_get_num_threads` (how many threads OpenMP really gave; 0 where Python's threads work) and of
    `sched_yield` (0 on systems without)."""
    return _count() if cpu.team() is not None else 0, _give_way()


@cache
def _count() -> int:
    return _address(cpu.openmp().omp_get_num_threads)


@cache
def _give_way() -> int:
    try:
        return _address(ctypes.CDLL(None).sched_yield) if os.name == "posix" else 0
    except (OSError, AttributeError):
        return 0
