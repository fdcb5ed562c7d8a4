"""Copies of a model and of its arguments to call, so that an audit leaves the model as it was in every respect."""

import contextlib
import copy
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from mamba_ops.audit.collect import Collector

_T = TypeVar("_T")


@contextlib.contextmanager
def isolated(fn: Any, device: torch.device | None, collector: "Collector") -> Iterator[Any]:
    """Within the block, call the copy that it gives; `fn` is as before after it.

    Where `fn` cannot be copied it is given itself, and put back as far as that goes; the report says so.

    Args:
        fn: a module, a method of one, or a function.
        device: where a module's copy goes; None leaves it where it is.
        collector: is told the names of the copy's layers.
    """
    taken, reason = fn, ""
    try:
        taken = deep_copy(fn)
        if taken is fn and _modules_of(fn):
            reason = "a function reaches it by name"
    except Exception as error:  # whatever a class raises in its __deepcopy__
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    note = (
        f"The model cannot be copied ({reason}), so it was called itself. Its attributes, buffers and requires_grad "
        "were put back; what it wrote to its parameters and to objects that it holds was not."
    )
    if reason and note not in collector.report.notes:
        collector.report.notes.append(note)
    with _put_back(fn):
        if device is not None and isinstance(taken, nn.Module):
            taken = taken.to(device)
        collector.layers.name(taken)
        yield taken


def copied(arguments: _T) -> _T:
    """Return a copy of arguments, or themselves where an object among them cannot be copied."""
    with contextlib.suppress(Exception):
        return deep_copy(arguments)
    return arguments


def deep_copy(value: _T) -> _T:
    """Return a deep copy; results of other computations among the tensors become leaves.

    Raises:
        Exception: whatever an object in it raises when it is copied, such as TypeError for a lock.
    """
    with _CopyResults():
        return copy.deepcopy(value)


class _CopyResults(TorchFunctionMode):
    """Inside, tensors that were computed with a gradient can be copied, as leaves."""

    def __torch_function__(self, func: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _put_back(fn: Any) -> Iterator[None]:
    """Put back what calls changed in the modules that a function holds; a copy may still reach them by a closure."""
    modules = list(dict.fromkeys(module for root in _modules_of(fn) for module in root.modules()))
    attributes = [(module, _snapshot(vars(module))) for module in modules]
    tensors: dict[int, tuple[Tensor, bool, Tensor | None, Tensor | None]] = {}
    for module in modules:
        held = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *held):
            value = None if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
            tensors[id(tensor)] = (tensor, tensor.requires_grad, tensor.grad if tensor.is_leaf else None, value)
    try:
        yield
    finally:
        for module, snapshot in attributes:
            _restore(vars(module), snapshot)
        with torch.no_grad():
            for tensor, requires_grad, gradient, value in tensors.values():
                if tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
                    tensor.grad = gradient
                if value is None or value.is_meta or torch.equal(value, tensor):
                    continue
                if value.shape != tensor.shape:
                    tensor.resize_(value.shape)
                tensor.copy_(value)


def _modules_of(fn: Any) -> list[nn.Module]:
    """Return the modules that a module, a method, a partial or a function reaches."""
    if isinstance(fn, functools.partial):
        return [module for value in (fn.func, *fn.args, *fn.keywords.values()) for module in _modules_of(value)]
    held = [fn, getattr(fn, "__self__", None)]
    if isinstance(fn, types.FunctionType):
        reached = inspect.getclosurevars(fn)
        held += [*reached.nonlocals.values(), *reached.globals.values()]
    return [value for value in held if isinstance(value, nn.Module)]


_Snapshot = list[tuple[Any, Any, Any]]  # of a container: key, value, and what the value held if it is a container too


def _snapshot(attributes: dict[Any, Any]) -> _Snapshot:
    kinds: dict[type, Callable[[Any], Any]] = {dict: dict, OrderedDict: dict, list: list, set: set}
    return [
        (key, value, kinds[type(value)](value) if type(value) in kinds else None) for key, value in attributes.items()
    ]


def _restore(attributes: dict[Any, Any], snapshot: _Snapshot) -> None:
    attributes.clear()
    for key, value, held in snapshot:
        attributes[key] = value
        if held is not None:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(held)
