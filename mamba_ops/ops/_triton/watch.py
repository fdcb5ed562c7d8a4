"""Reports every kernel that Triton is about to compile, to load or to tune, and why."""

from collections.abc import Callable
from typing import Any

from mamba_ops.ops._triton import _triton


def watch(announce: Callable[[str, str], None]) -> None:
    """Call `announce(kernel, cause)` before Triton compiles a kernel, or reads it from disk, and before it tunes one.

    A call of a loaded kernel costs nothing. Triton's own hooks are not used: a profiler that sets one for a while and
    then restores what it found may remove another set in between. A Triton that cannot be watched is warned about.
    """

    def load(function: Any, key: str, *_: Any, **__: Any) -> None:
        announce(f"{function.fn.__module__}.{function.fn.__qualname__}", cause(function, key))

    def tune(tuner: Any, *_: Any, **__: Any) -> None:
        keys = ", ".join(map(str, tuner.keys))
        announce(tuner.base_fn.__name__, "it is tuned by timing" + (f", for every {keys}" if keys else ""))

    _triton.call_before(_triton.LOAD, load, "no_jit() does not see that kernels are compiled")
    _triton.call_before(_triton.TUNE, tune, "no_jit() does not see that kernels are tuned")


def cause(function: Any, key: str) -> str:
    """Say which arguments make a variant differ from the one nearest to it that is loaded."""
    known = _triton.variants(function)
    wanted = next((variant for variant in known if variant.key == key), None)
    loaded = [variant for variant in known if variant.loaded]
    if wanted is None or not loaded:
        return "no variant of it is loaded"
    names = [parameter.name for parameter in function.params]

    def differences(variant: _triton.Variant) -> list[str]:
        found = [
            f"{name} is {_in_words(new)}, not {_in_words(old)}"
            for name, new, old in zip(names, wanted.arguments, variant.arguments, strict=False)
            if new != old
        ]
        return found + ([] if wanted.options == variant.options else ["other launch options"])

    nearest = min(map(differences, loaded), key=len)
    return f"{', '.join(nearest)} as in the nearest of {len(loaded)} loaded variants"


def _in_words(specialization: tuple[Any, Any]) -> str:
    """What Triton compiles for, in words."""
    kind, value = specialization
    if kind == "constexpr":
        return repr(value)
    return f"{kind} ({'at a multiple of 16' if value == 'D' else value})" if value else str(kind)
