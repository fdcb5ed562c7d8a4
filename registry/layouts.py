"""Which layout a cache is in, where the kernels of an op disagree about it.

A backend may keep in a cache what others would not understand there, and say so: `implements(..., layouts=...)`. Such
an op remembers which kernel wrote a cache, and gives no kernel a cache that is in another layout than its own. Ops on
whose caches all backends agree, the usual case, pay nothing for this.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import _torch
from mamba_ops.registry.dispatcher import dispatcher

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
    from mamba_ops.registry.op import Op

Layout = str | Callable[..., str | None] | None

_OWN = "the op's own layout"


class _Written(NamedTuple):
    is_alive: Callable[[], bool]
    layout: str | None
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
    for cache, name, mine in _caches(kernel, names, arguments):
        before = _written.get(cache.data_ptr())
        if before is not None and before.is_alive() and before.layout != mine:
            return (
                f"keeps {name} in {mine or _OWN}, and {before.backend} wrote this one in {before.layout or _OWN}; "
                "give it new caches, or these after mamba_ops.registry.renew_caches()"
            )
    return None


def remember(kernel: "Kernel", names: frozenset[str], arguments: Mapping[str, Any]) -> None:
    """Note that the kernel writes these caches."""
    for cache, _, layout in _caches(kernel, names, arguments):
        before = _written.get(cache.data_ptr())
        if before is None or not before.is_alive() or before.backend != kernel.backend.name:
            with dispatcher.lock:
                for address in [a for a, written in _written.items() if not written.is_alive()]:
                    del _written[address]
                _written[cache.data_ptr()] = _Written(_torch.weak_storage(cache), layout, kernel.backend.name)


def _caches(
    kernel: "Kernel", names: frozenset[str], arguments: Mapping[str, Any]
) -> list[tuple[Tensor, str, str | None]]:
    """Return the caches that a call has, their names, and the layouts in which the kernel keeps them."""
    layouts = ((n, kernel.layouts.get(n)) for n in sorted(names) if arguments[n] is not None and arguments[n].numel())
    return [(arguments[n], n, layout(**arguments) if callable(layout) else layout) for n, layout in layouts]
