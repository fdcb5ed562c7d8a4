"""How a C++ kernel is called: with one array of numbers, which say where each tensor is and what it looks like."""

import torch
from torch import Tensor

NO_INDICES = (0, 0, 0, 0, 0, 0)
"""No table."""
_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as in common.h


def tensor(given: Tensor | None, *strides: int) -> tuple[int, ...]:
    """A tensor as common.h's Tensor reads it."""
    return (0, 0, *strides) if given is None else (given.data_ptr(), _TYPES[given.dtype], *strides)


def whole(given: Tensor | None, rank: int) -> tuple[int, ...]:
    """A tensor of `rank` dimensions with all its strides."""
    return (0,) * (rank + 2) if given is None else (given.data_ptr(), _TYPES[given.dtype], *given.stride())


def indices(given: Tensor | None) -> tuple[int, ...]:
    """A table of whole numbers, or of flags, with one column or several, as common.h's Indices."""
    if given is None:
        return NO_INDICES
    by_row, by_column = given.stride() if given.dim() == 2 else (given.stride(0), 0)
    columns = given.shape[1] if given.dim() == 2 else 1
    return (given.data_ptr(), given.element_size(), given.shape[0], columns, by_row, by_column)
