"""Which parts of a model of Transformers do what, as their code shows; and calls that are made instead of theirs."""

import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_OWN = "_mamba_ops_own_forward"
_KEEPS = frozenset(("update_conv_state", "update_recurrent_state"))  # methods of a cache


def mixers_of(names: dict[str, Any], file: str, functions: Iterable[str]) -> list[type[nn.Module]]:
    """Return the classes of a modeling file whose `forward` calls one of these functions."""
    return [
        value
        for value in names.values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == file
        and _calls(value.forward, functions)
    ]


def _calls(forward: Callable[..., Any], functions: Iterable[str]) -> bool:
    """Return whether a `forward` names one of these functions, and takes hidden states."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and not set(functions).isdisjoint(code.co_names) and "hidden_states" in code.co_varnames


def others_of(model: nn.Module, file: str, mixers: Iterable[type[nn.Module]]) -> list[type[nn.Module]]:
    """Return the classes of a file that keep states in a cache by code of their own."""
    kinds = {kind for module in model.modules() if (kind := kind_in(module, file)) is not None}
    found = [kind for kind in kinds - set(mixers) if any(map(_keeps_states, vars(kind).values()))]
    return sorted(found, key=lambda kind: kind.__name__)


def _keeps_states(method: object) -> bool:
    code = inspect.unwrap(method).__code__ if isinstance(method, FunctionType) else None
    return code is not None and not _KEEPS.isdisjoint(code.co_names)


def models_of(model: nn.Module, file: str, mixers: Iterable[type[nn.Module]]) -> dict[type[nn.Module], bool]:
    """Return the classes of a file that take tokens and hold mixers, and whether each is an innermost one."""
    kinds = tuple(mixers)
    whole = {
        m: kind for m in model.modules() if (kind := kind_in(m, file)) and _takes_tokens(kind) and _holds(m, kinds)
    }
    return {kind: not any(inner is not m and inner in whole for inner in m.modules()) for m, kind in whole.items()}


def kind_in(module: nn.Module, file: str) -> type[nn.Module] | None:
    """Return a module's class, or the nearest one it is derived from, that a file has: FSDP for one derives its own."""
    return next((kind for kind in type(module).__mro__ if kind.__module__ == file), None)


def _takes_tokens(kind: type[nn.Module]) -> bool:
    return "input_ids" in inspect.signature(kind.forward).parameters


def _holds(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(m, kinds) for m in module.modules())


def call_instead(module: nn.Module, wrap: Callable[..., Any]) -> bool:
    """Wrap the forward that a module has for itself, as hooks of accelerate leave it; return whether it has one.

    It is kept with the module, so that a copy calls its own.
    """
    if "forward" not in vars(module) or _OWN in vars(module):
        return False
    module.__dict__[_OWN] = module.forward

    @functools.wraps(type(module).forward)
    def own(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_OWN](*args, **kwargs)

    own.stands_before_another = True  # type: ignore[attr-defined]  # and so does what wraps it
    module.forward = MethodType(wrap(own), module)
    return True


def put_back(module: nn.Module | None) -> None:
    """Give a module its own forward again, unless it has lost that since, or has got another one around it."""
    if module is None or _OWN not in vars(module):
        return
    if "forward" not in vars(module):
        del module.__dict__[_OWN]
    elif hasattr(module.forward, "stands_before_another"):
        module.forward = module.__dict__.pop(_OWN)
