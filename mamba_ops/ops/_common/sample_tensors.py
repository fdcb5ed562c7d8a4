"""Tensors that samples are made of: the same values on every device."""

from typing import Any

import torch
from torch import Tensor


class SampleTensors:
    """Makes tensors for one op's samples, from one seed and on the CPU, then moves them.

    Args:
        device: where the tensors go.
        dtype: of floating tensors, if no other is given.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed numbers."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def indices(self, *values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        """Return these integers (or flags, with dtype bool); a tuple is a row of a table."""
        return torch.tensor(values, dtype=dtype, device=self.device)
