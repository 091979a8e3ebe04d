"""Machine code for what is done to every character: counting its kind, folding, fingerprints of overlapping windows.

Text comes as Unicode code points (uint32) of many units in a row, each ended by a newline. `fold` maps a code point to
the one it is compared as (lower case, compatibility forms made one), 0 for what comparisons skip: space, punctuation,
symbols. Hashes are polynomials over the folded characters modulo 2^64, finished with SplitMix64's mixer.

Why numba: one pass over 700 MB takes seconds where NumPy would need a dozen temporary arrays of that size. Sources:
one-permutation hashing, arXiv 1208.1259; optimal densification, arXiv 1703.04664.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.core import config

from moai_core.paths import cache_dir

BINS = 128  # values of a signature
LINE = 10
# Kinds of characters, as `classes` holds them; SENTENCE is added to what can end one.
SPACE, LATIN, HAN, KANA, HANGUL, LETTER, DIGIT, OTHER = range(8)
SENTENCE = 8
# Columns of what `measure` counts a line.
CHARS, LETTERS, DIGITS, LATINS, HANS, KANAS, HANGULS, ENDS, FOLDED = range(9)
SEGMENT = 512  # folded characters of a long line that are judged together

u64 = np.uint64
BASE, START = u64(0x100000001B3), u64(0xCBF29CE484222325)
M1, M2, ZERO, ONE = u64(0xBF58476D1CE4E5B9), u64(0x94D049BB133111EB), u64(0), u64(1)
GOLDEN = u64(0x9E3779B97F4A7C15)
S27, S30, S31, S44, S57, LOW, SIX = (u64(n) for n in (27, 30, 31, 44, 57, 63, 6))
BITS = 1 << 20  # words of the coarse map


def _cached() -> bool:
    """Whether numba can keep what it compiled: in the folder it was told, else in moai's cache."""
    settings: Any = config
    folder = Path(settings.CACHE_DIR or cache_dir() / "kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    settings.CACHE_DIR = str(folder)
    return os.access(folder, os.W_OK)


compiled = njit(error_model="numpy", nogil=True, cache=_cached())


@compiled
def mix(value):  # type: ignore[no-untyped-def]
    """SplitMix64's finalizer."""
    value = (value ^ (value >> S30)) * M1
    value = (value ^ (value >> S27)) * M2
    return value ^ (value >> S31)


@compiled
def measure(points, classes, fold, counts, hashes):  # type: ignore[no-untyped-def]
    """Counts of every line into `counts` (lines, 9) int32, the hash of its folded text into `hashes` (lines,)."""
    line, value, last = 0, START, 0
    for point in points:
        if point == LINE:
            counts[line, ENDS] = last >> 3
            hashes[line] = mix(value)
            line, value, last = line + 1, START, 0
            continue
        last_kind = classes[point]
        kind = last_kind & 7
        if kind == SPACE:
            continue
        last = last_kind
        counts[line, CHARS] += 1
        if kind <= LETTER:
            counts[line, LETTERS] += 1
            if kind < LETTER:
                counts[line, LATINS + kind - LATIN] += 1
        elif kind == DIGIT:
            counts[line, DIGITS] += 1
        folded = fold[point]
        if folded:
            counts[line, FOLDED] += 1
            value = (value ^ u64(folded)) * BASE


@compiled
def repeated(hashes, counts, seen, least, limit, drop):  # type: ignore[no-untyped-def]
    """Sets `drop` for lines of at least `least` folded characters that stood `limit` times before; `seen` counts them
    in a table that colliding lines share."""
    for line in range(len(hashes)):
        if counts[line, FOLDED] >= least:
            slot = np.int64(hashes[line] & u64(len(seen) - 1))
            if seen[slot] >= limit:
                drop[line] = True
            else:
                seen[slot] += 1


@compiled
def _folded(points, begin, end, classes, fold, buffer):  # type: ignore[no-untyped-def]
    """Folded characters of points[begin:end] into `buffer`: (how many, whether most letters are CJK)."""
    count, wide, letters = 0, 0, 0
    for index in range(begin, end):
        point = points[index]
        folded = fold[point]
        if folded:
            buffer[count] = folded
            count += 1
            kind = classes[point] & 7
            letters += kind <= LETTER
            wide += HAN <= kind <= HANGUL
    return count, 3 * wide >= letters and wide > 0


@compiled
def signatures(points, ends, classes, fold, narrow, wide, out, hashes, shingles):  # type: ignore[no-untyped-def]
    """For each unit, points[ends[i-1]:ends[i]]: a signature (BINS uint16), the hash of the folded text, the number of
    its shingles: windows of `narrow` folded characters, `wide` in CJK text."""
    longest, before = 0, 0
    for end in ends:
        longest, before = max(longest, end - before), end
    buffer = np.empty(longest + 1, np.uint32)
    least = np.empty(BINS, np.uint32)
    begin = 0
    for unit in range(len(ends)):
        count, cjk = _folded(points, begin, ends[unit], classes, fold, buffer)
        begin = ends[unit]
        whole = START
        for index in range(count):
            whole = (whole ^ u64(buffer[index])) * BASE
        hashes[unit] = mix(whole)
        size = wide if cjk else narrow
        shingles[unit] = max(0, count - size + 1)
        if count >= size:
            _signature(buffer, count, size, least, out[unit])


@compiled
def _signature(buffer, count, size, least, out):  # type: ignore[no-untyped-def]
    least[:] = 0xFFFFFFFF
    power = ONE
    for _ in range(size):
        power *= BASE
    value = ZERO
    for index in range(count):
        value = value * BASE + u64(buffer[index])
        if index >= size:
            value -= u64(buffer[index - size]) * power
        if index >= size - 1:
            mixed = mix(value)
            bin, rest = np.int64(mixed >> S57), np.uint32(mixed & u64(0xFFFFFFFE))
            if rest < least[bin]:
                least[bin] = rest
    for place in range(BINS):
        source, attempt = np.int64(place), ZERO
        while least[source] == 0xFFFFFFFF:  # an empty bin borrows, the same way in every text
            attempt += ONE
            source = np.int64(mix(u64(place) * GOLDEN + attempt) >> S57)
        out[place] = np.uint16(least[source] >> 1)


# ---- windows of held-out text ---------------------------------------------------------------------------------------


@compiled
def insert(keys, table, bits):  # type: ignore[no-untyped-def]
    """Puts hashes into an open-addressed table (a power of two, at most half full) and its coarse map of bits."""
    mask = u64(len(table) - 1)
    for key in keys:
        bits[key >> S44] |= ONE << (key & LOW)
        slot = (key >> SIX) & mask
        while table[slot] != ZERO and table[slot] != key:
            slot = (slot + ONE) & mask
        table[slot] = key


@compiled
def holds(key, table, bits):  # type: ignore[no-untyped-def]
    """Whether `key` was inserted."""
    if not (bits[key >> S44] >> (key & LOW)) & ONE:
        return False
    mask = u64(len(table) - 1)
    slot = (key >> SIX) & mask
    while table[slot] != ZERO:
        if table[slot] == key:
            return True
        slot = (slot + ONE) & mask
    return False


@compiled
def windows(points, classes, fold, narrow, wide, out):  # type: ignore[no-untyped-def]
    """Hashes of every window of every line, and of every whole line, into `out`; how many."""
    buffer = np.empty(len(points) + 1, np.uint32)
    found, begin = 0, 0
    for end in range(len(points)):
        if points[end] != LINE:
            continue
        count, cjk = _folded(points, begin, end, classes, fold, buffer)
        begin = end + 1
        size = wide if cjk else narrow
        if count:
            out[found] = _whole(buffer, count)
            found += 1
        power = ONE
        for _ in range(size):
            power *= BASE
        value = ZERO
        for index in range(count):
            value = value * BASE + u64(buffer[index])
            if index >= size:
                value -= u64(buffer[index - size]) * power
            if index >= size - 1:
                out[found] = mix(value) | ONE
                found += 1
    return found


@compiled
def _whole(buffer, count):  # type: ignore[no-untyped-def]
    value = START
    for index in range(count):
        value = (value ^ u64(buffer[index])) * BASE
    return mix(value) | ONE


@compiled
def covered(points, classes, fold, narrow, wide, least, share, table, bits, near):  # type: ignore[no-untyped-def]
    """Sets near[line] where `share` of the windows of a line, or of some SEGMENT of it, occur in the table. A line of
    fewer than `least` windows must occur as a whole, and have at least half a window's width."""
    buffer = np.empty(len(points) + 1, np.uint32)
    begin, line = 0, 0
    for end in range(len(points)):
        if points[end] != LINE:
            continue
        count, cjk = _folded(points, begin, end, classes, fold, buffer)
        begin = end + 1
        size = wide if cjk else narrow
        if count - size + 1 < least:
            near[line] = 2 * count >= size and holds(_whole(buffer, count), table, bits)
        else:
            near[line] = _share(buffer, count, size, share, table, bits)
        line += 1


@compiled
def _share(buffer, count, size, share, table, bits):  # type: ignore[no-untyped-def]
    power = ONE
    for _ in range(size):
        power *= BASE
    value, seen, hits = ZERO, 0, 0
    for index in range(count):
        value = value * BASE + u64(buffer[index])
        if index >= size:
            value -= u64(buffer[index - size]) * power
        if index < size - 1:
            continue
        seen += 1
        hits += holds(mix(value) | ONE, table, bits)
        # The last segment takes the rest with it, so that none is too short to judge.
        if seen >= SEGMENT and count - index > SEGMENT:
            if hits >= share * seen:
                return True
            seen, hits = 0, 0
    return hits >= share * seen
