"""Backward passes over many rows: some rows after others, in the same memory.

What a backward pass keeps between its launches is many times what it returns. Rows do not need each other's: where all
of it would be large, launches are made for a few rows at a time, and what they leave is overwritten by those for the
next. A slice still has programs for every processor of a GPU. The smaller slices are, the longer all of them take.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._triton import prepared
from mamba_ops.ops._triton.common import cdiv
from mamba_ops.ops._triton.sums import add_up

KEPT = 256 << 20
"""Bytes that a slice may keep. As many rows as fill a GPU may need more, and so may packed rows, whose lengths only the
device knows."""
WALKS = 256
"""Programs that walk over rows at once, at least: fewer would leave processors of large GPUs without work."""

_many: ContextVar[bool] = ContextVar("_many", default=False)


def are_many() -> bool:
    """Whether calls are to run as if they had many rows: see `as_with_many_rows`."""
    return _many.get()


@contextmanager
def as_with_many_rows() -> Iterator[None]:
    """Run calls within the block as if they had many rows: each row is a slice of a backward pass, and kernels are
    those of many rows.

    It is for warm-ups, which compile both. Calls before it are no example for those in it, nor these for later ones.
    """
    prepared.forget()
    token = _many.set(True)
    try:
        yield
    finally:
        _many.reset(token)
        prepared.forget()


class Workspace:
    """Memory that each slice uses again: the first that a slice asks for is the first that the others asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[Tensor] = []
        self._taken = 0

    def rewind(self) -> None:
        self._taken = 0

    def __call__(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return memory of these sizes; no later slice has more rows than the first, so it is large enough."""
        if self._taken == len(self._kept):
            self._kept.append(torch.empty(sizes, dtype=dtype, device=self._device))
        kept = self._kept[self._taken]
        self._taken += 1
        return kept if kept.shape == sizes else kept.view(-1)[: prod(sizes)].view(sizes)


def by_slices(
    backward: Callable[[Any, Workspace], None],
    call: Any,
    *,
    bytes_of_row: int,
    walks_of_row: int,
    parameters: Collection[str] = (),
) -> None:
    """Run a backward pass over slices of a call's rows.

    Args:
        backward: runs a call, with memory for what it keeps.
        call: the arguments, a NamedTuple; `x` or `v` has the rows.
        bytes_of_row: what is kept for a row.
        walks_of_row: how many programs walk over a row, in the launch that has the fewest.
        parameters: names of the inputs that all rows share; the first dimension of others is that of rows.
    """
    first = call.x if hasattr(call, "x") else call.v
    rows, space = first.shape[0], Workspace(first.device)
    together = max(KEPT // max(bytes_of_row, 1), cdiv(WALKS, max(walks_of_row, 1)))
    if are_many():
        together = 1
    if call.cu_seqlens is not None or first.numel() == 0 or rows <= together:
        backward(call, space)
        return
    together = cdiv(rows, cdiv(rows, together))  # slices of equal size
    count = cdiv(rows, together)
    tensors = {n: t for n, t in call._asdict().items() if isinstance(t, Tensor) and t.numel()}
    sums = {name: tensors[name] for name in (f"grad_{p}" for p in parameters) if name in tensors}
    of_rows = {name: t for name, t in tensors.items() if name not in sums and name not in parameters}
    shares = {name: gradient.new_empty(count, *gradient.shape, dtype=torch.float32) for name, gradient in sums.items()}
    for number in range(count):
        space.rewind()
        part = {name: tensor[number * together : (number + 1) * together] for name, tensor in of_rows.items()}
        backward(call._replace(**part, **{name: share[number] for name, share in shares.items()}), space)
    for name, gradient in sums.items():
        add_up(shares[name], gradient, many=False)
