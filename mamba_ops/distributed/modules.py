"""The modules of a layer that is split over ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.distributed.collectives import Ranks
from mamba_ops.layers.mixer import Taps
from mamba_ops.layers.norms import GatedRMSNorm, RMSNorm, rms_norm, upcast


class Shared(NamedTuple):
    """Rows of a module's parameters that several ranks have."""

    ranks: Ranks
    rows: range


def used(module: nn.Linear | nn.Conv1d, shared: Sequence[Shared]) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of a module for use on this rank."""
    weight, bias = module.weight, module.bias
    for ranks, rows in shared:
        weight, bias = ranks.use_rows(weight, rows), None if bias is None else ranks.use_rows(bias, rows)
    return weight, bias


class InputLinear(nn.Linear):
    """Some rows of a projection, of an input that all ranks have."""

    ranks: Ranks
    shared: Sequence[Shared]

    def forward(self, input: Tensor) -> Tensor:
        """Project the input to this rank's part of the output."""
        return functional.linear(self.ranks.use(input), *used(self, self.shared))


class SharedTaps(Taps):
    """The taps of this rank's channels, some of which other ranks have too."""

    shared: Sequence[Shared]

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return the weight and the bias."""
        weight, bias = used(self, self.shared)
        return weight.squeeze(1), bias


class OutputLinear(nn.Linear):
    """Some columns of a projection: of this rank's part of the input, to an output that all ranks have."""

    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:
        """Project this rank's part of the input, and sum over ranks."""
        output = self.ranks.sum_for_all(functional.linear(input, self.weight))
        return output if self.bias is None else output + self.bias


class SharedWeightNorm(GatedRMSNorm):
    """A gated norm of heads of this rank, whose weight all heads share."""

    ranks: Ranks

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate `x` and normalise it."""
        return self.norm(x, gate, self.ranks.use(self.weight))


class SharedRMSNorm(RMSNorm):
    """A norm of what this rank has, whose weight is that of all ranks."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` over its last axis."""
        return rms_norm(x, self.ranks.use(self.weight), self.eps)


class PartOfGroupNorm(GatedRMSNorm):
    """A gated norm of a group of channels of which this rank has a part."""

    ranks: Ranks  # those that have parts of the group
    channels: int  # of the whole group

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate `x`, and normalise it by the mean square of the whole group."""
        h = upcast(x) * functional.silu(upcast(gate))
        square = self.ranks.sum_for_each(h.square().sum(-1, keepdim=True)) / self.channels
        return (h * torch.rsqrt(square + self.eps) * upcast(self.weight)).to(x.dtype)
