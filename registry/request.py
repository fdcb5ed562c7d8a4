"""What is asked for: backends by name, in an order for each op, and settings; how it is written; what is in force."""

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mamba_ops.registry import errors
from mamba_ops.registry.tables import backends, load_entry_points, lock, namespaces, ops

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op

    class Requester(Protocol):
        """What `use_backend` and `configure` take beside names, such as a `mamba_ops.BackendConfig`."""

        def request(self, by: str) -> "Request":
            """Return what is asked for, said to be asked for by `by`."""


COMPOSED = "composed"
"""Name of the backend whose kernels call other ops."""

Names = tuple[str, ...]


class Request(NamedTuple):
    """What is asked for at one place.

    Attributes:
        by: who asks, for messages.
        everywhere: the order for every op that is not named: of these backends, those that have a kernel for it.
        ops: op name to the backends to try, in order. A call that the last one refuses is refused.
        settings: name to value; None where nothing is said about any of them.
    """

    by: str
    everywhere: Names = ()
    ops: Mapping[str, Names] = MappingProxyType({})
    settings: Mapping[str, Hashable] | None = None

    def of(self, op: "Op[...]") -> Names | None:
        """Return the backends that are asked for, for this op, or None."""
        if (names := self.ops.get(op.name)) is not None:
            return names
        if names := tuple(name for name in self.everywhere if name in op.kernels):
            return names
        return (COMPOSED,) if self.everywhere and op.composed else None  # it is the ops inside that the names bind


def make(
    by: str, everywhere: Sequence[str] = (), named: Mapping[str, Sequence[str]] | None = None, **settings: Hashable
) -> Request:
    """Return the request for these names, in any case; raise the first of `problems`."""
    bound = {known_op(op) or op: lowered(names) for op, names in (named or {}).items()}
    request = Request(by, lowered(everywhere), bound, settings or None)
    for problem in problems(request):
        raise problem
    return request


def problems(request: Request) -> list[errors.RegistryError]:
    """Return an error for each name that nobody has and each order that makes no sense."""
    load_entry_points()
    found: list[errors.RegistryError] = []
    for place, names in {"": request.everywhere, **request.ops}.items():
        where = [op for op in ops.values() if op.name == place]
        if place and not where:
            found.append(errors.unknown("op", place, (op.name for op in ops.values())))
        if place and not names:
            found.append(errors.RegistryError(f"no backend is named for {place}"))
        found += [errors.unknown("backend", name, backends) for name in names if name not in backends]
        known = [name for name in names if name in backends]
        found += [errors.no_kernel(n, op.qualname, op.kernels) for op in where for n in known if n not in op.kernels]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(errors.RegistryError(f"{', '.join(twice)} is named twice for {place or 'all ops'}"))
    return found


def known_op(name: str) -> str | None:
    """Return how an op's name is spelt, given in any case, or None."""
    return next((op.name for op in ops.values() if op.name.lower() == name.strip().lower()), None)


def lowered(names: Sequence[str]) -> Names:
    """Return backends' names as they are registered."""
    return tuple(name.strip().lower() for name in names)


# -- text -------------------------------------------------------------------------------------------------------------

Entries = dict[str, str]


def entries_of(text: str) -> tuple[Names, Entries]:
    """Split `flashinfer:triton,op=torch,setting=value` into the order without a name, and the rest by name.

    Raises:
        RegistryError: more than one order without a name, or a name twice.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    bare = [entry for entry in entries if "=" not in entry]
    if len(bare) > 1:
        raise errors.RegistryError(
            f"got the bare names {', '.join(bare)}, expected at most one; an order is written {':'.join(bare)}"
        )
    named: Entries = {}
    for key, _, value in (entry.partition("=") for entry in entries if "=" in entry):
        if (key := key.strip()) in named:
            raise errors.RegistryError(f"got {key} twice")
        named[key] = value.strip()
    return order_of(bare[0]) if bare else (), named


def order_of(text: str) -> Names:
    """Split `flashinfer:triton`."""
    return tuple(name for name in text.split(":") if name.strip())


def unknown_entry(key: str, settings: Iterable[str]) -> errors.UnknownNameError:
    """Answer a name before a `=` that is neither an op's nor a setting's."""
    settings = list(settings)
    return errors.unknown("op or setting" if settings else "op", key, [*(op.name for op in ops.values()), *settings])


_environments: dict[str, Request] = {}  # namespace to what its environment variable asks for, once read


def environment(namespace: str) -> Request:
    """Return what `<NAMESPACE>_BACKEND` asks for; it is read once."""
    with lock:
        if namespace not in _environments:
            variable = f"{namespace.upper()}_BACKEND"
            try:
                _environments[namespace] = _read(variable, os.environ.get(variable, ""), namespaces[namespace].settings)
            except errors.RegistryError as error:
                raise type(error)(f"{variable}: {error}") from None
        return _environments[namespace]


def forget_environment(namespace: str) -> None:
    """Read the namespace's variable again next time."""
    _environments.pop(namespace, None)


def _read(by: str, text: str, readers: Mapping[str, Callable[[str], Any]]) -> Request:
    everywhere, named = entries_of(text)
    load_entry_points()
    for key in named:
        if key.lower() not in readers and known_op(key) is None:
            raise unknown_entry(key, readers)
    settings = {key.lower(): readers[key.lower()](value) for key, value in named.items() if key.lower() in readers}
    return make(by, everywhere, {k: order_of(v) for k, v in named.items() if k.lower() not in readers}, **settings)


# -- what is in force -------------------------------------------------------------------------------------------------

active: list[Request] = []
"""What use_backend() now asks for, outermost first."""

configured: Request | None = None
"""What configure() asks for."""


_thread = threading.local()  # .requests: what holds in this thread alone, if anything


def in_force() -> tuple[Request, ...]:
    """Return the requests in force, innermost first."""
    found: tuple[Request, ...] | None = getattr(_thread, "requests", None)
    return (*reversed(active), *([configured] if configured else [])) if found is None else found


@contextmanager
def as_if(requests: tuple[Request, ...] | None) -> Iterator[None]:
    """Within the block, these are in force in this thread; None: those that are in force anyway."""
    _thread.requests = requests
    try:
        yield
    finally:
        _thread.requests = None


def is_as_if() -> bool:
    """Whether this thread is in a block of `as_if` that puts something in force."""
    return getattr(_thread, "requests", None) is not None


def asked(op: "Op[...]") -> tuple[Names, str] | None:
    """Return the backends that use_backend() or configure() asks for, for this op, and who asked."""
    for request in in_force():
        if (names := request.of(op)) is not None:
            return names, request.by
    return None


def bound(op: "Op[...]") -> tuple[Names, str] | None:
    """Return the backends that were asked for by name for this op, and who asked."""
    if (found := asked(op)) is not None:
        return found
    request = environment(op.qualname.split("::")[0])
    return None if (names := request.of(op)) is None else (names, request.by)


def anybody_asks() -> bool:
    """Whether backends are asked for by name, for any op: quicker than to look at each."""
    return bool(in_force()) or any(r.everywhere or r.ops for r in map(environment, namespaces))


def stated() -> Mapping[str, Hashable] | None:
    """Return the settings of the innermost of use_backend() and configure() that has any; it states them all."""
    return next((request.settings for request in in_force() if request.settings is not None), None)


def settings() -> Mapping[str, Hashable]:
    """Return the settings in force: those stated, else those that the environment names."""
    if (found := stated()) is not None:
        return found
    named: dict[str, Hashable] = {}
    for namespace in [n for n in namespaces.values() if n.settings]:
        named |= environment(namespace.name).settings or {}
    return named
