"""How requests are written: backends by name, in an order for each op, and settings."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from mamba_ops.registry import errors
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.snapshot import Names, Request

if TYPE_CHECKING:
    from mamba_ops.registry.namespace import Namespace

    class Requester(Protocol):
        """What `use_backend` and `configure` take beside names, such as a `mamba_ops.BackendConfig`."""

        def request(self, by: str) -> Request:
            """Return what is asked for, said to be asked for by `by`."""


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
        for op, name in ((op, name) for op in where for name in names if name in backends and name not in op.kernels):
            runs_on = ", ".join(sorted(op.kernels))
            problem = f"backend {name!r} has no kernel for {op.qualname}; it can run on: {runs_on}"
            found.append(errors.RegistryError(problem))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(errors.RegistryError(f"{', '.join(twice)} is named twice for {place or 'all ops'}"))
    return found


def known_op(name: str) -> str | None:
    """Return how an op's name is spelt, given in any case, or None."""
    return next((op.name for op in dispatcher.ops.values() if op.name.lower() == name.strip().lower()), None)


def lowered(names: Sequence[str]) -> Names:
    """Return backends' names as they are registered."""
    return tuple(name.strip().lower() for name in names)


def order_of(text: str) -> Names:
    """Split `flashinfer:triton`."""
    return tuple(name for name in text.split(":") if name.strip())


def parse(text: str, namespace: "Namespace") -> tuple[dict[str, Names], dict[str, Any], list[errors.RegistryError]]:
    """Read `flashinfer:triton,op=torch,setting=value`.

    Returns:
        The orders by op, the one without a name under `""`; the settings that the namespace's ops and the backends
        have; and an error for each entry that is none of these, or comes twice.
    """
    readers = _setting_readers(namespace)
    orders: dict[str, Names] = {}
    settings: dict[str, Any] = {}
    found: list[errors.RegistryError] = []
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    bare = [entry for entry in entries if "=" not in entry]
    if len(bare) > 1:
        problem = f"got the bare names {', '.join(bare)}, expected at most one; an order is written {':'.join(bare)}"
        return orders, settings, [errors.RegistryError(problem)]
    for key, word in [(key.strip(), word.strip()) for key, _, word in (e.partition("=") for e in entries if "=" in e)]:
        try:
            if key in orders or key.lower() in settings:
                raise errors.RegistryError(f"got {key} twice")
            if key.lower() in readers:
                settings[key.lower()] = readers[key.lower()](word)
            elif known_op(key) is None:
                kind = "op or setting" if readers else "op"
                raise errors.unknown(kind, key, [*(op.name for op in dispatcher.ops.values()), *readers])
            else:
                orders[key] = order_of(word)
        except errors.RegistryError as error:
            found.append(error)
    return orders | ({"": order_of(bare[0])} if bare else {}), settings, found


def _setting_readers(namespace: "Namespace") -> dict[str, Callable[[str], Any]]:
    """Return the settings that a namespace's ops and the backends have, each with what reads it from a string."""
    dispatcher.load_entry_points()
    readers = dict(namespace.settings)
    for backend in dispatcher.backends.values():
        for name, values in backend.choices.items():
            readers[f"{backend.name}_{name}"] = partial(_choice, f"{backend.name}_{name}", values)
    return readers


def _choice(name: str, values: Sequence[str], word: str) -> str:
    if word.lower() not in values:
        raise errors.RegistryError(f"{name}: got {word!r}, expected {', '.join(values)}")
    return word.lower()


def from_environment(namespace: "Namespace") -> Request:
    """Return what `<NAMESPACE>_BACKEND` asks for."""
    variable = f"{namespace.name.upper()}_BACKEND"
    try:
        orders, settings, wrong = parse(os.environ.get(variable, ""), namespace)
        for error in wrong:
            raise error
        return make(variable, orders.pop("", ()), orders, settings)
    except errors.RegistryError as error:
        raise type(error)(f"{variable}: {error}") from None
