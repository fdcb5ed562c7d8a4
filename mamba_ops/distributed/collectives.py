"""Sums over the ranks of a layer, with their gradients, for eager calls and for graphs."""

from typing import Any, NamedTuple, cast

import torch
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor
from torch.distributed import ProcessGroup


class Ranks(NamedTuple):
    """The ranks among which something is summed.

    Attributes:
        group: all ranks of the layer.
        sets: into how many sets of neighbours they are divided; sums are made within each.
        mine: the number of this rank's set.
    """

    group: ProcessGroup
    sets: int = 1
    mine: int = 0

    def use(self, tensor: Tensor) -> Tensor:
        """Return a tensor that all ranks have, each for a use of its own: its gradients are summed."""
        return cast(Tensor, _Sum.apply(tensor, self, False, True))  # type: ignore[no-untyped-call]

    def use_rows(self, parameter: Tensor, rows: range) -> Tensor:
        """Return a parameter of which the ranks have some rows in common: the gradients of these are summed."""
        return cast(Tensor, _SumOfRows.apply(parameter, self, rows))  # type: ignore[no-untyped-call]

    def sum_for_all(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, of which all make the same use."""
        return cast(Tensor, _Sum.apply(tensor, self, True, False))  # type: ignore[no-untyped-call]

    def sum_for_each(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, of which each makes a use of its own."""
        return cast(Tensor, _Sum.apply(tensor, self, True, True))  # type: ignore[no-untyped-call]

    def _sum(self, tensor: Tensor) -> Tensor:
        """Every set has a place in the tensor that is summed, so that one sum over all ranks serves all sets."""
        if self.sets == 1:
            return self._sum_over_all(tensor.contiguous())
        places = tensor.new_zeros((self.sets, *tensor.shape))
        places[self.mine] = tensor
        return self._sum_over_all(places)[self.mine]

    def _sum_over_all(self, tensor: Tensor) -> Tensor:
        found = functional_collectives.all_reduce(tensor, "sum", self.group)
        return cast(Tensor, functional_collectives.wait_tensor(found))


class _Sum(torch.autograd.Function):
    """A sum over ranks in the forward, in the backward, or in both; elsewhere the identity."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, forward_sums: bool, backward_sums: bool) -> Tensor:
        ctx.ranks, ctx.sums = ranks, backward_sums
        return ranks._sum(tensor) if forward_sums else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (ctx.ranks._sum(grad) if ctx.sums else grad), None, None, None


class _SumOfRows(torch.autograd.Function):
    """The identity, whose gradient is summed over ranks in some rows."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ranks: Ranks, rows: range) -> Tensor:
        ctx.ranks, ctx.rows = ranks, rows
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        begin, end = ctx.rows.start, ctx.rows.stop
        return torch.cat((grad[:begin], ctx.ranks._sum(grad[begin:end]), grad[end:])), None, None
