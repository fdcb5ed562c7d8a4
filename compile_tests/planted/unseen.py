"""Defects that something else hides: a first call, a higher-order operator, another break, an absent device."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compile_tests.planted.breaks import Base


class Table(Base):
    """Makes a table in its first call, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self._table: Tensor | None = None

    def make(self, x: Tensor) -> Tensor:
        return torch.tensor(torch.arange(x.shape[1]).tolist()).float()  # planted

    def forward(self, x: Tensor) -> Tensor:
        if self._table is None:
            self._table = self.make(x)
        return self.proj(x) * self._table


class TableTwin(Table):
    def make(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1]).float()


class Cond(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.proj(x),))
        print("after the operator")  # planted  # noqa: T201
        return y * 2


class CondTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.proj(x),))
        return y * 2


class Scaled(Base):
    """Waits for a value; numbered as layers are."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) + self.number
        return y * y.sum().item()


class ScaledTwin(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) + self.number
        return y * y.sum()


class Loop(nn.Module):
    """The break in its layers makes Dynamo skip this forward, and with it what is wrong here."""

    def __init__(self, layer: Callable[[int], nn.Module] = Scaled) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(number) for number in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x) * layer.number
        self.calls += 1
        return x[x > 0] * self.calls


class LoopTwin(Loop):
    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x) * layer.number
        return torch.where(x > 0, x, 0)


class AsksForDevice(Base):
    """Waits twice on a GPU, and never on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        if torch.get_device_module(x.device.type).is_available() and x.device.type != "cpu":
            y = y * int(y.sum().item())
            y = y[y > 0]
        return y * 2


class AsksForDeviceTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y * 2 if torch.cuda.is_available() or torch.xpu.is_available() else y * y.sum().item()


def asks() -> tuple[nn.Module, Tensor]:
    """Return a model and its input, for the command."""
    return AsksForDevice().eval(), torch.randn(4, 8)


def asks_twin() -> tuple[nn.Module, Tensor]:
    """Return a model and its input, for the command."""
    return AsksForDeviceTwin().eval(), torch.randn(4, 8)


class Hiding(Base):
    """Gives its forward up at a first break, and prints behind it unless it is quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__()
        self.quiet = quiet
        self.lock = threading.Lock()


class InTry(Hiding):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        try:
            y = y * y.sum().item()
        finally:
            self.quiet = self.quiet
        if not self.quiet:
            print("behind")  # noqa: T201
        return y * 2


class InWith(Hiding):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        with contextlib.suppress(ValueError), torch.no_grad():
            y = y * y.sum().item()
            if not self.quiet:
                print("behind")  # noqa: T201
        return y * 2


class InGenerator(Hiding):
    def rows(self, y: Tensor) -> Iterator[Tensor]:
        for row in y:
            yield row * row.sum().item()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack(list(self.rows(self.proj(x))))
        if not self.quiet:
            print("behind")  # noqa: T201
        return y * 2


class AfterError(Hiding):
    """Dynamo fails at an op without a usable fake."""

    def forward(self, x: Tensor) -> Tensor:
        y = without_shape(self.proj(x))
        if not self.quiet:
            print("behind")  # noqa: T201
        return y * 2


@torch.library.custom_op("planted::without_shape", mutates_args=())
def without_shape(x: Tensor) -> Tensor:
    """Return a copy; its fake fails."""
    return x.clone()


@without_shape.register_fake
def _(x: Tensor) -> Tensor:
    raise RuntimeError("this fake fails")
