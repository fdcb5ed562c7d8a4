"""Stochastic rounding to float16, number by number: Philox on Python's integers, neighbours as fractions."""

import math
from fractions import Fraction

import torch
from torch import Tensor


def philox(key: tuple[int, int], counter: tuple[int, int, int, int], rounds: int = 10) -> tuple[int, int, int, int]:
    """The four words of Philox-4x32, as "Parallel random numbers: as easy as 1, 2, 3" (Salmon and others) has it."""
    (k0, k1), (a, b, c, d) = key, counter
    for _ in range(rounds):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right >> 32 ^ b ^ k0, right % 2**32, left >> 32 ^ d ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


def neighbours(value: float) -> tuple[float, float]:
    """The float16 on the side of zero, or the number itself, and the next one; beyond 65504 there is infinity."""
    size = abs(value)
    step = 2.0 ** max(math.frexp(size)[1] - 11, -24)
    low = min(math.floor(size / step) * step, 65504.0)
    high = low + step
    return math.copysign(low, value), math.copysign(high if high <= 65504 else math.inf, value)


def rounded(value: float, word: int) -> float:
    """One number, by one random word."""
    if not math.isfinite(value) or abs(value) >= 65536:
        return value if math.isnan(value) else math.copysign(math.inf, value)
    low, high = neighbours(value)
    step = Fraction(65536 if math.isinf(high) else abs(high)) - Fraction(abs(low))
    part = (Fraction(abs(value)) - Fraction(abs(low))) / step
    return high if part + Fraction(word >> 8, 2**24) >= 1 else low


def stored(state: Tensor, seed: int, slot: int, rounds: int) -> Tensor:
    """What a slot of shape (..., channels, dstate) has after a store of `state`."""
    key = seed % 2**32, (seed >> 32) % 2**32
    result = torch.empty(state.shape, dtype=torch.float16)
    flat, out = state.flatten(0, -2), result.flatten(0, -2)
    for channel, row in enumerate(flat.tolist()):
        for at, value in enumerate(row):
            out[channel, at] = rounded(value, philox(key, (at // 4, channel, slot, 0), rounds)[at % 4])
    return result
