"""What is selected at one time, the requests that it is made of, and what an op has decided under it."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
    from mamba_ops.registry.dispatcher import Dispatcher
    from mamba_ops.registry.op import Op

COMPOSED = "composed"
"""Name of the backend of composed ops."""
OWN = (COMPOSED, "torch")
"""Backends that are an op's own body."""

Names = tuple[str, ...]


class Request(NamedTuple):
    """What is asked for at one place. A call that the last backend of an order refuses is refused."""

    by: str  # what asks, for messages
    everywhere: Names = ()  # the order for ops that are not named: of these backends, those that have a kernel for it
    ops: tuple[tuple[str, Names], ...] = ()  # names of ops, each with its order
    settings: tuple[tuple[str, Hashable], ...] | None = None  # names and values; None: nothing is said about them
    checks_values: bool = False  # whether calls on any device are checked for wrong values
    why: tuple[tuple[str, str], ...] = ()  # names of ops, each with a sentence that says why it has its order

    def of(self, op: "Op[...]") -> Names | None:
        """Return the backends that are asked for, for this op, or None."""
        for name, names in self.ops:
            if name == op.name:
                return names
        if names := tuple(name for name in self.everywhere if name in op.kernels):
            return (*names, COMPOSED) if any(op.kernels[name].partial for name in names) else names
        return (COMPOSED,) if self.everywhere and op.composed else None  # the names act on the ops inside


class Requests:
    """The requests of nested `use_backend` blocks, the innermost first.

    `requests_of` makes one object for equal ones, so that a look-up compares no names.
    """

    def __init__(self, requests: tuple[Request, ...]) -> None:
        self.requests = requests
        self._plus: dict[Request, Requests] = {}

    def plus(self, request: Request) -> "Requests":
        """Return these with one more inside."""
        if (found := self._plus.get(request)) is None:
            found = self._plus[request] = requests_of((request, *self.requests))
        return found

    def minus(self, request: Request) -> "Requests":
        """Return these without a request, the innermost of its kind: blocks may be left in another order."""
        at = self.requests.index(request) if request in self.requests else len(self.requests)
        return requests_of((*self.requests[:at], *self.requests[at + 1 :]))


requests_of = cache(Requests)
NO_REQUESTS = requests_of(())


class Order(NamedTuple):
    """The kernels that a call of an op may go to, in order."""

    kernels: "tuple[Kernel, ...]"
    requested: tuple[Names, str] | None  # backends asked for by name, and what asked; None in the default order


class Snapshot:
    """What is selected at one time; it never changes."""

    def __init__(self, dispatcher: "Dispatcher", active: Requests, configured: Request | None, generation: int) -> None:
        self._dispatcher = dispatcher
        self.active = active  # the requests of `use_backend` that it was made of
        self.requests = (*active.requests, *([] if configured is None else [configured]))  # the innermost first
        self.generation = generation  # no two snapshots share one
        self.token_size: int | None = None  # of its selection token; None until there is one
        self._orders: dict[Op[...], Order] = {}
        self._have_kernels: dict[tuple[Op[...], str], bool] = {}

    def order(self, op: "Op[...]") -> Order:
        """Return the kernels that a call may go to, in order."""
        if (found := self._orders.get(op)) is None:
            requests = (*self.requests, self._dispatcher.environment(op.namespace))
            requested = next(((names, r.by) for r in requests if (names := r.of(op)) is not None), None)
            if requested is None:
                kernels = sorted(op.kernels.values(), key=lambda k: (-k.backend.priority, k.backend.name))
            else:
                kernels = [op.kernels[name] for name in requested[0] if name in op.kernels]
            found = self._orders[op] = Order(tuple(kernels), requested)
        return found

    def has_kernel(self, op: "Op[...]", device_type: str) -> bool:
        """Return whether calls on a device go to a kernel that is not the op's own body, but for what it refuses."""
        if (found := self._have_kernels.get((op, device_type))) is None:
            kernels, requested = self.order(op)
            usable = (k for k in kernels if k.backend.why_unusable(device_type, by_name=requested is not None) is None)
            first = next(usable, None)
            found = self._have_kernels[op, device_type] = first is not None and first.backend.name not in OWN
        return found

    def checks_values(self, op: "Op[...]") -> bool:
        """Whether an op's calls on any device are checked for wrong values."""
        return any(r.checks_values for r in (*self.requests, self._dispatcher.environment(op.namespace)))

    @cached_property
    def explicit_settings(self) -> Mapping[str, Hashable] | None:
        """The settings of the innermost request that has any, for a request states them all; None: none has."""
        return next((dict(request.settings) for request in self.requests if request.settings is not None), None)

    @cached_property
    def settings(self) -> Mapping[str, Hashable]:
        """The explicit settings, else those that the environment names."""
        if self.explicit_settings is not None:
            return self.explicit_settings
        named = (self._dispatcher.environment(n).settings or () for n in list(self._dispatcher.namespaces))
        return dict(item for items in named for item in items)

    @cached_property
    def fingerprint(self) -> Hashable:
        """What two snapshots have in common if and only if every op has the same kernels in the same order.

        The environment is the same all the time, so it is left out (and not read before the first decision).
        """
        ops = self._dispatcher.ops.values()
        named = [(op.qualname, next((n for r in self.requests if (n := r.of(op)) is not None), None)) for op in ops]
        kernels = frozenset((op.qualname, k, k.backend.priority) for op in ops for k in op.kernels.values())
        explicit = None if self.explicit_settings is None else frozenset(self.explicit_settings.items())
        checks = any(request.checks_values for request in self.requests)
        return tuple(named), kernels, explicit, checks, self._dispatcher.renewals


def never_matches(*tensors: Tensor) -> bool:
    """Stands for a comparison that is not made yet: most calls of sizes of their own come once."""
    return False


class CachedDecision(NamedTuple):
    """A call that was decided on."""

    must_redispatch: Callable[[], bool] = bool  # asked in every call, so built in if it can: see `redispatch_query`
    same_tensors: Callable[..., bool] = never_matches  # whether other tensors are like its own
    numbers: tuple[Any, ...] = ()  # its arguments that are no tensors
    kernel: Callable[..., Any] = never_matches  # what runs it
    is_capturing: Callable[[], bool] = bool  # whether this thread's current stream captures a graph


_EMPTY = CachedDecision()


@dataclass(slots=True, eq=False)
class DecisionCache:
    """What an op has decided under one snapshot."""

    snapshot: Snapshot
    is_foreign: bool = False  # a selection token names the snapshot, which is not the context's
    token_size: int = -1  # of the snapshot's selection token, once there is one
    last: CachedDecision = _EMPTY  # the latest call
    known: dict[Any, CachedDecision] = field(default_factory=dict)  # all calls, by what they are recognised by


def redispatch_query(tensors: list[Tensor], is_capturing: Callable[[], bool]) -> Callable[[], bool]:
    """Return what tells whether a known call is decided again: where a gradient may be asked for, and in a capture."""
    if not any(t.requires_grad for t in tensors):
        return is_capturing
    if is_capturing is bool:
        return torch.is_grad_enabled
    return lambda: torch.is_grad_enabled() or is_capturing()
