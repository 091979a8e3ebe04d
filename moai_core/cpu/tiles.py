"""A tile of W channels over a few tokens, or states: what kernels of scan and convolution load, keep and store.

Channels lie in vector lanes, rows of W; what a tile has beyond the width of the data is zero, so that no loop needs a
remainder. Strides are in bytes, channels always adjacent. An address of 0 stands for an array that isn't there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from moai_core.cpu.elementary import ZERO, f32
from moai_core.cpu.instructions import bytes_at, floats_at, intrinsic, plain, tiny

W = 128
FRESH, PADDING = 1, 2  # marks of a token: a document begins with it; it is none


@intrinsic
def denormals(typing: Any, control: Any) -> Any:
    """Sets x86's floating-point control word and returns the old one; 0 as argument means: treat denormals as zeros.

    A state that fades over masked tokens would otherwise sink into numbers below 1e-38, where each operation costs a
    hundred times more. Other processors pay no such price, so nothing happens there.
    """

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(32)
        if not builder.module.triple.startswith(("x86_64", "i386", "i686")):
            return ir.Constant(word, 0)
        slot = cgutils.alloca_once(builder, word)
        pointer = builder.bitcast(slot, ir.IntType(8).as_pointer())
        access = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        store = builder.module.declare_intrinsic("llvm.x86.sse.stmxcsr", (), access)
        load = builder.module.declare_intrinsic("llvm.x86.sse.ldmxcsr", (), access)
        builder.call(store, [pointer])
        old = builder.load(slot)
        fast = builder.or_(old, ir.Constant(word, 0x8040))  # flush to zero, denormals are zeros
        builder.store(builder.select(builder.icmp_unsigned("==", args[0], ir.Constant(word, 0)), fast, args[0]), slot)
        builder.call(load, [pointer])
        return old

    return types.uint32(types.uint32), codegen


@tiny
def tile(rows):
    return np.empty((rows, W), f32)


# Loops and not slices: numba takes half a second to compile an assignment to a slice, for the text of its error.


@plain
def clear(into, first, last):
    """Makes rows of W zeros, from the first up to the last, which stays."""
    for r in range(first, last):
        for c in range(W):
            into[r, c] = ZERO


@plain
def copy(values, into, rows):
    for r in range(rows):
        for c in range(W):
            into[r, c] = values[r, c]


@plain
def load(into, address, stride, tokens, width, marks):
    """into[t, c] = the floats at address + t * stride; channels beyond the width and padding become 0."""
    for t in range(tokens):
        if marks and carray(bytes_at(marks + t), (1,))[0] == PADDING:
            clear(into, t, t + 1)
            continue
        row = carray(floats_at(address + t * stride), (width,))
        for c in range(width):
            into[t, c] = row[c]
        for c in range(width, W):
            into[t, c] = ZERO


@plain
def store(values, address, stride, tokens, width):
    for t in range(tokens):
        row = carray(floats_at(address + t * stride), (width,))
        for c in range(width):
            row[c] = values[t, c]


@plain
def load_turned(into, address, rows, width):
    """into[n, c] = the floats of a contiguous (width, rows) array, 0 where there is none (address 0) and in channels
    beyond the width."""
    if address == 0:
        clear(into, 0, rows)
        return
    block = carray(floats_at(address), (width, rows))
    for n in range(rows):
        for c in range(width):
            into[n, c] = block[c, n]
        for c in range(width, W):
            into[n, c] = ZERO


@plain
def store_turned(values, address, rows, width):
    block = carray(floats_at(address), (width, rows))
    for c in range(width):
        for n in range(rows):
            block[c, n] = values[n, c]


@plain
def vector(into, address, width, default):
    """into[c] = the floats at the address, or the default where there are none (address 0)."""
    for c in range(W):
        into[c] = default
    if address != 0:
        row = carray(floats_at(address), (width,))
        for c in range(width):
            into[c] = row[c]
