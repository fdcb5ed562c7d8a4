"""What an op remembers of the calls it has seen, so that a repeated call is neither checked nor decided again."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel

_LIMIT = 4096  # calls per op; past it the memory begins again, so that shapes without end cost no memory


Known = tuple[Callable[[], bool], Callable[..., bool], tuple[Any, ...], Callable[..., None], Callable[[], bool]]
"""A decided call: whether such a call has to be looked at in any case (asked in every call, so built in where it can
be), whether other tensors are like its own, its numbers, what runs it, and whether this thread captures a graph.
"""


class Memory:
    """What an op has decided since the last change. A change puts a new one in its place, so a decision that was under
    way meanwhile is learnt by a memory that nobody asks any more.

    Attributes:
        last: the latest call.
        known: all calls, by what they are known by.
        order: the kernels that calls may go to, in order, and whether they were asked for by name; None: not looked at.
    """

    __slots__ = ("known", "last", "order")

    def __init__(self) -> None:
        self.last: Known = (bool, unlike, (), _never, bool)
        self.known: dict[Any, Known] = {}
        self.order: tuple[list[Kernel], bool] | None = None

    def learn(self, key: Any, known: Known) -> None:
        """Add a call; past the limit, begin again."""
        if len(self.known) >= _LIMIT:
            self.known.clear()
        self.known[key] = known


def unlike(*tensors: Tensor) -> bool:
    """Stands for a comparison that is not made yet: most calls of sizes of their own come once."""
    return False


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("an empty memory recognises no call")


def comparison(tensors: list[Tensor]) -> Callable[..., bool]:
    """Return a function that tells whether other tensors have these sizes, dtypes, devices and gradient needs."""
    sizes: Any = [list(t.shape) for t in tensors]
    any_strides: Any = [[None] * t.dim() for t in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=any_strides)
    return guards.check


def doubt(tensors: list[Tensor], is_capturing: Callable[[], bool]) -> Callable[[], bool]:
    """Return whether a call with these tensors must be looked at anew: in grad mode if one of them requires grad, and
    always while a graph is captured.
    """
    if not any(t.requires_grad for t in tensors):
        return is_capturing
    if is_capturing is bool:
        return torch.is_grad_enabled
    return lambda: torch.is_grad_enabled() or is_capturing()
