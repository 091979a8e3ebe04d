"""Machine code that goes through a program's operations (program.py)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types

from moai_core.cpu.instructions import i32, i64, intrinsic, kernel


@intrinsic
def call(typing: Any, function: Any, slots: Any) -> Any:
    def emit(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [i64.as_pointer()])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], i64.as_pointer())])
        return ctx.get_dummy_value()

    return types.none(types.int64, types.int64), emit


@intrinsic
def ask(typing: Any, function: Any) -> Any:
    """The result of a C function int f(void)."""

    def emit(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.call(builder.inttoptr(args[0], ir.FunctionType(i32, []).as_pointer()), [])

    return types.int32(types.int64), emit


@intrinsic
def arrive(typing: Any, address: Any) -> Any:
    """Counts one up; what this thread wrote is there for who sees the count."""

    def emit(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], i64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(i64, 1), "acq_rel")

    return types.int64(types.int64), emit


@intrinsic
def look(typing: Any, address: Any) -> Any:
    def emit(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], i64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), emit


@kernel
def run_all(slots):
    """Slots: 0 unused, 1 threads, 2 (in a cache line of its own) the threads that arrived, 8 how many operations, 9
    their table of (kernel, slots), 10 and 11 helpers, 12 how often a thread looks before it lets others run."""
    s = carray(slots, (16,))
    count, table, how_many, give_way, patience = s[8], s[9], s[10], s[11], s[12]
    threads = s[1]
    if how_many and threads > 1:
        threads = ask(how_many)
    at = address_of(slots) + 16
    pairs = carray(long_at(table), (count, 2))
    for i in range(count):
        call(pairs[i, 0], pairs[i, 1])
        if threads > 1:
            arrive(at)
            waited = 0
            while look(at) < (i + 1) * threads:
                waited += 1
                if waited > patience and give_way:
                    ask(give_way)
                    waited = 0


@intrinsic
def address_of(typing: Any, slots: Any) -> Any:
    return types.int64(types.CPointer(types.int64)), lambda ctx, builder, sig, args: builder.ptrtoint(args[0], i64)


@intrinsic
def long_at(typing: Any, address: Any) -> Any:
    pointer = types.CPointer(types.int64)
    return pointer(types.int64), lambda ctx, builder, sig, args: builder.inttoptr(args[0], ctx.get_value_type(pointer))
