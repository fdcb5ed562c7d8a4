"""Narrow states, number by number: rows, their scales and neighbours, from Python's floats and fractions."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from tests.ops.common.rounding import philox


def grid(dtype: torch.dtype) -> list[float]:
    """All numbers of a format that are not negative, in order."""
    if dtype == torch.int16:
        return [float(number) for number in range(32768)]
    return [
        0.0,
        *(m * 2.0**-9 for m in range(1, 8)),
        *((8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)),
    ][:-1]  # the last one is NaN


def rounded(value: float, numbers: list[float], word: int | None) -> float:
    """One number: to the nearest, to an even one in the middle, or by a random word."""
    size = abs(value)
    at = (
        next((i for i, number in enumerate(numbers) if number > size), len(numbers)) - 1
        if len(numbers) < 1000
        else int(size)
    )
    low = numbers[at]
    if low == size or at + 1 == len(numbers):
        return math.copysign(low, value)
    part = (Fraction(size) - Fraction(low)) / (Fraction(numbers[at + 1]) - Fraction(low))
    if word is None:
        up = part > Fraction(1, 2) or (part == Fraction(1, 2) and at % 2 == 1)
    else:
        up = part + Fraction(word >> 8, 2**24) >= 1
    return math.copysign(numbers[at + up], value)


def stored(state: Tensor, dtype: torch.dtype, seed: int | None, slot: int, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """What a slot of shape (..., channels, dstate) and its scales have after a store of `state`, which is float32."""
    numbers = grid(dtype)
    result, scales = torch.zeros(state.shape), torch.empty(state.shape[:-1])
    flat, out, scale = state.flatten(0, -2), result.flatten(0, -2), scales.flatten()
    most = torch.tensor(numbers[-1])
    for channel, row in enumerate(flat):
        if not row.isfinite().all():
            scale[channel] = math.nan
            continue
        scale[channel] = max(row.abs().max() / most, torch.tensor(2.0**-126))
        inverse = 1 / scale[channel]
        for at in range(row.shape[0]):
            number = float((row[at] * inverse).clamp(-most, most))
            word = None
            if seed is not None:
                word = philox((seed % 2**32, (seed >> 32) % 2**32), (at // 4, channel, slot, 0), rounds)[at % 4]
            out[channel, at] = rounded(number, numbers, word)
    return result.to(dtype), scales
