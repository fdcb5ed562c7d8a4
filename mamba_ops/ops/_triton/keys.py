"""Keys of Triton's cache that do not depend on what was compiled before.

A kernel's key has the values of the constants that it uses, and those that the functions it calls use. Triton takes
them from a function before it looks for them there, so of a function that was never looked at there are none: a kernel
had one key in a process that had compiled a like one, and another in a fresh one, which compiled it again.
"""

from typing import Any

from mamba_ops.ops._triton import _triton


def settle() -> None:
    """Let Triton look at a function before it takes from it what a key has of it."""

    def look(finder: Any, callee: Any) -> None:
        callee.cache_key  # noqa: B018 - looks for its constants, and keeps them

    consequence = "a kernel on disk may not be found by another process, which compiles it again"
    _triton.call_before(_triton.CALLEE, look, consequence)
