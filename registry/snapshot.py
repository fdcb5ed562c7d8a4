"""What is selected at one time, and the requests that it is made of."""

from collections.abc import Hashable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Backend, Kernel
    from mamba_ops.registry.dispatcher import Dispatcher
    from mamba_ops.registry.op import Op

COMPOSED = "composed"
"""Name of the backend whose kernels call other ops."""

Names = tuple[str, ...]


class Request(NamedTuple):
    """What is asked for at one place.

    Attributes:
        by: what asks, for messages.
        everywhere: the order for every op that is not named: of these backends, those that have a kernel for it.
        ops: op name and the backends to try, in order. A call that the last one refuses is refused.
        settings: name and value; None where nothing is said about any of them.
        checks_values: whether calls on any device are checked for wrong values.
    """

    by: str
    everywhere: Names = ()
    ops: tuple[tuple[str, Names], ...] = ()
    settings: tuple[tuple[str, Hashable], ...] | None = None
    checks_values: bool = False

    @classmethod
    def make(
        cls,
        by: str,
        everywhere: Names = (),
        ops: Mapping[str, Names] = MappingProxyType({}),
        settings: Mapping[str, Hashable] | None = None,
    ) -> "Request":
        """Return a request made of mappings."""
        return cls(by, everywhere, tuple(ops.items()), None if settings is None else tuple(settings.items()))

    def of(self, op: "Op[...]") -> Names | None:
        """Return the backends that are asked for, for this op, or None."""
        for name, names in self.ops:
            if name == op.name:
                return names
        if names := tuple(name for name in self.everywhere if name in op.kernels):
            return names
        return (COMPOSED,) if self.everywhere and op.composed else None  # the names act on the ops inside


class Requests:
    """The requests of nested `use_backend` blocks, the innermost first. Equal ones are one object, quick to look up."""

    _known: dict[tuple[Request, ...], "Requests"] = {}  # noqa: RUF012  it is meant to be shared

    def __init__(self, requests: tuple[Request, ...]) -> None:
        self.requests = requests
        self._inner: dict[Request, Requests] = {}

    @classmethod
    def of(cls, requests: tuple[Request, ...]) -> "Requests":
        """Return the one object of these requests."""
        return cls._known.setdefault(requests, cls(requests))

    def plus(self, request: Request) -> "Requests":
        """Return these with one more inside."""
        if (found := self._inner.get(request)) is None:
            found = self._inner[request] = self.of((request, *self.requests))
        return found

    def minus(self, request: Request) -> "Requests":
        """Return these without a request, the innermost of its kind: blocks may be left in another order."""
        at = self.requests.index(request) if request in self.requests else len(self.requests)
        return self.of((*self.requests[:at], *self.requests[at + 1 :]))


NO_REQUESTS = Requests.of(())


class Order(NamedTuple):
    """The kernels that a call of an op may go to, in order.

    Attributes:
        kernels: the kernels.
        requested: the backends that were asked for by name, and by whom; None: it is the default order.
    """

    kernels: "tuple[Kernel, ...]"
    requested: tuple[Names, str] | None


class Snapshot:
    """What is selected at one time.

    Attributes:
        active: the requests of `use_backend` that it was made of.
        requests: those and the one of `configure`, the innermost first.
        generation: its number; no two snapshots share one.
    """

    def __init__(
        self, dispatcher: "Dispatcher", active: Requests, requests: tuple[Request, ...], generation: int
    ) -> None:
        self._dispatcher = dispatcher
        self.active, self.requests, self.generation = active, requests, generation
        self._orders: dict[Op[...], Order] = {}

    def order(self, op: "Op[...]") -> Order:
        """Return the kernels that a call may go to, in order."""
        if (found := self._orders.get(op)) is None:
            if (requested := self.requested(op)) is None:
                kernels = sorted(op.kernels.values(), key=lambda k: (-k.backend.priority, k.backend.name))
            else:
                kernels = [op.kernels[name] for name in requested[0] if name in op.kernels]
            found = self._orders[op] = Order(tuple(kernels), requested)
        return found

    def requested(self, op: "Op[...]") -> tuple[Names, str] | None:
        """Return the backends that are asked for by name, for this op, and who asks."""
        for request in (*self.requests, self._dispatcher.environment(op.namespace)):
            if (names := request.of(op)) is not None:
                return names, request.by
        return None

    def checks_values(self, op: "Op[...]") -> bool:
        """Whether an op's calls on any device are checked for wrong values."""
        return any(r.checks_values for r in (*self.requests, self._dispatcher.environment(op.namespace)))

    @cached_property
    def names_backends(self) -> bool:
        """Whether backends are asked for by name, for any op."""
        requests = (*self.requests, *map(self._dispatcher.environment, list(self._dispatcher.namespaces)))
        return any(request.everywhere or request.ops for request in requests)

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

    def backend_settings(self, backend: "Backend") -> Mapping[str, str]:
        """Return a backend's settings; those that nothing is said about have their defaults."""
        return {n: str(self.settings.get(f"{backend.name}_{n}", v[0])) for n, v in backend.choices.items()}

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
