"""The selection token: what keys a captured graph to the selection that it was captured under.

CUDA-graph recordings made by Inductor must not outlive the selection that they recorded. Inductor keys them on
symbolic sizes, so each call in a compiled graph takes a zero-element tensor whose size names the selection: after a
swap the size is another one and Inductor records anew; after swapping back it is the old one and replays.
"""

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_FIRST = 1_000_003  # the first token's size: large and odd, so that no real size shares its symbol in a graph


class _Tokens:
    """One token per device in use, as an attribute (`cpu`, `cuda_0`): a graph reads an attribute as an input."""


_tokens = _Tokens()
_numbers: dict[Hashable, int] = {}
_lock = threading.RLock()
_selection: Callable[[], Hashable] = tuple  # names the selection in force; asked only if there is a token to make


def token(device: torch.device) -> Tensor | None:
    """Return the token of a device, for traced code; None where there can be none (export, absent devices)."""
    name = _name(device.type, device.index)
    return None if name is None else getattr(_tokens, name)


def renew(selection: Callable[[], Hashable]) -> None:
    """Give all devices in use the token of another selection; equal selections have equal tokens."""
    global _selection
    with _lock:
        _selection = selection
        for name in vars(_tokens):
            _make(name)


def selection_of(token: Tensor) -> Hashable:
    """Return the selection that a token names."""
    number = (token.shape[0] - _FIRST) // 2
    return next(selection for selection, its in _numbers.items() if its == number)


def _name(device_type: str, index: int | None) -> str | None:
    """Return the attribute that holds a device's token, making it if need be; None where there is no token."""
    if torch.compiler.is_exporting():  # it would become a constant; asked here because traced code is told True by 2.11
        return None
    if device_type != "cpu" and not torch.get_device_module(device_type).is_available():
        return None
    name = device_type if index is None else f"{device_type}_{index}"
    with _lock:
        if not hasattr(_tokens, name):
            _make(name)
    return name


# It runs while tracing, because the tensor must exist before the graph can take it. This is what
# torch.compiler.assume_constant_result does; calling that would import Dynamo with this module.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _make(name: str) -> None:
    number = _numbers.setdefault(_selection(), len(_numbers))
    tensor = torch.empty((_FIRST + 2 * number, 0), device=name.replace("_", ":"))
    torch._dynamo.mark_dynamic(tensor, 0)
    setattr(_tokens, name, tensor)
