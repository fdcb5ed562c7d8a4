"""Functions of an op's literal signature that call another function: a facet, a refusal, or a backend's kernel."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mamba_ops.registry import _torch
from mamba_ops.registry.codegen import (
    Parameters,
    as_tuple,
    compared,
    compiled,
    header_of,
    is_optional,
    is_tensor,
    numbers_of,
    passed_on,
)
from mamba_ops.registry.snapshot import never_matches

_ADAPTER = """\
def call({header}):
    return function_({passed})
"""

_KERNEL_ADAPTER = """\
def call({header}):
    try:
        {shortcut}
        function_({passed})
    except Exception as error_:
        if (other_ := failed_(error_, *{values})) is error_: raise
        raise other_ from error_
"""

_SHORTCUT = """\
same_tensors_, numbers_, runs_ = shortcut_.last
        if (same_tensors_({compared}) and numbers_ == {numbers} and runs_({addresses})): return"""


Last = tuple[Callable[..., bool], tuple[Any, ...], Callable[[tuple[int, ...], int], bool]]
"""What tells whether other tensors are like a call's, the call's numbers, and what runs a call like it: that is given
the addresses of all tensors (0 for None), and the bits that any of them has; it returns whether it ran the call."""


class Shortcut(Protocol):
    """Runs a kernel, and learns how to run calls like an earlier one without its Python."""

    last: Last
    """Of the latest call that it knows."""

    def __call__(self, call: Any) -> None:
        """Run a call that is not like the latest."""


class Recognised:
    """How calls of an op are recognised by a shortcut: its tensors and its numbers, each in the order of the op."""

    NONE: Last = (never_matches, (), lambda *_: False)
    """The `last` of a shortcut that knows no call."""

    def __init__(self, parameters: Parameters) -> None:
        self._tensors = [i for i, p in enumerate(parameters) if is_tensor(p)]
        self._numbers = [i for i, p in enumerate(parameters) if not is_tensor(p)]
        stand_ins = nothing(parameters)
        self._stand_ins = [stand_ins.get(parameters[i].name) for i in self._tensors]

    def tensors(self, call: Any) -> list[Tensor | None]:
        return [call[i] for i in self._tensors]

    def numbers(self, call: Any) -> tuple[Any, ...]:
        return tuple(call[i] for i in self._numbers)

    def likeness(self, call: Any) -> Callable[..., bool]:
        """Return what tells whether another call's tensors are like this one's, strides included."""
        given = [call[i] for i in self._tensors]
        given = [other if tensor is None else tensor for tensor, other in zip(given, self._stand_ins, strict=True)]
        return _torch.same_tensors(given, range(len(given)))


def takes_a_call(parameters: Parameters, function: Callable[..., Any]) -> bool:
    """Whether a function takes a call as one value: its one parameter is none of the op's."""
    found = list(inspect.signature(function).parameters.values())
    return len(found) == 1 and "VAR_" not in found[0].kind.name and found[0].name not in [p.name for p in parameters]


def adapted(
    op: str, parameters: Parameters, arguments: type[tuple[Any, ...]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function of the op's signature that calls another one with what that one takes.

    That is one `arguments` of the whole call, any arguments, or the parameters that it names; a declared function may
    name the output `out`.
    """
    wanted = inspect.signature(function).parameters
    if takes_a_call(parameters, function):
        passed = _as_a_call(parameters)
    elif any("VAR_" in p.kind.name for p in wanted.values()):
        passed = passed_on(parameters)
    else:
        values = {"out" if p.name == "output" and "out" in wanted else p.name: p.name for p in parameters}
        passed = ", ".join(f"{name}={value}" for name, value in values.items() if name in wanted)
    return _made(_ADAPTER, op, parameters, arguments, function, {"passed": passed})


def adapted_kernel(
    op: str,
    parameters: Parameters,
    arguments: type[tuple[Any, ...]],
    function: Callable[[Any], None],
    *,
    failed: Callable[..., Exception],
    shortcut: Shortcut | None,
) -> Callable[..., None]:
    """Return a function of the op's signature that calls a backend's, which takes one `arguments` of the whole call.

    Args:
        op, parameters, arguments: qualified name, parameters and calls of the op.
        function: the backend's.
        failed: given an error that it raises, and all arguments, returns what to raise.
        shortcut: asked first, and called in the place of `function`, where there is one.
    """
    template = _KERNEL_ADAPTER.replace("{shortcut}", "" if shortcut is None else _SHORTCUT)
    extra = {f"no_{name}": tensor for name, tensor in nothing(parameters).items()}
    function = function if shortcut is None else shortcut
    parts = {
        "passed": _as_a_call(parameters),
        "values": as_tuple(parameters),
        "numbers": numbers_of(parameters),
        "compared": compared(parameters),
        "addresses": _addresses(parameters),
    }
    return _made(template, op, parameters, arguments, function, parts, failed=failed, shortcut=shortcut, **extra)


def nothing(parameters: Parameters) -> dict[str, Tensor]:
    """Return for each optional tensor what stands for None where calls are compared: a tensor of a dtype that no op
    takes, and one for each, as one that is met twice is no match.
    """
    return {p.name: torch.empty(0, dtype=torch.complex64) for p in parameters if is_optional(p)}


def _made(
    template: str,
    op: str,
    parameters: Parameters,
    arguments: type[tuple[Any, ...]],
    function: Callable[..., Any],
    parts: dict[str, str],
    **extra: Any,
) -> Callable[..., Any]:
    closure = {"function": function, "make": tuple.__new__, "arguments": arguments, **extra}
    source = template.format(header=header_of(parameters, closure), **parts)
    made = compiled(op, getattr(function, "__name__", "kernel"), source, closure)
    made.__doc__ = function.__doc__
    return made


def _as_a_call(parameters: Parameters) -> str:
    return f"make_(arguments_, {as_tuple(parameters)})"


def _addresses(parameters: Parameters) -> str:
    """Write the addresses of a call's tensors, and the bits that any of them has."""
    tensors = [p for p in parameters if is_tensor(p)]
    absent = {p.name: f"0 if {p.name} is None else " if is_optional(p) else "" for p in tensors}
    found = "".join(f"({name}_at_ := {or_zero}{name}.data_ptr()), " for name, or_zero in absent.items())
    return f"({found}), {' | '.join(f'{p.name}_at_' for p in tensors) or 0}"
