"""Every error that the registry raises; a message says what was called, got, expected, and what to do."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class RegistryError(ValueError):
    """Base of the registry's own errors; a ValueError, so that one `except` serves callers."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and the attributes, whatever arguments the class is made with."""
        return _unpickled, (type(self), self.args, vars(self))


def _unpickled(cls: type[RegistryError], args: tuple[Any, ...], attributes: dict[str, Any]) -> RegistryError:
    error = cls.__new__(cls, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class DeclarationError(RegistryError, TypeError):
    """An op, a facet of an op, a backend or an adapter was declared wrongly."""


class UnknownNameError(RegistryError):
    """A backend or an op was asked for by a name that is not registered."""


class NoBackendError(RegistryError):
    """No backend takes this call; `reasons` maps each backend's name to its sentence."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


class ConfigError(RegistryError):
    """A configuration is wrong; `problems` has a sentence for each thing that is."""

    def __init__(self, problems: Sequence[str]) -> None:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"the configuration has {count}:", *problems]))
        self.problems = list(problems)


class CompilationError(RegistryError):
    """A kernel would be compiled or tuned where that is forbidden: see `no_jit`."""


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


def requires_grad(op: str, argument: str, *, entry: str = "") -> str:
    """Say that a call records no gradients; a sentence, because a compiled call raises it by number.

    Args:
        op: qualified name.
        argument: the tensor that requires grad.
        entry: when the op does record gradients, and what to call for more; "" if it never does.
    """
    return (
        f"{op}: {argument}: got a tensor that requires grad while grad mode is on, expected none: "
        f"{entry or 'this op does not record gradients'}; else call it under torch.no_grad() or "
        "torch.inference_mode(), or detach the tensor (parameters count)"
    )


def no_jvp(op: str) -> NotImplementedError:
    """Refuse forward-mode differentiation: a tangent would be lost without a word."""
    return NotImplementedError(
        f"{op}: got a call under forward-mode differentiation (torch.func.jvp, forward_ad), expected reverse mode: the "
        "op has no formula for tangents; use torch.func.vjp, torch.func.grad or backward()"
    )


def no_second_derivative(op: str) -> RuntimeError:
    """Refuse to differentiate a gradient."""
    return RuntimeError(
        f"{op}: its gradient was differentiated again, which it has no formula for; compute second derivatives through "
        "a plain torch implementation, or detach the gradient"
    )


def not_batched(op: str, argument: str, batched: Iterable[str]) -> ValueError:
    """Refuse a torch.func.vmap that can't be folded into the op's own batch."""
    return ValueError(
        f"{op}: {argument}: got a tensor that torch.func.vmap maps over, or an index of packed rows, expected only "
        f"{', '.join(batched)} to be mapped over: the op folds the mapped dimension into its batch; loop over the "
        "calls, or pass the batch to the op itself"
    )


def two_worlds(op: str, argument: str, got: object, expected: object) -> ValueError:
    """Refuse a call in which meta tensors and real ones meet: it would run nothing and say nothing."""
    return ValueError(f"{op}: {argument}: got a tensor on {got}, expected {expected}; move all arguments to one device")


def no_backend(op: str, reasons: Mapping[str, str], *, bound_by: str | None = None) -> NoBackendError:
    """List every candidate with its reason.

    Args:
        op: qualified name.
        reasons: backend name to sentence.
        bound_by: what asked for one backend by name (then there is one candidate and no falling back).
    """
    width = max((len(name) for name in reasons), default=0)
    lines = [f"  {name:<{width}}  {reason}" for name, reason in reasons.items()]
    if bound_by is None:
        return NoBackendError("\n".join([f"{op}: no backend accepts this call", *lines]), reasons)
    advice = f"(asked for by {bound_by}; a backend asked for by name never falls back)"
    return NoBackendError("\n".join([f"{op}: the backend asked for refuses this call", *lines, advice]), reasons)


def unknown(kind: str, name: str, valid: Iterable[str]) -> UnknownNameError:
    """Answer an unknown name with the valid ones."""
    from difflib import get_close_matches  # here, because nobody else needs it

    known = sorted(set(valid))
    close = get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return UnknownNameError(f"unknown {kind} {name!r}; valid: {', '.join(known) or 'none'}{hint}")


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


def swap_while_tracing(what: str) -> RegistryError:
    """Refuse a swap inside a traced region: the graph would not contain it."""
    return RegistryError(
        f"{what}() was called inside a region that torch.compile traces; call it around the compiled function"
    )


def swap_while_capturing(what: str) -> RegistryError:
    """Refuse a swap while a graph is captured: it would hold kernels of two selections, whatever is selected later."""
    return RegistryError(
        f"{what} was called, or its block left, while this thread captures a graph, which would hold kernels of two "
        "selections; swap around the capture"
    )


def recording_in_event_loop(op: str) -> RegistryError:
    """Refuse a recording in a thread whose asyncio tasks select backends: one task could replay another's kernel."""
    return RegistryError(
        f"{op}: got a recording by torch.compile (a CUDA graph) in a thread whose asyncio tasks select backends, "
        "expected one selection for the thread, as a replay runs no Python that could tell tasks apart; enter "
        "use_backend around the event loop, run the call in a thread, or compile without CUDA graphs"
    )


def captured(op: str, backend: str, wanted: str) -> str:
    """Warn of a graph that the caller captured: no swap reaches what it replays."""
    return (
        f"{op} was captured in a graph while it ran on {backend}: replays go on running {backend}, and the backend "
        f'asked for is {wanted} now. Capture again after the swap, or let torch.compile(mode="reduce-overhead") '
        "capture, which records anew after a swap"
    )


def no_taker(op: str, reasons: Mapping[str, str], *, asked: Iterable[str], bound_by: str) -> NoBackendError:
    """List the backends of an order with their reasons; it goes on to no others."""
    text = str(no_backend(op, reasons))
    return NoBackendError(f"{text}\n(asked for by {bound_by}: {', '.join(asked)}, and no others)", reasons)


def compiles(call: tuple[str, str] | None, kernel: str, cause: str, by: str) -> str:
    """Say which kernel would be compiled, why, who forbids it, and what to do.

    Args:
        call: the op that is being called, and the warm-up call that would have covered it; None: no op is.
        kernel: its name.
        cause: why it is not there yet.
        by: who forbids it.
    """
    op, remedy = call or ("no op of the registry", "call it once beforehand")
    return f"{op}: kernel {kernel} would be compiled or loaded now, and {by}: {cause}; beforehand: {remedy}"
