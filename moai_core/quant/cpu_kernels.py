"""Machine code for products with int4 and int8 matrices: integers all the way, whatever the number of rows.

The activations of a group become 16-bit integers (`quantize`): q = round(x 32639 / largest |x|), kept as two signed
bytes, q = 256 hi + lo. A group's product with the stored codes is then a sum of integers, which is exact in any order,
and only from group to group is it summed in fp32, in the order of the columns:

    y[m, o] = sum over groups g of  (sum over columns of (w - zero) q) * (step of x[m, g] * scale[o, g])

So results are the same bits for one row and for a thousand, with vector instructions and with the matrix unit. The
error is that of the activations' rounding: at most 1/65278 of the largest in the group a number.

Layout of the weights: blocks of 16 rows; in a block four neighbouring columns of each row lie side by side, so that 64
bytes are what one `dot4` wants. int4: the low halves of 64 bytes hold columns 8k to 8k + 3, the high halves the four
after them. Scales (and zeros) follow the same blocks: 16 fp16 numbers a group.

Letters: M rows of x, O outputs, G groups of A columns (32, 64 or 128).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from moai_core.cpu import instructions as code
from moai_core.cpu.instructions import (
    SIGNED,
    add,
    bytes_at,
    float_of,
    floats,
    floats_at,
    fma,
    i32,
    i64,
    intrinsic,
    ints,
    ints_at,
    kernel,
    load_float,
    load_floats,
    load_halves,
    load_int,
    load_ints,
    mul,
    plain,
    store_floats,
    take,
    tile_config,
    tile_release,
    times256,
    to_floats,
)

f32, u8 = np.float32, np.uint8
LARGEST = f32(256 * 127 + 127)
TINY = f32(1e-30)  # a group with nothing larger counts as zeros: 1 / x must be finite
INFINITE = np.int32(0x7F800000)
NAN = f32(np.nan)
NEAR, FAR = 1024, 16384  # bytes ahead of the product that are fetched into the first and second cache (measured)
TILE = 16  # rows and columns of a tile of results

# What is stored in place of a weight of 0: int4 keeps 0..15 unsigned, int8 is moved to 0..255 where dot4 wants it.
ZERO4, ZERO8 = 8, 0 if SIGNED else 128


@kernel
def quantize(slots):
    """x (M, I) fp32 as 16-bit integers, in rows of `pitch` bytes for hi and as many for lo. An item is a row.

    Also a row's and group's step (fp32), -zero times the sum of its integers (int32), and that sum (fp32). A group
    that holds NaN or infinity gets a step of NaN.
    """
    s = carray(slots, (16,))
    I, G, A, x, x_pitch, hi, lo, pitch = s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]
    steps, offsets, sums, zero = s[10], s[11], s[12], np.int32(s[13])
    while True:
        m = take(slots)
        if m >= s[1]:
            break
        bits, row = carray(ints_at(x + m * x_pitch), (I,)), carray(floats_at(x + m * x_pitch), (I,))
        high, low = carray(bytes_at(hi + m * pitch), (G * A,)), carray(bytes_at(lo + m * pitch), (G * A,))
        step, offset = carray(floats_at(steps + 4 * m * G), (G,)), carray(ints_at(offsets + 4 * m * G), (G,))
        total = carray(floats_at(sums + 4 * m * G), (G,))
        for g in range(G):
            begin, end = g * A, min((g + 1) * A, I)
            most = np.int32(0)
            for i in range(begin, end):
                most = max(most, bits[i] & np.int32(0x7FFFFFFF))  # as integers they are in the order of their sizes
            largest = float_of(most)
            by = LARGEST / largest if largest > TINY and most < INFINITE else f32(0)
            sum_ = np.int32(0)
            for i in range(begin, end):
                q = np.int32(np.rint(row[i] * by)) if most < INFINITE else np.int32(0)
                sum_ += q
                last = ((q + np.int32(128)) & np.int32(255)) - np.int32(128)
                low[i] = np.int8(last)
                high[i] = np.int8((q - last) >> np.int32(8))
            for i in range(end, begin + A):
                low[i] = 0
                high[i] = 0
            step[g] = largest / LARGEST if most < INFINITE else NAN
            offset[g] = -zero * sum_
            total[g] = f32(sum_)


def group_dots(bits: int, rows: int) -> Any:
    """An intrinsic f(weights, hi, plane, pitch, A, into): the products of one group of a block of 16 outputs with
    `rows` rows of integers, whose lo part lies `plane` bytes behind hi; into: rows x 16 int32."""

    @intrinsic
    def dots(typing: Any, weights: Any, hi: Any, plane: Any, pitch: Any, A: Any, into: Any) -> Any:
        return types.none(*[types.int64] * 6), _dots(bits, rows)

    return dots


def _dots(bits: int, rows: int) -> Callable[..., Any]:
    parts = 8 // bits  # vectors of codes in 64 bytes

    def emit(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        weights, hi, plane, pitch, A, into = args
        empty = ir.Constant(code.Ints.llvm, [0] * 16)
        # With one row the halves of a byte have sums of their own: more independent chains than one.
        chains = parts if rows == 1 else 1
        sums = {
            (r, p, c): cgutils.alloca_once_value(builder, empty)
            for r in range(rows)
            for p in range(2)
            for c in range(chains)
        }
        for slot in sums.values():
            builder.store(empty, slot)

        def plus(address: Any, number: int) -> Any:
            return builder.add(address, ir.Constant(i64, number))

        with cgutils.for_range(builder, builder.sdiv(A, ir.Constant(i64, 4 * parts))) as loop:
            at = builder.add(weights, builder.mul(loop.index, ir.Constant(i64, 64)))
            code.fetch(builder, plus(at, NEAR), 3)
            code.fetch(builder, plus(at, FAR), 2)
            w = code.read(builder, at, code.Bytes.llvm)
            x = builder.add(hi, builder.mul(loop.index, ir.Constant(i64, 4 * parts)))
            for c, u in enumerate(_nibbles(builder, w) if parts == 2 else [w]):
                for r in range(rows):
                    row = builder.add(x, builder.mul(pitch, ir.Constant(i64, r)))
                    for p in range(2):
                        address = plus(builder.add(row, plane) if p else row, 4 * c)
                        s = code.splat(builder, code.read(builder, address, i32))
                        slot = sums[r, p, c % chains]
                        builder.store(code.dot4(builder, builder.load(slot), u, s, nibbles=bits == 4), slot)
        for r in range(rows):
            high, low = (_total(builder, [sums[r, p, c] for c in range(chains)]) for p in range(2))
            both = builder.add(builder.shl(high, ir.Constant(code.Ints.llvm, [8] * 16)), low)
            code.write(builder, both, plus(into, 64 * r))
        return ctx.get_dummy_value()

    return emit


def _total(builder: Any, slots: list[Any]) -> Any:
    total = builder.load(slots[0])
    for slot in slots[1:]:
        total = builder.add(total, builder.load(slot))
    return total


def _nibbles(builder: Any, w: Any) -> list[Any]:
    """The low and the high halves of 64 bytes."""
    mask = code.constant(code.Bytes.llvm, 15)
    shifted = builder.lshr(builder.bitcast(w, code.Ints.llvm), code.constant(code.Ints.llvm, 4))
    return [builder.and_(w, mask), builder.and_(builder.bitcast(shifted, code.Bytes.llvm), mask)]


@plain
def clear(results, rows):
    for r in range(rows):
        for c in range(TILE):
            results[r, c] = f32(0)


@plain
def finish(made, rows, scales, zeros, steps, offsets, sums, G, y):
    """y[r] += (made[r] - zero of the outputs * sum of the row) * scale * step, for one group."""
    scale = load_halves(scales)
    for r in range(rows):
        at = y + 64 * r
        by = mul(scale, floats(load_float(steps + 4 * r * G)))
        if zeros:
            value = fma(load_halves(zeros), floats(-load_float(sums + 4 * r * G)), to_floats(load_ints(made + 64 * r)))
        else:
            value = to_floats(add(load_ints(made + 64 * r), ints(load_int(offsets + 4 * r * G))))
        store_floats(at, fma(value, by, load_floats(at)))


@plain
def give(y, rows, to, pitch, width):
    """Writes rows of 16 results, of which `width` are outputs."""
    for r in range(rows):
        if width == TILE:
            store_floats(to + r * pitch, load_floats(y + 64 * r))
        else:
            into, values = carray(floats_at(to + r * pitch), (width,)), carray(floats_at(y + 64 * r), (width,))
            for c in range(width):
                into[c] = values[c]


dots4_1, dots4_2, dots4_4 = (group_dots(4, rows) for rows in (1, 2, 4))
dots8_1, dots8_2, dots8_4 = (group_dots(8, rows) for rows in (1, 2, 4))


@kernel
def rows(slots):
    """y = x W^T for few rows, four, two or one at a time. An item is a number of blocks of 16 outputs."""
    s = carray(slots, (24,))
    M, O, G, A, blocks, bits = s[2], s[3], s[4], s[5], s[6], s[7]
    weights, scales, zeros, hi, plane, pitch = s[8], s[9], s[10], s[11], s[12], s[13]
    steps, offsets, sums, y, y_pitch = s[14], s[15], s[16], s[17], s[18]
    size = A * 2 * bits  # bytes of a group of a block
    made, results = np.empty((4, 16), np.int32), np.empty((4, 16), f32)
    into, values = made.ctypes.data, results.ctypes.data
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        for block in range(item * blocks, min((item + 1) * blocks, (O + TILE - 1) // TILE)):
            m = 0
            while m < M:
                count = 4 if M - m >= 4 else (2 if M - m >= 2 else 1)
                clear(results, count)
                for g in range(G):
                    w, x = weights + (block * G + g) * size, hi + m * pitch + g * A
                    if bits == 4:
                        if count == 4:
                            dots4_4(w, x, plane, pitch, A, into)
                        elif count == 2:
                            dots4_2(w, x, plane, pitch, A, into)
                        else:
                            dots4_1(w, x, plane, pitch, A, into)
                    elif count == 4:
                        dots8_4(w, x, plane, pitch, A, into)
                    elif count == 2:
                        dots8_2(w, x, plane, pitch, A, into)
                    else:
                        dots8_1(w, x, plane, pitch, A, into)
                    at, here = 32 * (block * G + g), 4 * (m * G + g)
                    z = zeros + at if zeros else 0
                    finish(into, count, scales + at, z, steps + here, offsets + here, sums + here, G, values)
                give(values, count, y + m * y_pitch + 64 * block, y_pitch, min(TILE, O - TILE * block))
                m += count


# ---- many rows, by AMX ----------------------------------------------------------------------------------------------


@intrinsic
def tile_products(typing, hi, plane, pitch, first, second, A, into):
    """16 rows of integers times one group of two blocks of outputs: four tiles of 16 x 16 int32 (hi, hi, lo, lo).

    first, second: the blocks' codes as bytes, 64 for every four columns. Tiles 0 to 3 hold results, 4 and 5 rows, 6
    and 7 codes.
    """

    def emit(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        hi, plane, pitch, first, second, A, into = args
        wide = ir.Constant(i64, 64)
        width = builder.select(builder.icmp_signed("<", A, wide), A, wide)

        def pointer(address: Any) -> Any:
            return builder.inttoptr(address, code.i8.as_pointer())

        for tile in range(4):
            code.tile_zero(builder, tile)
        with cgutils.for_range(builder, builder.sdiv(A, width)) as loop:
            columns = builder.mul(loop.index, width)
            codes = builder.mul(columns, ir.Constant(i64, 16))
            row = builder.add(hi, columns)
            code.tile_load(builder, 4, pointer(row), pitch)
            code.tile_load(builder, 6, pointer(builder.add(first, codes)), wide)
            code.tile_dot(builder, 0, 4, 6)
            code.tile_load(builder, 7, pointer(builder.add(second, codes)), wide)
            code.tile_dot(builder, 1, 4, 7)
            code.tile_load(builder, 5, pointer(builder.add(row, plane)), pitch)
            code.tile_dot(builder, 2, 5, 6)
            code.tile_dot(builder, 3, 5, 7)
        for tile in range(4):
            code.tile_store(builder, tile, pointer(builder.add(into, ir.Constant(i64, 1024 * tile))), wide)
        return ctx.get_dummy_value()

    return types.none(*[types.int64] * 7), emit


@plain
def describe_tiles(config, A):
    """What `tile_config` reads, for groups of A columns."""
    for i in range(64):
        config[i] = 0
    config[0] = 1
    width = min(A, 64)
    for tile in range(8):
        config[16 + 2 * tile] = width if tile in (4, 5) else 64
        config[48 + tile] = width // 4 if tile in (6, 7) else 16


@plain
def unpack(weights, A, into):
    """The codes of one group of a block of int4 as bytes."""
    packed, made = carray(bytes_at(weights), (A // 8, 64)), carray(bytes_at(into), (A // 8, 2, 64))
    for i in range(A // 8):
        for j in range(64):
            both = u8(packed[i, j])
            made[i, 0, j] = both & u8(15)
            made[i, 1, j] = both >> u8(4)


@plain
def finish_tile(made, scales, zeros, next_, steps, offsets, sums, G, y):
    """As `finish`, for 16 rows and two blocks, whose scales lie `next_` bytes apart; y is (rows, 2, 16)."""
    for block in range(2):
        scale = load_halves(scales + block * next_)
        for r in range(TILE):
            at, here = y + 128 * r + 64 * block, made + 1024 * block + 64 * r
            both = add(times256(load_ints(here)), load_ints(here + 2048))
            by = mul(scale, floats(load_float(steps + 4 * r * G)))
            if zeros:
                zero = load_halves(zeros + block * next_)
                value = fma(zero, floats(-load_float(sums + 4 * r * G)), to_floats(both))
            else:
                value = to_floats(add(both, ints(load_int(offsets + 4 * r * G))))
            store_floats(at, fma(value, by, load_floats(at)))


@kernel
def tiles(slots):
    """y = x W^T for many rows, `height` of them (a multiple of 16) at a time, as many as the second cache holds. An
    item is such rows times two blocks of 16 outputs. The integers of rows up to the next multiple of 16 are read."""
    s = carray(slots, (24,))
    M, O, G, A, height, bits = s[2], s[3], s[4], s[5], s[6], s[7]
    weights, scales, zeros, hi, plane, pitch = s[8], s[9], s[10], s[11], s[12], s[13]
    steps, offsets, sums, y, y_pitch = s[14], s[15], s[16], s[17], s[18]
    size, blocks = A * 2 * bits, (O + TILE - 1) // TILE
    pairs = (blocks + 1) // 2
    results, made = np.empty((2 * height, 16), f32), np.empty((2, 4, 16, 16), np.int32)
    codes, config = np.empty((2, 16 * A), u8), np.empty(64, u8)
    describe_tiles(config, A)
    tile_config(config.ctypes.data)
    values, into = results.ctypes.data, made.ctypes.data
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        m0, first = item // pairs * height, item % pairs * 2
        second = min(first + 1, blocks - 1)  # the last block may stand alone: then it is computed twice
        count = (min(height, M - m0) + TILE - 1) // TILE
        clear(results, 2 * height)
        for g in range(G):
            one, two = weights + (first * G + g) * size, weights + (second * G + g) * size
            if bits == 4:
                unpack(one, A, codes.ctypes.data)
                unpack(two, A, codes.ctypes.data + 16 * A)
                one, two = codes.ctypes.data, codes.ctypes.data + 16 * A
            at, apart = 32 * (first * G + g), 32 * (second - first) * G
            z = zeros + at if zeros else 0
            # The vector unit finishes a tile while the matrix unit makes the next.
            for t in range(count + 1):
                if t < count:
                    tile_products(hi + (m0 + TILE * t) * pitch + g * A, plane, pitch, one, two, A, into + t % 2 * 4096)
                if t > 0:
                    here = 4 * ((m0 + TILE * (t - 1)) * G + g)
                    finish_tile(
                        into + (t - 1) % 2 * 4096, scales + at, z, apart,
                        steps + here, offsets + here, sums + here, G, values + (t - 1) * 2048,
                    )  # fmt: skip
        for r in range(min(height, M - m0)):
            to = y + (m0 + r) * y_pitch
            give(values + 128 * r, 1, to + 64 * first, y_pitch, min(TILE, O - TILE * first))
            if second > first:
                give(values + 128 * r + 64, 1, to + 64 * second, y_pitch, min(TILE, O - TILE * second))
    tile_release(0)
