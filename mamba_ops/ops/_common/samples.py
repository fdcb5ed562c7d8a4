"""Helpers for the samples and the error inputs of ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import ErrorInput


class SampleTensors:
    """Makes tensors for one op's samples, from one seed and on the CPU: the same values on every device.

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


def error_table(*cases: tuple[str, str, Callable[[Any], Any], str]) -> list[ErrorInput]:
    """Return wrong calls: sample, argument, what to pass for it, and the error, a regular expression.

    "got ..." is about this argument; an error about another one begins with its name: "weight: got ...".
    """
    return [
        ErrorInput(sample, argument, change, f"{argument}: {error}" if error.startswith("got ") else error)
        for sample, argument, change, error in cases
    ]
