"""Our own Triton kernels: one source for CUDA, ROCm and XPU; interpreted on the CPU if asked for by name."""

import os

from mamba_ops.registry import Backend
from mamba_ops.registry.jit import announce


def _interpreted_on() -> tuple[str, ...]:
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


def _watch_compiler() -> None:
    """Let Triton say when it is about to compile a kernel, to whoever forbids that."""
    from mamba_ops.ops._triton.watch import watch

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
