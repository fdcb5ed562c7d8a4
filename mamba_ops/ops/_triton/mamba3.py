"""What the kernels of Mamba-3's ops share: by how much a token turns its pairs, and the weights of its products.

Channel j of a turned vector is made of its own channel and of the pair's other one, j ^ 1, with a sign. So a kernel may
load a vector twice, once with neighbours swapped: nothing is exchanged between threads, and loads and stores are
contiguous. Functions of angles are written out, as none of Triton's is on every GPU, or without memory of its own.
"""

import triton
import triton.language as tl

_PI: tl.constexpr = tl.constexpr(3.141592653589793)


@triton.jit
def tanh(v):
    # To the last bits also where it is small: there it is what steps are multiplied by.
    size = tl.abs(v)
    q = v * v
    series = -5.37397155531e-2 + q * (2.06390887954e-2 - q * 5.70498872745e-3)
    series = v + v * q * (-3.33332819422e-1 + q * (1.33314422036e-1 + q * series))
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 44.0)) + 1.0)
    return tl.where(size < 0.625, series, tl.where(v < 0, -large, large) + 0.0 * v)


@triton.jit
def sin_cos(angle):
    # Of an angle of a few turns at most: quarter turns are taken off, the first two parts of each exactly.
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    v = ((angle - quarters * 1.5703125) - quarters * 4.837512969970703e-4) - quarters * 7.549789948768648e-8
    q = v * v
    sine = v + v * q * (-1.6666654611e-1 + q * (8.3321608736e-3 - q * 1.9515295891e-4))
    cosine = 4.166664568298827e-2 + q * (-1.388731625493765e-3 + q * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * q + q * q * cosine
    quarter = quarters - 4.0 * tl.floor(quarters * 0.25)
    is_odd = (quarter == 1.0) | (quarter == 3.0)
    first, second = tl.where(is_odd, cosine, sine), tl.where(is_odd, sine, cosine)
    return tl.where(quarter >= 2.0, -first, first), tl.where((quarter == 1.0) | (quarter == 2.0), -second, second)


@triton.jit
def half_turns(angles, dt):
    # By how many half turns a token turns its pairs, without whole turns: from -1 to 1.
    turn = tanh(angles) * dt
    return turn - 2.0 * tl.floor(turn * 0.5 + 0.5)


@triton.jit
def turned(angle, turn):
    # An angle, turned on by half turns, from -pi to pi. A whole turn is taken off in two parts, the first exactly.
    angle += _PI * turn
    whole = tl.floor(angle * 0.15915494309189535 + 0.5)
    return (angle - whole * 6.28125) - whole * 1.9353071795864769e-3


@triton.jit
def rotated(own, other, sine, cosine, is_first):
    # Channels of a vector, given with their neighbours, by the sines and cosines of their pairs.
    return own * cosine + tl.where(is_first, -other, other) * sine


@triton.jit
def log_decay(A, dt):
    # A rate above 0 counts as 0; NaN stays NaN.
    rate = A * dt
    return tl.where(rate > 0, 0.0, rate)


@triton.jit
def gated(y, z):
    return y * (tl.maximum(z, -88.0) * tl.sigmoid(z))
