"""Whether kernels may be compiled now: `no_jit()` forbids it, and so does a graph that is being captured.

Backends whose kernels are compiled when they are first called tell `announce` before they do. A call whose kernels are
loaded looks at nothing here.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba_ops.registry import errors
from mamba_ops.registry.capture import is_capturing
from mamba_ops.registry.dispatcher import dispatcher

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
    with _in_mode("warn" if warn else "1"):
        yield


@contextmanager
def allow_jit() -> Iterator[None]:
    """Within the block, kernels may be compiled whatever the environment says: this is the warm-up."""
    with _in_mode(""):
        yield


@contextmanager
def _in_mode(mode: str) -> Iterator[None]:
    before = _mode.get()
    _mode.set(mode)
    try:
        yield
    finally:
        _mode.set(before)


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
    op, remedy = _call() or ("no op of the registry", "call it once beforehand")
    sentence = f"{op}: kernel {kernel} would be compiled or loaded now, and {by}: {cause}; beforehand: {remedy}"
    if mode == "warn":
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    else:
        raise errors.CompilationError(sentence)


def _environment() -> tuple[str, str]:
    """What `<NAMESPACE>_NO_JIT` says, and its name."""
    for name in dispatcher.namespaces:
        switch = f"{name.upper()}_NO_JIT"
        if mode := os.environ.get(switch, ""):
            return mode.lower(), f"{switch}={mode}"
    return "", ""


def current_call() -> "tuple[Op[...], str, Mapping[str, Any]] | None":
    """Return the innermost call of an op that this thread is in: the op, the backend, and the kernel's arguments."""
    loaded = ((op, k) for op in dispatcher.ops.values() for k in op.kernels.values() if "function" in vars(k))
    adapters = {kernel.function.__code__: (op, kernel) for op, kernel in loaded}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (found := adapters.get(frame.f_code)) is not None:
            op, kernel = found
            return op, kernel.backend.name, {p.name: frame.f_locals.get(p.name) for p in op.parameters}
        frame = frame.f_back
    return None


def _call() -> tuple[str, str] | None:
    """The op that is being called, and the warm-up call that would have covered it."""
    if (call := current_call()) is None:
        return None
    op, backend, arguments = call
    device = next(str(a.device) for a in arguments.values() if isinstance(a, Tensor))
    sizes, dtypes = static_sizes(op, arguments)
    pair = ", ".join(f"torch.{str(d).removeprefix('torch.')}" for d in (dtypes.get("dtype"), dtypes.get("state_dtype")))
    given = f", dtypes=[({pair})]" if len(dtypes) > 1 and "None" not in pair else ""
    given += f", sizes={sizes}" if sizes else ""
    package = __name__.partition(".")[0]
    return (
        op.qualname,
        f"{package}.warm_up({op.qualname.replace('::', '.')}, device={device!r}{given}, backends=[{backend!r}])",
    )


def static_sizes(op: "Op[...]", arguments: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, torch.dtype]]:
    """Return the sizes and dtypes with which an op's samples would be like a call: what samples are functions of.

    Found by asking for samples twice as large in one size, and seeing what grows.
    """
    sizes: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    if (before := _base(op)) is None:
        return sizes, dtypes
    more = _dims(arguments, "output") - _dims(before, "output")  # a packed call has one dimension less than a batch
    for name, p in inspect.signature(op.sampler).parameters.items():
        other: Any = torch.float64 if isinstance(p.default, torch.dtype) else None
        if isinstance(p.default, int):
            other = 2 * p.default
        if other is None or (after := _base(op, **{name: other})) is None:
            continue
        for argument, value in arguments.items():
            old, new = before.get(argument), after.get(argument)
            if isinstance(other, torch.dtype):
                if isinstance(value, Tensor) and isinstance(new, Tensor) and new.dtype == other:
                    dtypes.setdefault(name, value.dtype)
            elif isinstance(value, Tensor) and isinstance(old, Tensor) and isinstance(new, Tensor):
                same = value.dim() - old.dim() in (0, more)
                for axis in range(-1, -1 - min(value.dim(), old.dim()) * same, -1):
                    if (old.shape[axis], new.shape[axis]) == (p.default, other):
                        sizes.setdefault(name, value.shape[axis])
            elif isinstance(value, int) and (old, new) == (p.default, other):
                sizes.setdefault(name, value)
    sizes.pop("length", None)
    return sizes, dtypes


def _dims(arguments: Mapping[str, Any], name: str) -> int:
    return arguments[name].dim() if isinstance(arguments.get(name), Tensor) else 0


def _base(op: "Op[...]", **sizes: Any) -> dict[str, Any] | None:
    """The arguments of the op's first sample, if it has samples and some of these sizes."""
    try:
        sample = next(iter(op.sampler(torch.device("meta"), **sizes)))
        return op.bind(sample.args, sample.kwargs)
    except Exception:  # a hint is not worth an error in an op's samples
        return None
