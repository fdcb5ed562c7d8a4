"""What the tests of vLLM's functions draw, in float64."""

from typing import Any

import torch
from torch import Tensor

from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
HEADS, DIM, DSTATE, GROUPS = 4, 6, 8, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float64)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


def on_pages(*shape: int) -> Tensor:
    """A cache with room between its slots, as on vLLM's pages."""
    return normal(shape[0], 2, *shape[1:])[:, 0]


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
