"""Which layout a cache is in, where the kernels of an op disagree about it.

A backend may keep in a cache what others would not understand there, and say so: `implements(..., layouts=...)`. Such
an op remembers which kernel wrote a cache, and gives no kernel a cache that is in another layout than its own. Where
all backends agree on an op's caches, the usual case, this costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import _torch
from mamba_ops.registry.dispatcher import device_of, dispatcher

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
    from mamba_ops.registry.op import Op

_OWN = "the op's own layout"


class _Written(NamedTuple):
    is_alive: Callable[[], bool]
    layout: str
    backend: str


_written: dict[int, _Written] = {}  # by the address at which a cache begins


def renew_caches(*caches: Tensor) -> None:
    """Zero caches and forget which backend wrote them, so that one that keeps another layout may.

    Recordings of torch.compile are made again after it: those from before may run a kernel of the former layout.
    """
    with torch.no_grad(), dispatcher.lock:
        for cache in caches:
            cache.zero_()
            _written.pop(cache.data_ptr(), None)
        dispatcher.renewals += 1
        dispatcher.changed()


def disputed(op: "Op[...]", device_type: str) -> list[str]:
    """Return the names of the caches of which some kernel on such a device keeps a layout of its own."""
    kernels = [kernel for kernel in op.kernels.values() if kernel.backend.is_for(device_type)]
    return sorted({name for kernel in kernels for name in kernel.layouts})


def why_not(kernel: "Kernel", arguments: Mapping[str, Any]) -> str | None:
    """Return in which other layout than the kernel's one of the caches is, or None."""
    for name, cache, layout in _caches(kernel, arguments):
        before = _written.get(cache.data_ptr())
        if before is not None and before.is_alive() and before.layout != layout:
            return (
                f"keeps {name} in {layout}, and {before.backend} wrote this one in {before.layout}; "
                "give it new caches, or these after mamba_ops.registry.renew_caches()"
            )
    return None


def remember(kernel: "Kernel", arguments: Mapping[str, Any]) -> None:
    """Note that the kernel writes these caches."""
    for _, cache, layout in _caches(kernel, arguments):
        before = _written.get(cache.data_ptr())
        if before is None or not before.is_alive() or before.backend != kernel.backend.name:
            with dispatcher.lock:
                for address in [a for a, written in _written.items() if not written.is_alive()]:
                    del _written[address]
                _written[cache.data_ptr()] = _Written(_torch.weak_storage(cache), layout, kernel.backend.name)


def _caches(kernel: "Kernel", arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, str]]:
    """Yield the disputed caches that a call has, each with its name and the layout in which the kernel keeps it."""
    for name in disputed(kernel.op, device_of(arguments).type):
        cache, layout = arguments[name], kernel.layouts.get(name)
        if cache is not None and cache.numel():
            yield name, cache, (layout(**arguments) if callable(layout) else layout) or _OWN
