"""What an op remembers of the calls it has seen, so that a repeated call is neither checked nor decided again."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

_LIMIT = 4096  # calls per op; past it the memory begins again, so that shapes without end cost no memory


class Memory:
    """What an op has decided since the last change. A change puts a new one in its place, so a decision that was under
    way meanwhile is learnt by a memory that nobody asks any more.

    Attributes:
        last: the latest call.
        known: all calls, by what they are known by.
    """

    __slots__ = ("known", "last")

    def __init__(self) -> None:
        self.last: Known = (lambda *tensors: False, (), _never)
        self.known: dict[Any, Known] = {}

    def learn(self, key: Any, known: "Known") -> None:
        """Add a call; past the limit, begin again."""
        if len(self.known) >= _LIMIT:
            self.known.clear()
        self.known[key] = known


Known = tuple[Callable[..., bool], tuple[Any, ...], Callable[..., None]]
"""A decided call: whether other tensors are like its own, its numbers, and the function that runs it."""


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("an empty memory recognises no call")


def comparison(tensors: list[Tensor]) -> Callable[..., bool]:
    """Return a function that tells whether other tensors have these sizes, dtypes, devices and gradient needs."""
    sizes: Any = [list(t.shape) for t in tensors]
    any_strides: Any = [[None] * t.dim() for t in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=any_strides)
    return guards.check
