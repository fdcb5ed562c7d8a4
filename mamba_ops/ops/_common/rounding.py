"""Stochastic rounding of states, as a function of a seed and of the slot and index that a number is stored at."""

import functools
import math

import torch
from torch import Tensor

ROUNDS = 10  # what 0 rounds mean
_MASK = 0xFFFFFFFF
_GRIDS = {torch.float16: (-13, 18, 11), torch.float8_e4m3fn: (-5, 9, 4)}
"""Of formats whose neighbours are not equally far apart: the exponents (as frexp has them) between which numbers lie,
below which it is like at the least, and the bits of a number.
"""


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor], rounds: int) -> Tensor:
    """Philox-4x32 of "Parallel random numbers: as easy as 1, 2, 3" (Salmon, Moraes, Dror and Shaw).

    Args:
        seed: one int64; its low and its high half are the key.
        counter: the first three words of the counter, int64 tensors of one shape; the fourth is 0.
        rounds: how often the words are mixed; 10 is what the authors advise.

    Returns:
        (..., 4), int64: the four words.
    """
    seed = seed.reshape(())
    keys = seed & _MASK, seed >> 32 & _MASK
    a, b, c = counter
    d = torch.zeros_like(a)
    for number in range(rounds):
        (high_a, low_a), (high_c, low_c) = _product(0xD2511F53, a), _product(0xCD9E8D57, c)
        first = keys[0] + number * 0x9E3779B9 & _MASK
        second = keys[1] + number * 0xBB67AE85 & _MASK
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return torch.stack(torch.broadcast_tensors(a, b, c, d), dim=-1)


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low half of a product of words: int64 holds no product of two, so it is made of 16-bit parts."""
    low = factor * (words & 0xFFFF)
    high = factor * (words >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & _MASK


@functools.cache
def _has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's GPUs and some of Intel's do not."""
    try:
        torch.ones((), dtype=torch.float64, device=device).mul_(2.0)
    except (RuntimeError, TypeError):
        return False
    return True


def round_stochastically(
    states: Tensor, seed: Tensor, slots: Tensor, rounds: int, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Return states in another dtype, every number rounded to one of its two neighbours there, without a bias in the
    mean.

    The entry (..., p, s) of a slot's state, p counted through all of its channels, has the word s % 4 of
    philox(seed, (s // 4, p, slot)), and u is the word's upper 24 bits as a number from 0 to 1, which is excluded. A
    number that lies the part f of the way from its neighbour on the side of zero to the other is rounded to that other
    where f + u >= 1, and to the one on the side of zero elsewhere: it is the other with probability f, to within 2^-24.
    So a number of the dtype stays as it is. In float16 infinities and NaN stay, too; the neighbour above 65504 is
    infinity, where 65536 would be, and from there on everything is infinity. In int16 and float8_e4m3fn there are none
    of these, and no number is larger than the dtype's largest: states are scaled before (narrow.py).

    On a device without float64 it is done on the CPU.

    Args:
        states: (n, ..., dstate), float32 or float64.
        seed: one int64.
        slots: (n,), where each is stored.
        rounds: of philox; 0 means 10.
        dtype: float16, int16 or float8_e4m3fn.
    """
    if not _has_float64(states.device):
        return round_stochastically(states.cpu(), seed.cpu(), slots.cpu(), rounds, dtype).to(states.device)
    _, *channels, dstate = states.shape
    quads = torch.arange(-(-dstate // 4), device=states.device)
    channel = torch.arange(math.prod(channels), device=states.device)
    counter = torch.broadcast_tensors(quads, channel[:, None], slots.long()[:, None, None])
    words = philox(seed, counter, rounds or ROUNDS).flatten(2)[:, :, :dstate].reshape(states.shape)
    u = (words >> 8).to(torch.float64) * 2.0**-24

    exact = states.to(torch.float64)
    finite = torch.isfinite(exact)
    step = torch.ones_like(exact)  # between neighbours
    if dtype in _GRIDS:
        least, most, bits = _GRIDS[dtype]
        _, exponent = torch.frexp(torch.where(finite, exact, 0))
        step = torch.ldexp(step, exponent.clamp(least, most) - bits)
    steps = exact.abs() / step
    whole = steps.floor()
    rounded = (whole + (steps - whole + u >= 1)) * step
    return torch.where(finite, rounded.copysign(exact), exact).to(dtype)
