"""Machine code for the causal convolution before the scan, with SiLU behind it, and for its gradients.

Numba functions as in cpu_kernels.py, with its letters and K, the convolution's width. The window of K - 1 tokens before
a chunk stands in the tile's first rows; of another document's tokens it sees nothing.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from moai_core.cpu.elementary import ONE, ZERO, sigmoid
from moai_core.cpu.instructions import bytes_at, floats_at, kernel, plain, take, tiny
from moai_core.cpu.tiles import (
    FRESH,
    PADDING,
    W,
    clear,
    denormals,
    load,
    load_turned,
    store,
    store_turned,
    tile,
    vector,
)

T = 16  # tokens of a chunk


@tiny
def real_tokens(marks, L):
    """How many tokens stand before the padding at the end of a row."""
    if marks == 0:
        return L
    row = carray(bytes_at(marks), (L,))
    n = 0
    while n < L and row[n] != PADDING:
        n += 1
    return n


@plain
def conv_token(t, K, age, w, shift, x, pre):
    """pre = bias + sum over the taps that reach no further back than `age` tokens; x[t + K - 1] is the token itself."""
    for c in range(W):
        pre[c] = shift[c]
    for k in range(K - 1 - age, K):
        for c in range(W):
            pre[c] += w[k, c] * x[t + k, c]


@kernel
def conv_forward(slots):
    s = carray(slots, (20,))
    L, I, K, marks, u, u_b, u_t = s[2], s[3], s[4], s[5], s[6], s[7], s[8]
    weight, bias, first, last, y = s[9], s[10], s[11], s[12], s[13]
    tiles = (I + W - 1) // W
    w, x, yy, pre, shift = tile(K), tile(K - 1 + T), tile(T), tile(1), tile(1)
    control = denormals(np.uint32(0))
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        b, c0 = item // tiles, item % tiles * W
        width = min(W, I - c0)
        load_turned(w, weight + 4 * c0 * K, K, width)
        vector(shift[0], bias + 4 * c0 if bias else 0, width, ZERO)
        load_turned(x, first + 4 * (b * I + c0) * (K - 1) if first else 0, K - 1, width)
        real = real_tokens(marks + b * L if marks else 0, L)
        age = K - 1  # how many tokens back belong to this document
        for t0 in range(0, L, T):
            tokens, alive = min(T, L - t0), max(0, min(T, real - t0))
            load(x[K - 1 :], u + b * u_b + t0 * u_t + 4 * c0, u_t, alive, width, 0)
            for t in range(alive):
                if marks and carray(bytes_at(marks + b * L + t0 + t), (1,))[0] == FRESH:
                    age = 0
                conv_token(t, K, age, w, shift[0], x, pre[0])
                for c in range(W):
                    yy[t, c] = pre[0, c] * sigmoid(pre[0, c])
                age = min(age + 1, K - 1)
            clear(yy, alive, T)
            store(yy, y + 4 * ((b * L + t0) * I + c0), 4 * I, tokens, width)
            for k in range(K - 1):  # the window slides: upwards, so that no row is overwritten before it moved
                for c in range(W):
                    x[k, c] = x[alive + k, c]
        clear(x, 0, K - 1 - age)
        store_turned(x, last + 4 * (b * I + c0) * (K - 1), K - 1, width)
    denormals(control)


@plain
def put(g_x, rows, t0, K, to_first, to_u, stride, width):
    """Writes the first rows of g_x, row 0 being token t0 - (K - 1): before token 0 to the state's, else to u's."""
    for r in range(rows):
        t = t0 + r - (K - 1)
        if t < 0:
            block = carray(floats_at(to_first), (width, K - 1))
            for c in range(width):
                block[c, t0 + r] = g_x[r, c]
        else:
            row = carray(floats_at(to_u + t * stride), (width,))
            for c in range(width):
                row[c] = g_x[r, c]


@kernel
def conv_backward(slots):
    s = carray(slots, (28,))
    L, I, K, marks, u, u_b, u_t = s[2], s[3], s[4], s[5], s[6], s[7], s[8]
    weight, bias, first, gy, gy_b, gy_t, g_last = s[9], s[10], s[11], s[12], s[13], s[14], s[15]
    to_u, to_weight, to_bias, to_first = s[16], s[17], s[18], s[19]
    tiles = (I + W - 1) // W
    w, x, gg, pre, shift = tile(K), tile(K - 1 + T), tile(T), tile(1), tile(1)
    g_x, g_w, g_bias = tile(K - 1 + T), tile(K), tile(1)
    control = denormals(np.uint32(0))
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        b, c0 = item // tiles, item % tiles * W
        width = min(W, I - c0)
        load_turned(w, weight + 4 * c0 * K, K, width)
        vector(shift[0], bias + 4 * c0 if bias else 0, width, ZERO)
        load_turned(x, first + 4 * (b * I + c0) * (K - 1) if first else 0, K - 1, width)
        clear(g_x, 0, K - 1)
        clear(g_w, 0, K)
        clear(g_bias, 0, 1)
        out = to_u + 4 * (b * L * I + c0)
        real = real_tokens(marks + b * L if marks else 0, L)
        age = K - 1
        for t0 in range(0, real, T):
            alive = min(T, real - t0)
            load(x[K - 1 :], u + b * u_b + t0 * u_t + 4 * c0, u_t, alive, width, 0)
            load(gg, gy + b * gy_b + t0 * gy_t + 4 * c0, gy_t, alive, width, 0)
            clear(g_x, K - 1, K - 1 + T)
            for t in range(alive):
                if marks and carray(bytes_at(marks + b * L + t0 + t), (1,))[0] == FRESH:
                    age = 0
                conv_token(t, K, age, w, shift[0], x, pre[0])
                for c in range(W):
                    r = sigmoid(pre[0, c])
                    g = gg[t, c] * (r * (ONE + pre[0, c] * (ONE - r)))
                    gg[t, c] = g
                    g_bias[0, c] += g
                for k in range(K - 1 - age, K):
                    for c in range(W):
                        g_x[t + k, c] += w[k, c] * gg[t, c]
                        g_w[k, c] += x[t + k, c] * gg[t, c]
                age = min(age + 1, K - 1)
            put(g_x, alive, t0, K, to_first + 4 * (b * I + c0) * (K - 1), out, 4 * I, width)
            for k in range(K - 1):
                for c in range(W):
                    x[k, c] = x[alive + k, c]
                    g_x[k, c] = g_x[alive + k, c]
        if g_last:  # the window that the call left behind: it saw only tokens of the last document
            load_turned(x, g_last + 4 * (b * I + c0) * (K - 1), K - 1, width)
            for k in range(K - 1 - age, K - 1):
                for c in range(W):
                    g_x[k, c] += x[k, c]
        put(g_x, K - 1, real, K, to_first + 4 * (b * I + c0) * (K - 1), out, 4 * I, width)
        clear(gg, 0, 1)
        for t in range(real, L):
            store(gg, out + 4 * t * I, 0, 1, width)
        store_turned(g_w, to_weight + 4 * (b * I + c0) * K, K, width)
        store(g_bias, to_bias + 4 * (b * I + c0), 0, 1, width)
    denormals(control)
