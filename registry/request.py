"""How requests are written: backends by name, in an order for each op, and settings."""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from mamba_ops.registry import errors
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.snapshot import Names, Request

if TYPE_CHECKING:
    from mamba_ops.registry.namespace import Namespace

    class Requester(Protocol):
        """What `use_backend` and `configure` take beside names, such as a `mamba_ops.BackendConfig`."""

        def request(self, by: str) -> Request:
            """Return what is asked for, said to be asked for by `by`."""


Reader = Callable[[str], Hashable]
"""What reads the word behind a setting's `=`."""


def make(
    by: str,
    everywhere: Sequence[str] = (),
    named: Mapping[str, Sequence[str]] | None = None,
    settings: Mapping[str, Hashable] | None = None,
) -> Request:
    """Return the request for these names, in any case; raise the first of `problems`."""
    orders = {known_op(op) or op: lowered(names) for op, names in (named or {}).items()}
    request = Request.make(by, lowered(everywhere), orders, settings or None)
    for problem in problems(request):
        raise problem
    return request


def problems(request: Request) -> list[errors.RegistryError]:
    """Return an error for each name that is not registered and each order that makes no sense."""
    dispatcher.load_entry_points()
    ops, backends = dispatcher.ops.values(), dispatcher.backends
    found: list[errors.RegistryError] = []
    for place, names in (("", request.everywhere), *request.ops):
        where = [op for op in ops if op.name == place]
        if place and not where:
            found.append(errors.unknown("op", place, (op.name for op in ops)))
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
    return next((op.name for op in dispatcher.ops.values() if op.name.lower() == name.strip().lower()), None)


def lowered(names: Sequence[str]) -> Names:
    """Return backends' names as they are registered."""
    return tuple(name.strip().lower() for name in names)


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
    settings, names = list(settings), [op.name for op in dispatcher.ops.values()]
    return errors.unknown("op or setting" if settings else "op", key, [*names, *settings])


def setting_readers(namespace: "Namespace") -> dict[str, Reader]:
    """Return the settings that a namespace's ops and the backends have, each with what reads it from a string."""
    dispatcher.load_entry_points()
    readers: dict[str, Reader] = dict(namespace.settings)
    for backend in dispatcher.backends.values():
        for name, values in backend.choices.items():
            readers[f"{backend.name}_{name}"] = partial(_choice, f"{backend.name}_{name}", values)
    return readers


def _choice(name: str, values: Sequence[str], word: str) -> str:
    if word.lower() not in values:
        raise errors.RegistryError(f"{name}: got {word!r}, expected {', '.join(values)}")
    return word.lower()


def from_environment(namespace: "Namespace") -> Request:
    """Return what `<NAMESPACE>_BACKEND` and `<NAMESPACE>_CHECK` ask for."""
    variable = f"{namespace.name.upper()}_BACKEND"
    check = f"{namespace.name.upper()}_CHECK"
    try:
        everywhere, named = entries_of(os.environ.get(variable, ""))
        readers = setting_readers(namespace)
        for key in named:
            if key.lower() not in readers and known_op(key) is None:
                raise unknown_entry(key, readers if readers else ())
        settings = {key.lower(): readers[key.lower()](value) for key, value in named.items() if key.lower() in readers}
        orders = {key: order_of(value) for key, value in named.items() if key.lower() not in readers}
        return make(variable, everywhere, orders, settings)._replace(checks_values=os.environ.get(check) == "1")
    except errors.RegistryError as error:
        raise type(error)(f"{variable}: {error}") from None
