"""The backend `triton`: one source for CUDA, ROCm and XPU; interpreted on the CPU, by name only."""

import os
from contextlib import suppress

from mamba_ops.registry import Backend
from mamba_ops.registry.jit import announce


def _interpreted_on() -> tuple[str, ...]:
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


def _watch_compiler() -> None:
    """Announce to `no_jit` what Triton is about to compile; kernels run without this too."""
    from mamba_ops.ops._triton.watch import watch

    with suppress(RuntimeWarning):  # where warnings are errors, one does not disable the backend
        watch(announce)


triton = Backend(
    "triton",
    devices=("cuda", "xpu"),
    devices_by_name=_interpreted_on,
    requires="triton",
    install="mamba-ops[triton]",
    priority=20,
    prepare=_watch_compiler,
)
