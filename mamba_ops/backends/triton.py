"""The backend `triton`: one source for CUDA, ROCm and XPU; interpreted on the CPU, by name only."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mamba_ops.registry import Backend, RegistryError
from mamba_ops.registry.adapters import Recognised, Shortcut
from mamba_ops.registry.dispatcher import device_of
from mamba_ops.registry.jit import announce


def _interpreted_on() -> tuple[str, ...]:
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


def _watch_compiler() -> None:
    """Announce to `no_jit` what Triton is about to compile; kernels run without this too."""
    from mamba_ops.ops._triton.watch import watch

    with suppress(RuntimeWarning):  # where warnings are errors, one does not disable the backend
        watch(announce)


def _rehearse(function: Callable[..., None], arguments: Mapping[str, Any]) -> str | None:
    from mamba_ops.ops._triton.rehearsal import rehearse

    device = device_of(arguments)
    return rehearse(function, arguments, -1 if device.index is None else device.index, RegistryError)


def _why_failed(error: Exception) -> str | None:
    from mamba_ops.ops._triton.rehearsal import why_failed

    return why_failed(error)


def _shortcut(function: Callable[[Any], None], recognised: Recognised) -> Shortcut | None:
    from mamba_ops.ops._triton.prepared import prepared

    return prepared(function, recognised)


triton = Backend(
    "triton",
    devices=("cuda", "xpu"),
    devices_by_name=_interpreted_on,
    requires="triton",
    install="mamba-ops[triton]",
    priority=20,
    prepare=_watch_compiler,
    rehearse=_rehearse,
    why_failed=_why_failed,
    shortcut=_shortcut,
)
