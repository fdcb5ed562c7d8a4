"""The memory that a call's arguments are in, to see what the call wrote."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from tests.fuzz.mutations import Arguments, plain

Storages = dict[int, tuple[Tensor, Tensor]]


def value(value: Any) -> Any:
    """Return a copy of what a tensor means, dense."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_meta or value.is_nested:
        return value
    if value.layout is not torch.strided or value.is_quantized:
        return value
    with torch.no_grad():
        return plain(value.detach()).as_subclass(Tensor).resolve_neg().clone()


def address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def storages(arguments: Arguments) -> Storages:
    """Return each block of memory that the arguments are in, as bytes, with a copy."""
    found: Storages = {}
    for value in arguments.values():
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_nested or value.is_quantized:
            continue
        if value.layout is not torch.strided or value.is_meta or not (place := address(value)):
            continue
        memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        found[place] = memory, memory.clone()
    return found


def changed(storages: Storages) -> list[int]:
    return [place for place, (now, was) in storages.items() if not torch.equal(now, was)]


def owners(places: list[int], arguments: Arguments) -> list[str]:
    return [n for n, a in arguments.items() if isinstance(a, Tensor) and address(a) in places]
