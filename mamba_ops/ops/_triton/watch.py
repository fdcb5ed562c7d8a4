"""Tells whoever wants to know of every kernel that Triton is about to compile, to load or to tune, and why."""

from collections.abc import Callable
from typing import Any

from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction


def watch(announce: Callable[[str, str], None]) -> None:
    """Call `announce(kernel, cause)` before Triton compiles a kernel, or reads it from disk, and before it tunes one.

    Once a kernel is loaded, calls of it do not come here. Triton's own hooks are left to others: they are set for a
    while and put back, and would take this with them.
    """
    load, bench = JITFunction._do_compile, Autotuner._bench

    def announced_load(self: Any, key: str, signature: Any, device: int, *args: Any, **kwargs: Any) -> Any:
        announce(f"{self.module}.{self.fn.__qualname__}", cause(self, device, key))
        return load(self, key, signature, device, *args, **kwargs)

    def announced_bench(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys = ", ".join(map(str, self.keys))
        announce(self.base_fn.__name__, f"it is tuned by timing, for every {keys}" if keys else "it is tuned by timing")
        return bench(self, *args, **kwargs)

    JITFunction._do_compile = announced_load
    Autotuner._bench = announced_bench


def cause(function: Any, device: int, key: str) -> str:
    """Say which arguments make a variant differ from the one nearest to it that is loaded."""
    loaded, keys, *_ = function.device_caches[device]
    wanted = next((known for known, name in keys.items() if name == key), None)
    there = [known for known, name in keys.items() if name in loaded]
    if wanted is None or not there:
        return "no variant of it is loaded"
    names = [parameter.name for parameter in function.params]

    def differences(known: Any) -> list[str]:
        found = [
            f"{name} is {_shown(new)}, not {_shown(old)}"
            for name, new, old in zip(names, wanted[0], known[0], strict=True)
            if new != old
        ]
        return found + ([] if wanted[1] == known[1] else ["other launch options"])

    nearest = min((differences(known) for known in there), key=lambda found: len(found))
    return f"{', '.join(nearest)} as in the nearest of {len(there)} loaded variants"


def _shown(specialization: tuple[Any, Any]) -> str:
    """What Triton compiles for, in words."""
    kind, value = specialization
    if kind == "constexpr":
        return repr(value)
    return f"{kind} ({'at a multiple of 16' if value == 'D' else value})" if value else str(kind)
