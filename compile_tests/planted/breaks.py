"""Defects that end a graph. The line that an audit has to name ends in `# planted`."""

import copy
import logging
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
LOCK = threading.Lock()
extension_call = torch._C._is_alias_of  # a pybind11 function on tensors, as those of a compiled extension


def x() -> Tensor:
    """Return what most of these models take."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A projection, so that there is a graph beside the defect."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)


class Item(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        scale = y.sum().item()  # planted
        return y * scale


class ItemTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y * y.sum()


class ItemInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return x + y.clamp(max=y.mean().item() * 10)  # planted


class ItemInsideTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return x + torch.minimum(y, y.mean() * 10)


class Tolist(Base):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.proj(x)
        total = 0
        sizes = lengths.tolist()  # planted
        return y[: sizes[0]] + total


class TolistTwin(Base):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.proj(x)
        return y * (torch.arange(y.shape[0]) < lengths[0]).unsqueeze(1)


class Nonzero(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        rows = y[:, 0].nonzero()  # planted
        return y[rows.squeeze(1)]


class NonzeroTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y * (y[:, :1] != 0)


class Mask(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y[y[:, 0] > 0] * 2  # planted


class MaskTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return torch.where(y[:, :1] > 0, y * 2, 0)


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        if y.sum() > 0:  # planted
            return y * 2
        return y - 1


class BranchTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return torch.where(y.sum() > 0, y * 2, y - 1)


class Repeats(Base):
    def forward(self, x: Tensor, repeats: Tensor) -> Tensor:
        y = self.proj(x)
        return y.repeat_interleave(repeats, dim=0)  # planted


class RepeatsTwin(Base):
    def forward(self, x: Tensor, repeats: Tensor) -> Tensor:
        return self.proj(x).repeat_interleave(repeats, dim=0, output_size=8)


class Unique(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return torch.unique(y)  # planted


class UniqueTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten().sort().values


class Print(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        print("norm of", y.shape)  # planted  # noqa: T201
        return y.relu()


class Logger(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        log.info("a layer has run")  # planted
        return y.relu()


class Clock(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        self.seen = time.perf_counter()  # planted
        return y.relu()


class Quiet(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).relu()


class DeepCopy(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        kept = copy.deepcopy(y)  # planted
        return y.relu() + kept


class DeepCopyTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        kept = y.clone()
        return y.relu() + kept


class Pybind(Base):
    """As mamba_ssm calls `selective_scan_cuda.fwd`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        same = extension_call(y, x)  # planted
        return y * 2 if same else y


@torch.compiler.disable
def disabled_rule(x: Tensor) -> Tensor:
    return x.cumsum(0)


def traced_rule(x: Tensor) -> Tensor:
    return x.cumsum(0)


class Disabled(Base):
    """As flash-linear-attention keeps its chunked rules from Dynamo."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return disabled_rule(y) + 1  # planted


class DisabledTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return traced_rule(self.proj(x)) + 1


class DataPointer(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        aligned = y.data_ptr() % 16 == 0  # planted
        return y if aligned else y.clone()


class Explicit(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        torch._dynamo.graph_break()  # planted
        return y.relu()


class Lock(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        with LOCK:  # planted
            return y.relu()


class BackwardHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.proj.register_full_backward_hook(lambda module, given, out: None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)  # planted
        return y.relu()


class OutArgument(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        out = torch.empty(8, 4).t()
        torch.add(y, 1, out=out)  # planted
        return out.relu()


class OutTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        out = torch.empty(4, 8)
        torch.add(y, 1, out=out)
        return out.relu()


class Layer(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).relu()


class LoopWithBreak(nn.Module):
    """One break inside the loop over the layers costs the whole frame."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()  # planted
        return x


class LoopTwin(LoopWithBreak):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Unrolled(Base):
    """A recurrence over tokens, as the slow paths of Transformers have it."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for token in self.proj(x):  # planted
            state = state + token
        return state


class UnrolledTwin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).cumsum(0)[-1]


class LayerWithBreak(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return disabled_rule(y) + x  # planted


class Deep(nn.Module):
    """The same break in each of many layers."""

    def __init__(self, layers: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LayerWithBreak() for _ in range(layers))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x
