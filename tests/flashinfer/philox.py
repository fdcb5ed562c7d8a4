"""FlashInfer's stochastic rounding as its sources have it: 13 random bits a number, and subnormals become zero."""

import torch
from torch import Tensor


def philox_words(seed: int, counter: int, rounds: int) -> tuple[int, int, int, int]:
    """Philox-4x32 of "Parallel random numbers: as easy as 1, 2, 3" (Salmon and others), on Python's own numbers."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    words = [counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF, 0, 0]
    for _ in range(rounds):
        left, right = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [right >> 32 ^ words[1] ^ key[0], right & 0xFFFFFFFF, left >> 32 ^ words[3] ^ key[1], left & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words[0], words[1], words[2], words[3]


def rounded_to_half(s: Tensor, seed: int, start: int, rounds: int) -> Tensor:
    """Four numbers in a row share one call of Philox, at the offset of the first from `start`."""
    flat = s.flatten()
    words = [word for at in range(0, len(flat), 4) for word in philox_words(seed, start + at, rounds)]
    random = torch.tensor([word & 0x1FFF for word in words[: len(flat)]], dtype=torch.int32)
    bits = ((flat.view(torch.int32) & 0x7FFFFFFF) + random) & ~0x1FFF
    magnitude = bits.view(torch.float32)
    half = torch.where(magnitude < 2.0**-14, 0, magnitude).copysign(flat)
    return half.half().view(s.shape)
