"""Defects that make torch.compile start over: what is a constant to it, and changes."""

import torch
from torch import Tensor

from compile_tests.planted.breaks import Base


class Counter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) * self.steps  # planted
        self.steps += 1
        return y


class CounterTwin(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) * self.steps
        self.steps.add_(1)
        return y


class IntArgument(Base):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        y = self.proj(x)
        for _ in range(layer):  # planted
            y = y.relu()
        return y


class IntTwin(Base):
    def forward(self, x: Tensor, layer: Tensor) -> Tensor:
        return self.proj(x) * layer


class Text(Base):
    def forward(self, x: Tensor, mode: str) -> Tensor:
        y = self.proj(x)
        return y.relu() if mode == "relu" else y.tanh()  # planted


class TextTwin(Base):
    def forward(self, x: Tensor, mode: Tensor) -> Tensor:
        y = self.proj(x)
        return torch.where(mode, y.relu(), y.tanh())


class Growing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        for old in self.seen:  # planted
            y = y + old
        self.seen.append(x)
        return y


class GrowingTwin(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) + self.seen
        self.seen.add_(x)
        return y


class SizeOne(Base):
    def forward(self, x: Tensor) -> Tensor:  # planted
        return self.proj(x).relu()


class Dtype(Base):
    def forward(self, x: Tensor) -> Tensor:  # planted
        return self.proj(x.float()).relu()


class NoneThenTensor(Base):
    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        y = self.proj(x)
        return y if state is None else y + state  # planted


class AlwaysTensor(Base):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.proj(x) + state


class Contiguity(Base):
    def forward(self, x: Tensor) -> Tensor:  # planted
        return self.proj(x).relu()


class DecidesBySize(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        if x.shape[0] > 8:  # planted
            return y.relu()
        return y.tanh()


class DecidesBySizeTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).relu()
