"""Machine code for what stands between the matrix products of a token's step on a processor (step.py): norms, SwiGLU's
product, and the product with a matrix of fp32 numbers. Items are rows or, of the matrix, some of its outputs.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from moai_core.cpu.elementary import ONE, ZERO, exp, f32, sigmoid
from moai_core.cpu.instructions import floats_at, kernel, load_float, plain, summing, take


@summing
def dot(x, y, n):
    total = ZERO
    for i in range(n):
        total += x[i] * y[i]
    return total


@plain
def normed(x, weight, y, n, eps):
    by = ONE / f32(np.sqrt(dot(x, x, n) / f32(n) + eps))
    for i in range(n):
        y[i] = x[i] * by * weight[i]


@kernel
def add_norm(slots):
    """total = residual + x (or residual alone), y = its norm; (M, H) each, in that order of addresses."""
    s = carray(slots, (12,))
    H, residual, x, total, weight, eps, y = s[2], s[3], s[4], s[5], s[6], load_float(s[7]), s[8]
    w = carray(floats_at(weight), (H,))
    while True:
        m = take(slots)
        if m >= s[1]:
            break
        before, t = carray(floats_at(residual + 4 * m * H), (H,)), carray(floats_at(total + 4 * m * H), (H,))
        if x:
            new = carray(floats_at(x + 4 * m * H), (H,))
            for i in range(H):
                t[i] = before[i] + new[i]
        else:
            for i in range(H):
                t[i] = before[i]
        normed(t, w, carray(floats_at(y + 4 * m * H), (H,)), H, eps)


@kernel
def small_norms(slots):
    """Norms of the three slices of x (M, R + 2 N), in place."""
    s = carray(slots, (12,))
    R, N, x, eps = s[2], s[3], s[4], load_float(s[8])
    while True:
        m = take(slots)
        if m >= s[1]:
            break
        at = x + 4 * m * (R + 2 * N)
        for part in range(3):
            size = R if part == 0 else N
            row = carray(floats_at(at), (size,))
            normed(row, carray(floats_at(s[5 + part]), (size,)), row, size, eps)
            at += 4 * size


@kernel
def negative_exp(slots):
    """y = -e^x, (I, N) both: the scan's A. An item is N of their numbers."""
    s = carray(slots, (8,))
    N, x, y = s[2], s[3], s[4]
    while True:
        row = take(slots)
        if row >= s[1]:
            break
        before, after = carray(floats_at(x + 4 * row * N), (N,)), carray(floats_at(y + 4 * row * N), (N,))
        for n in range(N):
            v = before[n]
            e = exp(-v if v > ZERO else v)
            after[n] = -(ONE / e if v > ZERO else e)


@kernel
def scale(slots):
    """x (M, I) *= scale (I), in place."""
    s = carray(slots, (8,))
    I, x, by = s[2], s[3], carray(floats_at(s[4]), (s[2],))
    while True:
        m = take(slots)
        if m >= s[1]:
            break
        row = carray(floats_at(x + 4 * m * I), (I,))
        for i in range(I):
            row[i] *= by[i]


@kernel
def swiglu(slots):
    """y = silu(gate) * up, (M, F) each."""
    s = carray(slots, (8,))
    F, gate, up, y = s[2], s[3], s[4], s[5]
    while True:
        m = take(slots)
        if m >= s[1]:
            break
        g, u = carray(floats_at(gate + 4 * m * F), (F,)), carray(floats_at(up + 4 * m * F), (F,))
        made = carray(floats_at(y + 4 * m * F), (F,))
        for i in range(F):
            made[i] = g[i] * sigmoid(g[i]) * u[i]


@kernel
def dense(slots):
    """y (M, O) = x (M, I) W^T with W (O, I); an item is `outputs` rows of W. The last pitches are x's and y's."""
    s = carray(slots, (12,))
    M, O, I, outputs, W, x, x_pitch, y, y_pitch = s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10]
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        for o in range(item * outputs, min((item + 1) * outputs, O)):
            w = carray(floats_at(W + 4 * o * I), (I,))
            for m in range(M):
                value = dot(w, carray(floats_at(x + m * x_pitch), (I,)), I)
                carray(floats_at(y + m * y_pitch + 4 * o), (1,))[0] = value
