"""Which layout a cache is in, where the kernels of an op disagree about it.

A backend may keep in a cache what others would not understand there, and say so: `implements(..., layouts=...)`. Such
an op remembers of every cache who wrote it, and no kernel is given one that is in a layout other than its own. Ops on
which all backends agree, the usual case, pay nothing for this.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mamba_ops.registry.tables import lock

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
    from mamba_ops.registry.op import Op

Layout = str | Callable[..., str | None] | None

_OWN = "the op's own layout"


class _Written(NamedTuple):
    storage: StorageWeakRef
    layout: str | None
    backend: str


_written: dict[int, _Written] = {}  # by the address at which a cache begins
_renewals = 0


def renewals() -> int:
    """Return how often caches were renewed: what was recorded before a renewal must not be replayed after it."""
    return _renewals


def disputed(op: "Op[...]", device_type: str) -> frozenset[str]:
    """Return the names of the caches of which some kernel on such a device keeps a layout of its own."""
    return frozenset(
        name
        for kernel in op.kernels.values()
        if kernel.layouts and (kernel.backend.devices is None or device_type in kernel.backend.devices)
        for name in kernel.layouts
    )


def why_not(kernel: "Kernel", names: frozenset[str], arguments: Mapping[str, Any]) -> str | None:
    """Return in which other layout one of the caches is, or None."""
    for name, cache in _caches(names, arguments):
        before, mine = _written.get(cache.data_ptr()), _layout(kernel, name, arguments)
        if before is not None and not before.storage.expired() and before.layout != mine:
            return (
                f"keeps {name} in {mine or _OWN}, and {before.backend} wrote this one in {before.layout or _OWN}; "
                "give it new caches, or these after mamba_ops.registry.renew_caches()"
            )
    return None


def remember(kernel: "Kernel", names: frozenset[str], arguments: Mapping[str, Any]) -> None:
    """Note that the kernel writes these caches."""
    for name, cache in _caches(names, arguments):
        layout, before = _layout(kernel, name, arguments), _written.get(cache.data_ptr())
        if before is None or before.storage.expired() or before.backend != kernel.backend.name:
            with lock:
                for address in [a for a, written in _written.items() if written.storage.expired()]:
                    del _written[address]
                storage = StorageWeakRef(cache.untyped_storage())
                _written[cache.data_ptr()] = _Written(storage, layout, kernel.backend.name)


def renew(caches: Iterable[Tensor]) -> None:
    """Zero caches, and forget who wrote them."""
    global _renewals
    with torch.no_grad(), lock:
        _renewals += 1
        for cache in caches:
            cache.zero_()
            _written.pop(cache.data_ptr(), None)


def _caches(names: frozenset[str], arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    found = ((name, arguments[name]) for name in sorted(names))
    return [(name, cache) for name, cache in found if cache is not None and cache.numel()]


def _layout(kernel: "Kernel", name: str, arguments: Mapping[str, Any]) -> str | None:
    layout = kernel.layouts.get(name)
    return layout(**arguments) if callable(layout) else layout
