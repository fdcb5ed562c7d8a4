"""Defects of ops: no fake, a schema that hides a mutation, an output that is an input, a copied cache."""

from typing import Any

import torch
from torch import Tensor

from compile_tests.planted.breaks import Base

library = torch.library.Library("planted", "DEF")
for schema in (
    "no_fake(Tensor x) -> Tensor",
    "with_fake(Tensor x) -> Tensor",
    "hidden(Tensor state, Tensor x) -> Tensor",
    "told(Tensor(a!) state, Tensor x) -> Tensor",
    "alias(Tensor x) -> Tensor",
    "advance(Tensor(a!) cache, Tensor x) -> ()",
):
    library.define(schema)


def _double(x: Tensor) -> Tensor:
    return x * 2


def _accumulate(state: Tensor, x: Tensor) -> Tensor:
    state.add_(x)
    return state * 2


def _advance(cache: Tensor, x: Tensor) -> None:
    cache.add_(x)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _like_second(state: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


library.impl("no_fake", _double, "CPU")
library.impl("with_fake", _double, "CPU")
library.impl("with_fake", _like, "Meta")
library.impl("hidden", _accumulate, "CPU")
library.impl("hidden", _like_second, "Meta")
library.impl("told", _accumulate, "CPU")
library.impl("told", _like_second, "Meta")
library.impl("alias", lambda x: x, "CPU")
library.impl("alias", _like, "Meta")
library.impl("advance", _advance, "CPU")
library.impl("advance", lambda cache, x: None, "Meta")
ops = torch.ops.planted


class NoFake(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return ops.no_fake(y) + 1  # planted


class WithFake(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return ops.with_fake(y) + 1


class WithState(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(4, 8))
        self.register_buffer("pool", torch.zeros(3, 4, 8))


class Hidden(WithState):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return ops.hidden(self.state, y) + 1  # planted


class Told(WithState):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return ops.told(self.state, y) + 1


class Alias(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return ops.alias(y) + 1  # planted


class CacheInPlaceOnView(WithState):
    """The old values are read after the op has written: functionalization keeps a copy of the whole pool."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        before = self.pool * 1.5
        ops.advance(self.pool[1], y)  # planted
        return y + before[0] + self.pool.flip(0)[0]


class CacheTwin(WithState):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        ops.advance(self.state, y)
        return y * 2


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * x.abs()


class AutogradFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return Scale.apply(y) + 1  # planted


class AutogradTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y * y.abs() + 1
