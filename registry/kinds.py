"""What kind of value each argument of a call is: of the wrong type, or a tensor that no kernel could read.

Types are looked at after a call has failed, so that right calls pay nothing for it. A wrong one never gets to a kernel:
torch's dispatcher, or what comes before it, has raised by then.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import ParamSpec

from mamba_ops.registry import _torch, codegen
from mamba_ops.registry.errors import ArgumentTypeError, RegistryError, bad_argument, in_call_of, shown
from mamba_ops.registry.sharding import is_distributed

UNDER_A_TRANSFORM = "a tensor under a transform (vmap, grad, jvp, forward-mode AD)"
_EXPECTED = {Tensor: "a torch.Tensor", int: "a whole number", float: "a number", bool: "True or False"}
_PACK = "pack its rows into one tensor, with cu_seqlens where the op has it"
_OF_PREPARING = (
    *(RuntimeError, NotImplementedError, IndexError, AttributeError, TypeError, ValueError, ZeroDivisionError),
)
P = ParamSpec("P")
T = TypeVar("T")


def check(arguments: Mapping[str, Any]) -> None:
    """Raise the ValueError about a tensor that is no plain block of memory with strides, if there is one."""
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_nested:
            raise bad_argument(shown(name), got="a nested tensor", expected="a plain one", hint=_PACK)
        if tensor.layout is not torch.strided:
            got = f"a {str(tensor.layout).removeprefix('torch.')} tensor"
            raise bad_argument(shown(name), got=got, expected="a strided one", hint="convert it with to_dense()")
        if tensor.is_quantized:
            hint = "convert it with dequantize()"
            raise bad_argument(shown(name), got="a quantized tensor", expected="an ordinary one", hint=hint)


def is_plain(tensor: object) -> bool:
    """Whether a tensor is one of torch's own, and stands for nothing else: no fake, distributed or wrapped one."""
    return type(tensor) in (Tensor, nn.Parameter)


def explained(
    op: str,
    parameters: Sequence[inspect.Parameter],
    validate: Callable[[Mapping[str, Any]], None],
    error: Exception,
    values: Sequence[Any],
) -> Exception:
    """Return what to raise for a call that ended in `error`: a sentence about an argument that no call can have, if
    there is one, else the error itself.

    Args:
        op, parameters: its qualified name, and the parameters of `values`.
        validate: the op's checks of shapes and dtypes, which may not have been reached.
        error: what the call raised; a sentence that begins with an op's name stays.
        values: the call's arguments; `out` is None where the front was to allocate it.
    """
    if isinstance(error, RegistryError) or _names_an_op(str(error), op):  # a sentence of an op's own
        return error
    given = [(shown(p.name), p, value) for p, value in zip(parameters, values, strict=True)]
    for name, parameter, value in given:
        if (expected := _of_wrong_type(parameter, value)) is not None:
            return _wrong(op, name, _described(value), expected)
    tensors = [(name, value) for name, _, value in given if isinstance(value, Tensor)]
    for name, tensor in tensors:
        if tensor.is_nested:
            return _wrong(op, name, "a nested tensor", f"a plain one; {_PACK}")
        if not is_plain(tensor):
            kind = type(tensor).__name__
            others = ", ".join(other for other, plain in tensors if is_plain(plain))
            if is_distributed(tensor) and others:
                what_to_do = f"distribute_tensor also {others}, or pass each device's part, tensor.to_local()"
                return _wrong(op, name, f"a {kind} beside ordinary tensors", f"one or the other; {what_to_do}")
            expected = f"plain tensors; the op has no rule for a {kind} here ({_first_line(error)})"
            return _wrong(op, name, f"a {kind}", expected)
    if (wrapped := next((name for name, tensor in tensors if _torch.is_wrapped(tensor)), None)) is not None:
        expected = "a plain one: the op has no rule for the transform, as it writes to its arguments"
        return _wrong(op, wrapped, UNDER_A_TRANSFORM, expected)
    made_in_inference = next((name for name, tensor in tensors if tensor.is_inference()), None)
    if made_in_inference is not None and type(error) is RuntimeError and not torch.is_inference_mode_enabled():
        expected = "an ordinary one, as torch saves no other for a backward; clone it outside torch.inference_mode()"
        return _wrong(op, made_in_inference, "a tensor made in inference mode", expected)
    try:
        validate(_with_stand_in(parameters, values, tensors))
    except ValueError as wrong:
        if not str(wrong).startswith((f"{op}: out: ", "out: ")):
            return wrong
    except Exception:  # the checks were not made for such a call, and say nothing about it
        pass
    return error


def _names_an_op(message: str, op: str) -> bool:
    """Whether a sentence begins with an op's name. Dynamo traces this, and cannot trace `re`."""
    name, colon, _ = message.partition(": ")
    namespace, colons, own = name.partition("::")
    return bool(colon) and (name == op or (bool(colons) and namespace.isidentifier() and own.isidentifier()))


def check_numbers(parameters: Sequence[inspect.Parameter], values: Sequence[Any]) -> None:
    """Raise TypeError if one of a call's numbers is of a wrong type; `explained` names it."""
    for parameter, value in zip(parameters, values, strict=True):
        if not codegen.is_tensor(parameter) and _of_wrong_type(parameter, value) is not None:
            raise TypeError


def answering(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that prepares tensors for ops answer for arguments that it cannot prepare, in the words of ops.

    Its name in messages is its own, or for a method its object's class. While Dynamo traces it is as it was.
    """
    parameters = list(inspect.signature(function).parameters.values())
    is_method = parameters[0].name == "self"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            name = type(args[0]).__name__ if is_method else function.__name__
            if isinstance(error, TypeError) and cast(TracebackType, error.__traceback__).tb_next is None:
                said = str(error).partition("() ")[2]  # the arguments are not those of the function
                raise ArgumentTypeError(f"{name}() {said or error}") from None
            given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
            named = [p for p in parameters[is_method:] if p.name in given]
            if (answer := _answer(name, named, error, [given[p.name] for p in named])) is error:
                raise
            raise answer from error

    # Dynamo counts recompiles by code object: with one for all, models of many kinds of layers would reach its limit.
    of_its_own: Any = call
    of_its_own.__code__ = of_its_own.__code__.replace(co_name=function.__name__)
    return call


def _answer(name: str, parameters: Sequence[inspect.Parameter], error: Exception, values: Sequence[Any]) -> Exception:
    """Return what to raise for a call of a function over ops: what torch says of single tensors gets their names."""
    tensors = {p.name: v for p, v in zip(parameters, values, strict=True) if isinstance(v, Tensor)}

    def validate(_: object) -> None:
        try:
            check(tensors)
        except ValueError as wrong:
            raise in_call_of(name, wrong) from None

    found = explained(name, parameters, validate, error, values)
    if found is not error or _names_an_op(str(error), name) or type(error) not in _OF_PREPARING or not tensors:
        return found
    got = " and ".join(f"{tuple(t.shape)} of {t.dtype}" for t in tensors.values())
    return bad_argument(f"{name}: {', '.join(tensors)}", got=got, expected=f"tensors that fit ({_first_line(error)})")


def _with_stand_in(
    parameters: Sequence[inspect.Parameter], values: Sequence[Any], tensors: Sequence[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Return a call's arguments with an output that has no elements, where it has none."""
    arguments = {p.name: value for p, value in zip(parameters, values, strict=True)}
    if "output" in arguments and arguments["output"] is None:
        arguments["output"] = tensors[0][1].new_empty(0)
    return arguments


def _of_wrong_type(parameter: inspect.Parameter, value: Any) -> str | None:
    """Return what a parameter expects, if the value is not that; `out` and caches may be left out."""
    for kind, expected in _EXPECTED.items():
        if parameter.annotation == kind | None or parameter.name == "output":
            expected += " or None"
            if value is None:
                return None
        elif parameter.annotation is not kind:
            continue
        if kind is Tensor or parameter.name == "output":
            return None if isinstance(value, Tensor) else expected
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"{expected} of 64 bits"
        if isinstance(value, Tensor) and value.requires_grad:
            return f"{expected}, as no gradient goes to it"
        return None if _is_number(kind, value) else expected
    return None


def _is_number(kind: type, value: Any) -> bool:
    """Whether a value is a number of that kind, of numpy, a tensor of one element or a symbol too."""
    if isinstance(value, torch.SymBool):
        return kind is bool
    try:
        return operator.index(value) is not None
    except TypeError:
        if kind is float:
            return hasattr(value, "__float__") and getattr(value, "size", 1) == 1
        return kind is bool and type(value).__name__ in ("bool", "bool_")  # numpy's are no whole numbers
    except RuntimeError:  # a tensor whose number is not there: a fake one, one on meta or under a transform
        return False


def _described(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value) if len(repr(value)) < 40 else f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__module__}.{type(value).__name__}".replace("builtins.", "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _wrong(op: str, name: str, got: str, expected: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{op}: {name}: got {got}, expected {expected}")
