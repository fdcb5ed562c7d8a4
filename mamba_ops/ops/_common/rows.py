"""Rows whose bounds the host knows, as it does on a CPU: references that are fast there read them one by one."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common import chunk_layout
from mamba_ops.ops._common.slots import row_bounds


class RowTokens(NamedTuple):
    """Where the tokens of each row are."""

    bounds: list[int] | None
    """Where rows begin among packed tokens, and where the last one ends. None: they are not packed."""
    number: int
    have_tokens: bool
    """Whether all rows have some."""

    def of(self, tokens: Tensor, row: int) -> Tensor:
        """An activation of a row, (length, ...)."""
        return tokens[row] if self.bounds is None else tokens[self.bounds[row] : self.bounds[row + 1]]

    def empty(self) -> Tensor:
        """Whether each row has no tokens, (number,)."""
        if self.bounds is None or self.have_tokens:
            return torch.full((self.number,), not self.have_tokens)
        return torch.tensor(self.bounds).diff() == 0

    def zero_unless(self, output: Tensor, row: int, is_active: Tensor) -> None:
        """Set a row's output to zero unless it is active."""
        of_row = self.of(output, row)
        of_row.masked_fill_(~is_active[row], 0)


def rows_here(x: Tensor, cu_seqlens: Tensor | None) -> RowTokens | None:
    """The rows of a call, or None where the host does not know how long they are or a program is traced."""
    if not chunk_layout.are_here(x):
        return None
    if cu_seqlens is None:
        return RowTokens(None, x.shape[0], x.shape[1] > 0)
    begins, ends = row_bounds(cu_seqlens, x.shape[0])
    bounds = [*begins[:1].tolist(), *ends.tolist()]
    return RowTokens(bounds, len(bounds) - 1, all(a < b for a, b in pairwise(bounds)))
