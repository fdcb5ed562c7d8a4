"""Every error that the registry raises; a message says what was called, got, expected, and what to do."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class RegistryError(ValueError):
    """Base of the registry's own errors; a ValueError, so that one `except` serves callers."""


class DeclarationError(RegistryError, TypeError):
    """An op, a facet of an op, a backend or an adapter was declared wrongly."""


class UnknownNameError(RegistryError):
    """A backend or an op was asked for by a name that nobody registered."""


class NoBackendError(RegistryError):
    """No backend takes this call; `reasons` maps each backend's name to its sentence."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


def source_of(thing: Callable[..., Any]) -> str:
    """Return `file:line` of a function, for messages that point at a declaration."""
    code = getattr(inspect.unwrap(thing), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(thing)


def bad_argument(name: str, *, got: object, expected: object, hint: str = "") -> ValueError:
    """Build the error for one bad argument; the registry puts the op's name in front.

    Args:
        name: the argument as the caller spells it.
        got: what it was.
        expected: what it should have been.
        hint: what to do about it, where `expected` does not say it.
    """
    return ValueError(f"{name}: got {got}, expected {expected}" + (f"; {hint}" if hint else ""))


def in_call_of(op: str, error: ValueError) -> ValueError:
    """Name the op in an error that its checks raised."""
    return ValueError(f"{op}: {error}")


def requires_grad(op: str, argument: str) -> str:
    """Say that the op does not record gradients; a sentence, because a compiled call raises it by number."""
    return (
        f"{op}: {argument}: got a tensor that requires grad while grad mode is on, expected none: this op does not "
        "record gradients yet; call it under torch.no_grad() or torch.inference_mode(), or detach the tensor "
        "(parameters count)"
    )


def two_worlds(op: str, argument: str, got: object, expected: object) -> ValueError:
    """Refuse a call in which meta tensors and real ones meet: it would run nothing and say nothing."""
    return ValueError(f"{op}: {argument}: got a tensor on {got}, expected {expected}; move all arguments to one device")


def no_backend(op: str, reasons: Mapping[str, str], *, bound_by: str | None = None) -> NoBackendError:
    """List every candidate with its reason.

    Args:
        op: qualified name.
        reasons: backend name to sentence.
        bound_by: who asked for one backend by name (then there is one candidate and no falling back).
    """
    width = max((len(name) for name in reasons), default=0)
    lines = [f"  {name:<{width}}  {reason}" for name, reason in reasons.items()]
    if bound_by is None:
        return NoBackendError("\n".join([f"{op}: no backend accepts this call", *lines]), reasons)
    advice = f"(asked for by {bound_by}; a backend asked for by name never falls back)"
    return NoBackendError("\n".join([f"{op}: the backend asked for refuses this call", *lines, advice]), reasons)


def unknown(kind: str, name: str, valid: Iterable[str]) -> UnknownNameError:
    """Answer an unknown name with the valid ones."""
    return UnknownNameError(f"unknown {kind} {name!r}; valid: {', '.join(sorted(valid)) or 'none'}")


def no_kernel(backend: str, op: str, valid: Iterable[str]) -> RegistryError:
    """Refuse to bind an op to a backend that has no kernel for it."""
    return RegistryError(f"backend {backend!r} has no kernel for {op}; it can run on: {', '.join(sorted(valid))}")


def duplicate(kind: str, name: str, first: str) -> DeclarationError:
    """Point at the first registration of a name that is registered twice."""
    return DeclarationError(
        f"{kind} {name!r} is already registered, at {first}; choose another name or remove that one"
    )


def declaration(what: str, problem: str) -> DeclarationError:
    """Refuse a declaration, naming it and what to change."""
    return DeclarationError(f"{what}: {problem}")


def swap_while_tracing() -> RegistryError:
    """Refuse use_backend() inside a traced region: the graph would not contain the swap."""
    return RegistryError(
        "use_backend() was called inside a region that torch.compile traces; call it around the compiled function"
    )
