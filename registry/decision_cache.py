"""What an op remembers of the calls it has seen, so that a repeated call is neither checked nor decided again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mamba_ops.registry.snapshot import Snapshot

_LIMIT = 4096  # calls per op and snapshot; past it the cache begins again, so that endless shapes cost no memory


def never_matches(*tensors: Tensor) -> bool:
    """Stands for a comparison that is not made yet: most calls of sizes of their own come once."""
    return False


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("an empty cache recognises no call")


class CachedDecision(NamedTuple):
    """A call that was decided on.

    Attributes:
        must_redispatch: whether such a call must be looked at in any case; asked in every call, so built in if it can.
        same_tensors: whether other tensors are like its own.
        numbers: its numbers.
        kernel: what runs it.
        is_capturing: whether this thread's current stream captures a graph.
    """

    must_redispatch: Callable[[], bool] = bool
    same_tensors: Callable[..., bool] = never_matches
    numbers: tuple[Any, ...] = ()
    kernel: Callable[..., None] = _never
    is_capturing: Callable[[], bool] = bool


_EMPTY = CachedDecision()


@dataclass(slots=True, eq=False)
class DecisionCache:
    """What an op has decided under one snapshot.

    Attributes:
        snapshot: what was selected.
        is_foreign: whether the snapshot is another than that of the context: a selection token names it.
        token_size: size of the selection token of the snapshot; -1 until there is one.
        last: the latest call.
        known: all calls, by what they are recognised by.
    """

    snapshot: "Snapshot"
    is_foreign: bool = False
    token_size: int = -1
    last: CachedDecision = _EMPTY
    known: dict[Any, CachedDecision] = field(default_factory=dict)

    def learn(self, key: Any, decision: CachedDecision) -> None:
        """Add a call; past the limit, begin again."""
        if len(self.known) >= _LIMIT:
            self.known.clear()
        self.known[key] = decision


def redispatch_query(tensors: list[Tensor], is_capturing: Callable[[], bool]) -> Callable[[], bool]:
    """Return what tells whether a call with these tensors must be looked at again: in grad mode if one of them requires
    grad, and always while a graph is captured.
    """
    if not any(t.requires_grad for t in tensors):
        return is_capturing
    if is_capturing is bool:
        return torch.is_grad_enabled
    return lambda: torch.is_grad_enabled() or is_capturing()
