"""FlashInfer's stochastic rounding as its sources have it: 13 random bits a number, and subnormals become zero."""

import torch
from torch import Tensor

from tests.ops.common.rounding import philox


def rounded_to_half(s: Tensor, seed: int, start: int, rounds: int) -> Tensor:
    """Four numbers in a row share one call of Philox, at the offset of the first from `start`."""
    flat, key = s.flatten(), (seed % 2**32, (seed >> 32) % 2**32)
    counters = [((start + at) % 2**32, start + at >> 32, 0, 0) for at in range(0, len(flat), 4)]
    words = [word % 2**13 for counter in counters for word in philox(key, counter, rounds)]
    random = torch.tensor(words[: len(flat)], dtype=torch.int32)
    magnitude = (((flat.view(torch.int32) & 0x7FFFFFFF) + random) & ~0x1FFF).view(torch.float32)
    return torch.where(magnitude < 2.0**-14, 0, magnitude).copysign(flat).half().view(s.shape)
