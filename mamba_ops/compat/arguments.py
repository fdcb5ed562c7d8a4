"""Arguments of the imitated functions that have no effect here, or that the ops take in another form."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from mamba_ops import functional
from mamba_ops.ops._common import checking
from mamba_ops.registry import Op, check_written, kinds
from mamba_ops.registry.errors import ArgumentTypeError, in_call_of

P = ParamSpec("P")
T = TypeVar("T")
States = tuple[Tensor, Tensor]
"""An output and the last states."""


def refuse(function: str, **arguments: object) -> None:
    """Raise if one of the arguments is set."""
    for name, got in arguments.items():
        if got is not None and got is not False:
            raise ValueError(f"{function}: {name}: got a {type(got).__name__}, expected none: it has no effect here")


def floating(function: str, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are plain ones of ordinary floating-point numbers, and on one device.

    For functions that compute with them themselves.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{function}: {name}: got a {type(tensor).__name__}, expected a torch.Tensor")
    try:
        if not torch.compiler.is_compiling():
            kinds.check(tensors)
            _on_one_device(tensors)
        checking.floating(**tensors)
    except ValueError as error:
        raise ValueError(f"{function}: {error}") from None


def floating_dtypes(function: str, **dtypes: object) -> None:
    """Raise unless every dtype is one of floating-point numbers, or None."""
    for name, dtype in dtypes.items():
        try:
            checking.floating_dtype(name, dtype)
        except ValueError as error:
            raise in_call_of(function, error) from None


def _on_one_device(tensors: Mapping[str, Tensor | None]) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name, device in devices.items():
        if device != (first := next(iter(devices.values()))):
            raise ValueError(f"{name}: got a tensor on {device}, expected one on {first}")


def numbers(function: str, **values: object) -> None:
    """Raise about a number that is given as a tensor, as no gradient would reach it."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{function}: {name}: got a tensor, expected a number")


def whole(function: str, **values: object) -> None:
    """Raise about what is no whole number of 1 or more."""
    for name, value in values.items():
        try:
            checking.whole_number(name, value)
        except ValueError as error:
            raise in_call_of(function, error) from None


def flags(function: str, **values: object) -> None:
    """Raise about a flag, which the op calls otherwise, that is no truth value."""
    for name, value in values.items():
        if not isinstance(value, (bool, int, Tensor)):
            raise ArgumentTypeError(f"{function}: {name}: got {value!r}, expected True or False")


def written(function: str, inputs: Mapping[str, Tensor | None] | None = None, /, **tensors: Tensor | None) -> None:
    """Raise about a tensor that the function writes after the op has run, if it is none that could be written.

    A trace has no memory to look at.

    Args:
        function: who was called, for errors.
        inputs: of a function that records gradients: where it does, the backward reads them, so that nothing that is
            written may share their memory.
        tensors: what will be written, by the argument's name.
    """
    if torch.compiler.is_compiling():
        return
    kept = {name: tensor for name, tensor in (inputs or {}).items() if isinstance(tensor, Tensor)}
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in kept.values())):
        kept = {}
    try:
        check_written({name: tensor for name, tensor in tensors.items() if tensor is not None}, kept)
    except ValueError as error:
        raise in_call_of(function, error) from None


def is_silu(function: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{function}: activation: got {activation!r}, expected None, 'silu' or 'swish'")
    return activation is not None


def is_silu_or_flag(function: str, activation: str | bool | None) -> bool:
    return activation if isinstance(activation, bool) else is_silu(function, activation)


def only(result: Tensor | tuple[Tensor | None, ...]) -> Tensor:
    """Return the first of what a function returns, which returns more on demand."""
    first = result[0] if isinstance(result, tuple) else result
    if first is None:
        raise TypeError("only: result: got None, expected a tensor")
    return first


def all_have(initial_states: Tensor | None) -> Tensor | None:
    """Return an op's `has_initial_state`: true for every sequence, or None without initial states."""
    return None if initial_states is None else initial_states.new_ones(initial_states.shape[0], dtype=torch.bool)


def upcast(tensor: Tensor) -> torch.dtype:
    """Return the dtype of states: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def check_states(function: str, name: str, states: Tensor | None, shape: Sequence[int]) -> None:
    """Raise unless states are floating-point numbers of exactly this shape, where there are any."""
    floating(function, **{name: states})
    if states is not None and states.shape != tuple(shape):
        expected = f"{tuple(shape)}: a state for each sequence"
        raise ValueError(f"{function}: {name}: got shape {tuple(states.shape)}, expected {expected}")


def with_states(
    function: str,
    op: Op[...],
    *inputs: Any,
    cache: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    initial: tuple[str, Tensor | None] = ("", None),
    **options: Any,
) -> States:
    """Return an op's output and the last states, which begin with the initial ones and are no one's cache.

    Where gradients are asked for they are computed by `mamba_ops.functional`, which costs more on the host.

    Args:
        function: who was called, for errors.
        op, inputs, options: what is called, with what; batch or packed rows, without caches.
        cache: the op's argument that holds states.
        shape, dtype: of the states.
        initial: the initial states, of that shape, with the name of the argument.
    """
    name, states = initial
    check_states(function, name, states, shape)
    given = [t for t in (*inputs, *options.values(), states) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        states = None if states is None else states.to(dtype)
        out, last = getattr(functional, op.name)(*inputs, **options, initial_states=states)
        return out, last.to(dtype)
    last = inputs[0].new_zeros(shape, dtype=dtype) if states is None else states.to(dtype, copy=True)
    return op(*inputs, **options, **{cache: last, "has_initial_state": all_have(states)}), last


def per_head(tensor: Tensor, axes: int) -> Tensor:
    """Return a tensor without its last axes if they are expanded (stride 0): a kernel then reads one number a head."""
    if any(tensor.stride(-1 - axis) for axis in range(axes)):
        return tensor
    return tensor.flatten(-axes)[..., 0]


class _NoBackward(torch.autograd.Function):
    """Gives tensors on; their backward raises."""

    @staticmethod
    def forward(ctx: Any, function: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{ctx.function}: backward: got a gradient of its output, expected none: a step of decoding has none, as "
            "in the original; train with the function for whole sequences, or call this under torch.no_grad()"
        )


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of a decode step take tensors that require gradients; what it returns has none, and says so.

    In a graph the op refuses such tensors, as a step would be compiled for a backward that there is not.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        if not wanted:
            return function(*args, **kwargs)
        with torch.no_grad():
            result: Any = function(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        tensors = [t for t in results if isinstance(t, Tensor)]
        given = iter(_NoBackward.apply(function.__name__, len(tensors), *tensors, *wanted))  # type: ignore[no-untyped-call]
        found = tuple(next(given) if isinstance(t, Tensor) else t for t in results)
        return found if isinstance(result, tuple) else found[0]  # type: ignore[return-value]

    return call
