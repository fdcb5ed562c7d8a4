"""The backend `cpp`: our kernels in C++ for CPUs, built at their first use, by name only."""

from mamba_ops.registry import Backend


def _usable() -> str | None:
    from mamba_ops.ops._cpp import build

    return build.why_no_compiler()


cpp = Backend("cpp", devices=("cpu",), requires="ctypes", install="python", usable=_usable, priority=-10)
