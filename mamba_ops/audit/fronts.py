"""Functions of mamba_ssm, causal_conv1d, fla and vLLM that a model imports itself, and those of ours in their place.

`use_mamba_ops` binds modeling files of Transformers. What a model's own file imports, it does not: there the functions
of `mamba_ops.compat` take the place, which have the same names and arguments.
"""

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import nn

_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm", "vllm")
_BY_LAYER = ("gdn_attention_core_xpu", "mamba_mixer", "mamba_mixer2", "short_conv")  # vLLM's ops by the name of a layer
_COMPAT = "mamba_ops.compat"


def fronts(model: Any) -> dict[str, str]:
    """Return the functions of those packages that a model's code calls, each with ours for it, or ""."""
    found = {}
    for holder, name in _held(model):
        function = vars(holder)[name]
        found[f"{function.__module__}.{function.__name__}"] = _front(function)[0]
    for names in _names_in_code(model).values():
        if {"ops", "vllm"} <= names:
            for op in sorted(names.intersection(_BY_LAYER)):
                found[f"torch.ops.vllm.{op}"] = f"torch.ops.mamba_ops_vllm.{op}"
    return dict(sorted(found.items()))


@contextlib.contextmanager
def in_place(model: Any) -> Iterator[bool]:
    """Within the block, the model's code calls our functions in place of theirs; False if there are none."""
    with contextlib.ExitStack() as stack:
        bound = False
        for holder, name in _held(model):
            front = _front(vars(holder)[name])[1]
            if front is not None:
                stack.enter_context(mock.patch.object(holder, name, front))
                bound = True
        yield bound


def _held(model: Any) -> list[tuple[types.ModuleType, str]]:
    """Return where the functions are: the files that import them, and theirs where they are called as attributes."""
    held = []
    for file, called in _names_in_code(model).items():
        for name in sorted(called):
            value = vars(file).get(name)
            if _is_kernel(value):
                held.append((file, name))
            elif isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in _PACKAGES:
                held += [(value, other) for other in sorted(called) if _is_kernel(vars(value).get(other))]
    return held


def _names_in_code(model: Any) -> dict[types.ModuleType, set[str]]:
    """Return the files of a model's classes, or of a function, each with the names that its code uses."""
    owners = {type(module) for module in model.modules()} if isinstance(model, nn.Module) else {model}
    names: dict[types.ModuleType, set[str]] = {}
    for owner in owners:
        file = sys.modules.get(getattr(owner, "__module__", None) or "")
        if file is None or file.__name__.partition(".")[0] in ("torch", "transformers", "mamba_ops"):
            continue  # those of Transformers are bound by use_mamba_ops
        helpers = [value for value in vars(file).values() if getattr(value, "__module__", "") == file.__name__]
        functions = [value for value in helpers if isinstance(value, types.FunctionType)]
        for function in (owner, *functions):
            names.setdefault(file, set()).update(_names(function))
    return names


def _names(owner: Any) -> set[str]:
    """Return the names in the code of a function, or of a class's methods."""
    members = [inspect.unwrap(one) for one in vars(owner).values() if callable(one)] if inspect.isclass(owner) else []
    codes = [code for one in (owner, *members) if isinstance(code := getattr(one, "__code__", None), types.CodeType)]
    found: set[str] = set()
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found


def _is_kernel(value: Any) -> bool:
    """Whether a value is a function of one of the packages that runs kernels."""
    parts = str(getattr(value, "__module__", "")).split(".")
    runs_kernels = parts[0] == "causal_conv1d" or "ops" in parts
    return parts[0] in _PACKAGES and runs_kernels and callable(value) and not inspect.isclass(value)


def _front(function: Any) -> tuple[str, Any]:
    """Return the name of the function that takes another's place, and itself; "" and None if there is none."""
    package = function.__module__.partition(".")[0]
    front = getattr(importlib.import_module(f"{_COMPAT}.{package}"), function.__name__, None)
    return (f"{_COMPAT}.{package}.{function.__name__}", front) if callable(front) else ("", None)
