"""Elementary functions in fp32 that numba's compiler turns into vector instructions inside of a loop.

Each exponential is a polynomial of degree 5 with an error of 1e-7 relative; near 1 it is as exact as fp32 is. NaN stays
NaN.
"""

from __future__ import annotations

import math

import numpy as np

from moai_core.cpu.instructions import bits_of, float_of, tiny

f32 = np.float32
ZERO, ONE, TWO = f32(0), f32(1), f32(2)
LOG2E, LN2 = f32(1 / math.log(2)), f32(math.log(2))
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(math.log(2) - 0.693359375)
ROUND = f32(1.5 * 2**23)  # adding it leaves the nearest integer in a float's lowest bits
SMALLEST = f32(-126)  # 2^-126 is the smallest normal number
# 2^x = 1 + x (P1 + P2 x + ...) on [-0.5, 0.5], minimax in relative error (9.1e-8)
P1, P2, P3 = f32(0.6931470036506653), f32(0.24022242426872253), f32(0.05550733581185341)
P4, P5 = f32(0.009671512991189957), f32(0.001326472731307149)
# log(1 + e) = 2 artanh(s) with s = e / (2 + e), the series up to the 13th power
S3, S5, S7, S9, S11, S13 = (f32(1 / n) for n in (3, 5, 7, 9, 11, 13))


@tiny
def exp2(x):
    """2^x for x <= 0; below -126 it stays at 2^-126. The comparison is written so that NaN stays NaN."""
    x = SMALLEST if x < SMALLEST else x
    shifted = x + ROUND
    f = x - (shifted - ROUND)
    p = ((((P5 * f + P4) * f + P3) * f + P2) * f + P1) * f + ONE
    return float_of(bits_of(p) + (bits_of(shifted) << np.int32(23)))


@tiny
def exp(x):
    """e^x for x <= 0, the argument reduced in two parts so that the error stays relative for large |x| too."""
    x = f32(-87.0) if x < f32(-87.0) else x
    shifted = x * LOG2E + ROUND
    k = shifted - ROUND
    f = ((x - k * LN2_HIGH) - k * LN2_LOW) * LOG2E
    p = ((((P5 * f + P4) * f + P3) * f + P2) * f + P1) * f + ONE
    return float_of(bits_of(p) + (bits_of(shifted) << np.int32(23)))


@tiny
def sigmoid(x):
    e = exp(-x if x > ZERO else x)
    return (ONE if x > ZERO else e) / (ONE + e)


@tiny
def softplus(x):
    e = exp(-x if x > ZERO else x)
    s = e / (TWO + e)
    q = s * s
    log = ((((((S13 * q + S11) * q + S9) * q + S7) * q + S5) * q + S3) * q + ONE) * (s + s)
    return (x if x > ZERO else ZERO) + log
