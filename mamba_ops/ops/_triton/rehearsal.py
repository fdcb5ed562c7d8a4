"""Whether a device can run the kernels of a call: they are compiled, and none of them is launched."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mamba_ops.ops._triton import _triton, launch_config
from mamba_ops.ops._triton.common import INTERPRETED
from mamba_ops.ops._triton.limits import limits_of

_here = threading.local()  # `compiled`: what is called with each kernel that this thread compiles in a rehearsal
_lock = threading.Lock()
_rehearsing = 0  # threads


class _DoesNotRunError(Exception):
    """A kernel does not compile, or the device has too little for it."""


def rehearse(
    function: Callable[..., None], arguments: Mapping[str, Any], device: int, passes: type[Exception]
) -> str | None:
    """Compile the kernels that a call launches; return why the device cannot run them, or "" if it can.

    Tensors are read and written only where a launcher copies into another layout.

    Args:
        function: the kernel's launcher, of the op's arguments by name.
        arguments: of the call.
        device: its index.
        passes: errors that are not about the kernel; they are raised.

    Returns:
        None: it is not known yet, as a kernel was not compiled here (a warm-up has it compiled in another process).
    """
    if INTERPRETED or not _triton.can_replace_run():
        return ""
    missing = False

    def compiled(kernel: Any, name: str) -> None:
        nonlocal missing
        if kernel is None:
            missing = True
        elif (shared := kernel.metadata.shared) > (limit := limits_of(device).shared_memory):
            gpu = launch_config.family(device)
            raise _DoesNotRunError(f"{name} takes {shared:,} bytes of shared memory, and {gpu} has {limit:,}")

    try:
        with _without_launches(compiled, passes):
            function(**arguments)
    except _DoesNotRunError as error:
        return str(error)
    return None if missing else ""


def why_failed(error: Exception) -> str | None:
    """Return what an error says with which Triton refuses a kernel, None for any other error."""
    return _in_words(error) if isinstance(error, _triton.failures()) else None


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


@contextmanager
def _without_launches(compiled: Callable[[Any, str], None], passes: type[Exception]) -> Iterator[None]:
    """Within the block, launches of this thread end when their kernels are compiled."""
    global _rehearsing
    with _lock:
        if _rehearsing == 0:
            _triton.replace_run(_run)
        _rehearsing += 1
    _here.compiled, _here.passes = compiled, passes
    try:
        yield
    finally:
        del _here.compiled
        with _lock:
            _rehearsing -= 1
            if _rehearsing == 0:
                _triton.replace_run(None)


def _run(run: Callable[..., Any], function: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
    """Stand for Triton's method that compiles and launches."""
    if (compiled := getattr(_here, "compiled", None)) is None:  # another thread's launch
        return run(function, *args, warmup=warmup, **kwargs)
    name = getattr(function, "__name__", "a kernel")
    try:
        kernel = run(function, *args, warmup=True, **kwargs)
    except _here.passes:
        raise
    except Exception as error:  # whatever a compiler raises
        gpu = launch_config.family(-1)
        raise _DoesNotRunError(f"{name} does not compile for {gpu}: {_in_words(error)}") from error
    compiled(kernel, name)
    return kernel
