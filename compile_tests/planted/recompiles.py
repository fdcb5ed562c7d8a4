"""Defects that make torch.compile start over, each for another kind of guard. The line to name ends in `# planted`."""

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compile_tests.planted.breaks import Base


class Mode(enum.Enum):
    RELU = 1
    TANH = 2


class Repeats(Base):
    """Torch makes the number dynamic at its second value."""

    def forward(self, x: Tensor, num: int) -> Tensor:
        return self.proj(x).repeat(num, 1).sum() * num  # planted


class Scale(Base):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.proj(x) * scale  # planted


class ScaleTwin(Base):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.proj(x) * scale


class Flag(Base):
    def forward(self, x: Tensor, flag: bool) -> Tensor:
        y = self.proj(x)
        return y.relu() if flag else y.tanh()  # planted


class FlagTwin(Base):
    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        y = self.proj(x)
        return torch.where(flag, y.relu(), y.tanh())


class ByEnum(Base):
    def forward(self, x: Tensor, mode: Mode) -> Tensor:
        y = self.proj(x)
        return y.relu() if mode is Mode.RELU else y.tanh()  # planted


class ByFunction(Base):
    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        y = self.proj(x)
        return function(y)  # planted


class ByFunctionTwin(Base):
    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return self.proj(x).relu()


class AnyRank(Base):
    def forward(self, x: Tensor) -> Tensor:  # planted
        return self.proj(x).relu()


class TwoTensors(Base):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # planted
        return self.proj(x) + other


class Keywords(Base):
    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        y = self.proj(x)
        return y * kwargs["scale"] if kwargs else y  # planted


class KeywordsTwin(Base):
    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return self.proj(x) * kwargs["scale"]


class Batch(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        y = self.proj(batch["x"])
        return y + batch["bias"] if "bias" in batch else y  # planted


class BatchTwin(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.proj(batch["x"])


class Items(Base):
    def forward(self, x: Tensor, items: list[Tensor]) -> Tensor:
        y = self.proj(x)
        for item in items:  # planted
            y = y + item
        return y


class ItemsTwin(Base):
    def forward(self, x: Tensor, items: Tensor) -> Tensor:
        return self.proj(x) + items.sum(0)


class NumberOrTensor(Base):
    def forward(self, x: Tensor, scale: Any) -> Tensor:  # planted
        return self.proj(x) * scale


class OverLength(Base):
    """A recurrence in Python: a graph for each length, and torch cannot make the length dynamic."""

    def forward(self, x: Tensor) -> Tensor:  # planted
        state = torch.zeros_like(x[0])
        for step in range(x.shape[0]):
            state = state + x[step]
        return self.proj(state)


class OverLengthTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.cumsum(0)[-1])


class ByTable(Base):
    """Looks something up by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = {4: 1.0, 5: 2.0, 6: 3.0}

    def forward(self, x: Tensor) -> Tensor:  # planted
        return self.proj(x) * self.scales[x.shape[0]]


class Divides(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        if x.shape[0] % 2:  # planted
            y = y.relu()
        return y


class SameLength(Base):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.proj(x)
        if x.shape[0] == other.shape[0]:  # planted
            return y + other
        return y


class SameLengthTwin(Base):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.proj(x) + other.sum()


class TextAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.name = "a"

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) + len(self.name)  # planted
        self.name += "!"
        return y


class TextAttributeTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + 1


def widened(value: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return value * 2


class InHelper(Base):
    """The helper's break makes it a function of its own, which is compiled again for another rank within one call."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return widened(y.flatten()).sum() + widened(y).sum()


def fine(value: Tensor) -> Tensor:
    return value.relu()


@torch.compiler.disable
def broken(value: Tensor) -> Tensor:
    return value.tanh()


class SecondCall(Base):
    """The line's second call breaks, not its first."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return fine(y) + broken(fine(y))  # planted


class SecondCallTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return fine(y) + fine(fine(y))
