"""Machine code for the CPU scan, written as numba functions: the selective scan, its gradients and one step of it.

Why numba: it needs no compiler on the user's machine, and its LLVM turns the loops over channels below into
full-width vector instructions. Each kernel is compiled once and cached on disk. Leaves out torch altogether: `cpu`
owns tensors, autograd and threads.

An item of work (moai_core/cpu) is one batch row times one tile of W channels (cpu/tiles.py). Sums over tiles and rows
are left to the caller, in a fixed order.

How the scan is laid out: channels lie in vector lanes, the states of a tile stay in the first-level cache, time runs
sequentially. Softplus, gate and skip happen once a token at the edge of a chunk of T tokens, outside the loop over
states. The forward pass keeps the state at the start of each chunk; the backward pass recomputes the chunk from it.
Each exponential is a polynomial of degree 5 with an error of 1e-7 relative; near a decay of 1 it is as exact as
float32 is, so slow states keep their memory. Only floating-point contraction and, in sums, reassociation are allowed
to the compiler: NaN and infinity pass through.

Letters: B batch, L tokens, I channels, N states, W channels of a tile, T tokens of a chunk. In the kernels x_b and x_t
are the byte strides of x over batch and time; channels are always adjacent. Source: arXiv 2312.00752, algorithm 2.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from moai_core.cpu.elementary import LN2, LOG2E, ONE, ZERO, exp2, f32, sigmoid, softplus
from moai_core.cpu.instructions import bytes_at, floats_at, kernel, plain, summing, take
from moai_core.cpu.tiles import (
    FRESH,
    PADDING,
    W,
    clear,
    copy,
    denormals,
    load,
    load_turned,
    store,
    store_turned,
    tile,
    vector,
)

T = 16


@plain
def states_forward(t, N, a, d, du, B, C, h, y):
    """One token: h[n] = 2^(d a[n]) h[n] + B[n] du, y += C[n] h[n], for all channels of the tile."""
    for n in range(N):
        b, k = B[n], C[n]
        for c in range(W):
            v = exp2(d[t, c] * a[n, c]) * h[n, c] + du[t, c] * b
            h[n, c] = v
            y[t, c] += v * k


@kernel
def scan_forward(slots):
    s = carray(slots, (40,))
    L, I, N, marks = s[2], s[3], s[4], s[5]
    u, u_b, u_t, dt, dt_b, dt_t, z, z_b, z_t = s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14]
    B, B_b, B_t, C, C_b, C_t = s[15], s[16], s[17], s[18], s[19], s[20]
    A, D, bias, first, last, y, kept = s[21], s[22], s[23], s[24], s[25], s[26], s[27]
    tiles, chunks = (I + W - 1) // W, (L + T - 1) // T
    a, h, skip, shift = tile(N), tile(N), tile(1), tile(1)
    uu, d, du, yy, zz = tile(T), tile(T), tile(T), tile(T), tile(T)
    control = denormals(np.uint32(0))
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        b, c0 = item // tiles, item % tiles * W
        width = min(W, I - c0)
        load_turned(a, A + 4 * c0 * N, N, width)
        for n in range(N):
            for c in range(W):
                a[n, c] *= LOG2E
        vector(skip[0], D + 4 * c0 if D else 0, width, ZERO)
        vector(shift[0], bias + 4 * c0 if bias else 0, width, ZERO)
        load_turned(h, first + 4 * (b * I + c0) * N if first else 0, N, width)
        for chunk in range(chunks):
            t0 = chunk * T
            tokens = min(T, L - t0)
            here = marks + b * L + t0 if marks else 0
            if kept:
                block = carray(floats_at(kept + 4 * (item * chunks + chunk) * N * W), (N, W))
                copy(h, block, N)
            load(uu, u + b * u_b + t0 * u_t + 4 * c0, u_t, tokens, width, here)
            load(d, dt + b * dt_b + t0 * dt_t + 4 * c0, dt_t, tokens, width, here)
            for t in range(tokens):
                for c in range(W):
                    d[t, c] = softplus(d[t, c] + shift[0, c])
                    du[t, c] = d[t, c] * uu[t, c]
                    yy[t, c] = skip[0, c] * uu[t, c]
            for t in range(tokens):
                if here:
                    mark = carray(bytes_at(here + t), (1,))[0]
                    if mark == PADDING:
                        continue
                    if mark == FRESH:
                        clear(h, 0, N)
                Bt = carray(floats_at(B + b * B_b + (t0 + t) * B_t), (N,))
                Ct = carray(floats_at(C + b * C_b + (t0 + t) * C_t), (N,))
                states_forward(t, N, a, d, du, Bt, Ct, h, yy)
            if z:
                load(zz, z + b * z_b + t0 * z_t + 4 * c0, z_t, tokens, width, here)
                for t in range(tokens):
                    for c in range(W):
                        yy[t, c] *= zz[t, c] * sigmoid(zz[t, c])
            store(yy, y + 4 * ((b * L + t0) * I + c0), 4 * I, tokens, width)
        store_turned(h, last + 4 * (b * I + c0) * N, N, width)
    denormals(control)


@plain
def states_again(t, N, a, d, du, B, C, h, y, decays, before):
    """`states_forward`, keeping each decay and each state before the decay was applied."""
    for n in range(N):
        b, k = B[n], C[n]
        for c in range(W):
            p = h[n, c]
            e = exp2(d[t, c] * a[n, c])
            v = e * p + du[t, c] * b
            decays[t, n, c] = e
            before[t, n, c] = p
            h[n, c] = v
            y[t, c] += v * k


@summing
def inner(x, y):
    total = ZERO
    for c in range(W):
        total += x[c] * y[c]
    return total


@summing
def states_backward(t, N, a, d, du, B, C, gy, decays, before, carry, g_du, g_d, g_A, g_B):
    """One token, backward. carry holds dLoss/dh from the token after it and receives what goes to the token before."""
    for n in range(N):
        b, k = B[n], C[n]
        total = ZERO
        for c in range(W):
            g = carry[n, c] + k * gy[t, c]
            total += g * du[t, c]
            g_du[t, c] += g * b
            p = g * decays[t, n, c]
            carry[n, c] = p
            q = p * before[t, n, c]
            g_d[t, c] += q * a[n, c]
            g_A[n, c] += q * d[t, c]
        g_B[n] = total


@kernel
def scan_backward(slots):
    s = carray(slots, (56,))
    L, I, N, marks = s[2], s[3], s[4], s[5]
    u, u_b, u_t, dt, dt_b, dt_t, z, z_b, z_t = s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14]
    B, B_b, B_t, C, C_b, C_t = s[15], s[16], s[17], s[18], s[19], s[20]
    A, D, bias, kept = s[21], s[22], s[23], s[24]
    # gradients: of y, of the last state; then to u, dt, z, A, B, C, D, dt_bias, the first state
    gy, gy_b, gy_t, g_last = s[25], s[26], s[27], s[28]
    to_u, to_dt, to_z, to_A, to_B, to_C, to_D, to_bias, to_first = (
        s[29],
        s[30],
        s[31],
        s[32],
        s[33],
        s[34],
        s[35],
        s[36],
        s[37],
    )
    tiles, chunks = (I + W - 1) // W, (L + T - 1) // T
    a, h, carry, g_A = tile(N), tile(N), tile(N), tile(N)
    decays, before = np.empty((T, N, W), f32), np.empty((T, N, W), f32)
    uu, d, du, slope, gg, zz, yy = tile(T), tile(T), tile(T), tile(T), tile(T), tile(T), tile(T)
    g_du, g_d, skip, shift, g_D, g_bias = tile(T), tile(T), tile(1), tile(1), tile(1), tile(1)
    control = denormals(np.uint32(0))
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        b, c0 = item // tiles, item % tiles * W
        width = min(W, I - c0)
        load_turned(a, A + 4 * c0 * N, N, width)
        for n in range(N):
            for c in range(W):
                a[n, c] *= LOG2E
        vector(skip[0], D + 4 * c0 if D else 0, width, ZERO)
        vector(shift[0], bias + 4 * c0 if bias else 0, width, ZERO)
        load_turned(carry, g_last + 4 * (b * I + c0) * N if g_last else 0, N, width)
        clear(g_A, 0, N)
        clear(g_D, 0, 1)
        clear(g_bias, 0, 1)
        for back in range(chunks):
            chunk = chunks - 1 - back
            t0 = chunk * T
            tokens = min(T, L - t0)
            here = marks + b * L + t0 if marks else 0
            copy(carray(floats_at(kept + 4 * (item * chunks + chunk) * N * W), (N, W)), h, N)
            load(uu, u + b * u_b + t0 * u_t + 4 * c0, u_t, tokens, width, here)
            load(d, dt + b * dt_b + t0 * dt_t + 4 * c0, dt_t, tokens, width, here)
            load(gg, gy + b * gy_b + t0 * gy_t + 4 * c0, gy_t, tokens, width, here)
            if z:
                load(zz, z + b * z_b + t0 * z_t + 4 * c0, z_t, tokens, width, here)
            for t in range(tokens):
                for c in range(W):
                    x = d[t, c] + shift[0, c]
                    slope[t, c] = sigmoid(x)
                    d[t, c] = softplus(x)
                    du[t, c] = d[t, c] * uu[t, c]
                    yy[t, c] = skip[0, c] * uu[t, c]
                    g_du[t, c] = ZERO
                    g_d[t, c] = ZERO
            if z:  # zz becomes z's gradient but for y before the gate, gg y's before the gate
                for t in range(tokens):
                    for c in range(W):
                        g, v = gg[t, c], zz[t, c]
                        r = sigmoid(v)
                        zz[t, c] = g * (r * (ONE + v * (ONE - r)))
                        gg[t, c] = g * (v * r)
            for t in range(tokens):
                if here:
                    mark = carray(bytes_at(here + t), (1,))[0]
                    if mark == PADDING:
                        continue
                    if mark == FRESH:
                        clear(h, 0, N)
                Bt = carray(floats_at(B + b * B_b + (t0 + t) * B_t), (N,))
                Ct = carray(floats_at(C + b * C_b + (t0 + t) * C_t), (N,))
                states_again(t, N, a, d, du, Bt, Ct, h, yy, decays, before)
                g_Ct = carray(floats_at(to_C + 4 * (item * L + t0 + t) * N), (N,))
                for n in range(N):
                    g_Ct[n] = inner(h[n], gg[t])
            for i in range(tokens):
                t = tokens - 1 - i
                g_Bt = carray(floats_at(to_B + 4 * (item * L + t0 + t) * N), (N,))
                mark = carray(bytes_at(here + t), (1,))[0] if here else 0
                if mark == PADDING:
                    g_Ct = carray(floats_at(to_C + 4 * (item * L + t0 + t) * N), (N,))
                    for n in range(N):
                        g_Bt[n] = ZERO
                        g_Ct[n] = ZERO
                    continue
                Bt = carray(floats_at(B + b * B_b + (t0 + t) * B_t), (N,))
                Ct = carray(floats_at(C + b * C_b + (t0 + t) * C_t), (N,))
                states_backward(t, N, a, d, du, Bt, Ct, gg, decays, before, carry, g_du, g_d, g_A, g_Bt)
                if mark == FRESH:
                    clear(carry, 0, N)
            for t in range(tokens):
                for c in range(W):
                    zz[t, c] = zz[t, c] * yy[t, c]
                    g_d[t, c] = (g_d[t, c] * LN2 + g_du[t, c] * uu[t, c]) * slope[t, c]
                    g_du[t, c] = g_du[t, c] * d[t, c] + skip[0, c] * gg[t, c]
                    g_D[0, c] += gg[t, c] * uu[t, c]
                    g_bias[0, c] += g_d[t, c]
            at = 4 * ((b * L + t0) * I + c0)
            store(g_du, to_u + at, 4 * I, tokens, width)
            store(g_d, to_dt + at, 4 * I, tokens, width)
            if z:
                store(zz, to_z + at, 4 * I, tokens, width)
        store_turned(g_A, to_A + 4 * (b * I + c0) * N, N, width)
        store(g_D, to_D + 4 * (b * I + c0), 0, 1, width)
        store(g_bias, to_bias + 4 * (b * I + c0), 0, 1, width)
        store_turned(carry, to_first + 4 * (b * I + c0) * N, N, width)
    denormals(control)


@summing
def step_row(a, d, du, B, C, before, after, N):
    """One token, one channel, lanes over the states: returns C . h."""
    total = ZERO
    for n in range(N):
        v = exp2(d * a[n] * LOG2E) * before[n] + du * B[n]
        after[n] = v
        total += v * C[n]
    return total


@kernel
def scan_step(slots):
    s = carray(slots, (32,))
    I, N = s[2], s[3]
    u, u_b, dt, dt_b, z, z_b, B, B_b, C, C_b = s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13]
    A, D, bias, first, last, y = s[14], s[15], s[16], s[17], s[18], s[19]
    tiles = (I + W - 1) // W
    uu, d, zz, yy, skip, shift = tile(1), tile(1), tile(1), tile(1), tile(1), tile(1)
    control = denormals(np.uint32(0))
    while True:
        item = take(slots)
        if item >= s[1]:
            break
        b, c0 = item // tiles, item % tiles * W
        width = min(W, I - c0)
        vector(skip[0], D + 4 * c0 if D else 0, width, ZERO)
        vector(shift[0], bias + 4 * c0 if bias else 0, width, ZERO)
        load(uu, u + b * u_b + 4 * c0, 0, 1, width, 0)
        load(d, dt + b * dt_b + 4 * c0, 0, 1, width, 0)
        Bt, Ct = carray(floats_at(B + b * B_b), (N,)), carray(floats_at(C + b * C_b), (N,))
        for c in range(W):
            d[0, c] = softplus(d[0, c] + shift[0, c])
            yy[0, c] = skip[0, c] * uu[0, c]
        for c in range(width):
            a = carray(floats_at(A + 4 * (c0 + c) * N), (N,))
            before = carray(floats_at(first + 4 * (b * I + c0 + c) * N), (N,))
            after = carray(floats_at(last + 4 * (b * I + c0 + c) * N), (N,))
            yy[0, c] += step_row(a, d[0, c], d[0, c] * uu[0, c], Bt, Ct, before, after, N)
        if z:
            load(zz, z + b * z_b + 4 * c0, 0, 1, width, 0)
            for c in range(W):
                yy[0, c] *= zz[0, c] * sigmoid(zz[0, c])
        store(yy, y + 4 * (b * I + c0), 0, 1, width)
    denormals(control)
