"""The errors of the registry; a message says what was called, got, expected, and what to do."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class RegistryError(ValueError):
    """Base of the registry's own errors; a ValueError, so that one `except` serves callers."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and the attributes, whatever arguments the class is made with."""
        return RegistryError.__new__, (type(self), *self.args), vars(self)


class DeclarationError(RegistryError, TypeError):
    """An op, a facet of an op, a backend or an adapter was declared wrongly."""


class UnknownNameError(RegistryError):
    """A backend or an op was asked for by a name that is not registered."""


class NoBackendError(RegistryError):
    """No backend takes this call; `reasons` maps each backend's name to its sentence."""

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})  # none where a DataLoader makes the error again, of its text alone


class ConfigError(RegistryError):
    """A configuration is wrong; `problems` has a sentence for each thing that is."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        if isinstance(problems, str):  # the whole text, of which a DataLoader makes its worker's error again
            super().__init__(problems)
            self.problems = [problems]
            return
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"the configuration has {count}:", *problems]))
        self.problems = list(problems)


class CompilationError(RegistryError):
    """A kernel would be compiled or tuned where that is forbidden: see `no_jit`."""


class ArgumentTypeError(RegistryError, TypeError):
    """An argument is no tensor, or no number, where one belongs; or a tensor of a kind that no kernel takes."""


def shown(name: str) -> str:
    """Return a parameter's name as callers spell it."""
    return "out" if name == "output" else name


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
    """Name the op in an error that its checks raised, if they did not."""
    if str(error).startswith(f"{op}: "):
        return error
    return ValueError(f"{op}: {error}")


def unknown(kind: str, name: str, valid: Iterable[str]) -> UnknownNameError:
    """Answer an unknown name with the valid ones."""
    from difflib import get_close_matches  # needed for this error alone

    known = sorted(set(valid))
    close = get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return UnknownNameError(f"unknown {kind} {name!r}; valid: {', '.join(known) or 'none'}{hint}")


def declaration(what: str, problem: str) -> DeclarationError:
    """Refuse a declaration, naming it and what to change."""
    return DeclarationError(f"{what}: {problem}")


def refuse_duplicate(kind: str, name: str, first: Any) -> None:
    """Raise if something is registered under a name already, pointing at its `source`."""
    if first is not None:
        raise DeclarationError(
            f"{kind} {name!r} is already registered, at {first.source}; choose another name or remove that one"
        )


def source_of(function: Callable[..., Any]) -> str:
    """Return `file:line` of a function."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
