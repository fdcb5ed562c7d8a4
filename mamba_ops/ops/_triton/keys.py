"""Keys of Triton's cache that do not depend on what was compiled before.

A kernel's key has the values of the constants in its source and in that of the functions that it calls. For a called
function Triton copies its list of constants first and reads its source, which fills the list, second. So the list is
empty unless the source was read before, for another kernel: the same kernel had one key in a process that had compiled
a like one, and another key in a fresh process, which compiled it again.
"""

from typing import Any

from mamba_ops.ops._triton import _triton


def settle() -> None:
    """Have Triton read the source of a called function before it copies that function's constants."""

    def read(finder: Any, callee: Any) -> None:
        callee.cache_key  # noqa: B018 - reads the source, and keeps the constants

    consequence = "a kernel on disk may not be found by another process, which compiles it again"
    _triton.call_before(_triton.CALLEE, read, consequence)
