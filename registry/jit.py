"""Whether kernels may be compiled now: `no_jit()` forbids it, and so does a graph that is being captured.

A backend that compiles a kernel at its first call tells `announce` beforehand. Calls of loaded kernels ask nothing.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING

import torch

from mamba_ops.registry import errors
from mamba_ops.registry.capture import is_capturing
from mamba_ops.registry.dispatcher import device_of, dispatcher, within

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op

_mode: ContextVar[str | None] = ContextVar("no_jit", default=None)  # of the innermost no_jit() or allow_jit()


@contextmanager
def no_jit(*, warn: bool = False) -> Iterator[None]:
    """Within the block, in this thread or asyncio task, a kernel that would be compiled, tuned or loaded raises.

    A kernel that was called before, or warmed up, runs as always, at no cost. `MAMBA_OPS_NO_JIT=1` does the same for a
    process, `MAMBA_OPS_NO_JIT=warn` as `warn` does. While a graph is captured this is forbidden in any case.

    Args:
        warn: warn and go on instead of raising.

    Raises:
        CompilationError: from the call inside: which kernel, which argument asked for a variant of its own, and the
            warm-up that would have covered it. Nothing has been written then by that kernel.
    """
    with within(_mode, "warn" if warn else "1"):
        yield


def allow_jit() -> AbstractContextManager[None]:
    """Within the block, kernels may be compiled whatever the environment says: this is the warm-up."""
    return within(_mode, "")


def announce(kernel: str, cause: str) -> None:
    """Raise, or warn, if no kernel may be compiled now; called by a backend that is about to compile or to load one.

    Args:
        kernel: its name.
        cause: why it is not there yet: the argument that asks for a variant of its own.
    """
    if is_capturing():
        mode, by = "1", "a graph is being captured"
    elif (innermost := _mode.get()) is not None:
        mode, by = innermost, "no_jit() is active"
    else:
        mode, by = _environment()
    if mode in ("", "0"):
        return
    name, remedy = "no op of the registry", "call it once"
    if (call := current_call()) is not None:
        op, backend, device = call
        name, short = op.qualname, op.qualname.replace("::", ".")
        package = __name__.partition(".")[0]
        remedy = f"{package}.warm_up({short}, device={str(device)!r}, backends=[{backend!r}])"
        remedy += " with this call's sizes and dtypes"
    sentence = f"{name}: kernel {kernel} would be compiled or loaded now, and {by}: {cause}; beforehand: {remedy}"
    if mode != "warn":
        raise errors.CompilationError(sentence)
    warnings.warn(sentence, RuntimeWarning, stacklevel=2)


def _environment() -> tuple[str, str]:
    """What `<NAMESPACE>_NO_JIT` says, and its name."""
    for name in dispatcher.namespaces:
        switch = f"{name.upper()}_NO_JIT"
        if mode := os.environ.get(switch, ""):
            return mode.lower(), f"{switch}={mode}"
    return "", ""


def current_call() -> "tuple[Op[...], str, torch.device] | None":
    """Return the innermost call of an op that this thread is in: the op, the backend, and the device."""
    loaded = [(op, k) for op in dispatcher.ops.values() for k in op.kernels.values() if "function" in vars(k)]
    adapters = {id(kernel.function.__code__): (op, kernel) for op, kernel in loaded}  # codes of two may be equal
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (found := adapters.get(id(frame.f_code))) is not None:
            op, kernel = found
            return op, kernel.backend.name, device_of(frame.f_locals)
        frame = frame.f_back
    return None
