"""Tells of each kernel that Triton compiles."""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

from mamba_ops.ops._triton import _triton


def hook(stack: contextlib.ExitStack, on_compile: Callable[[str], None]) -> None:
    """Call `on_compile` with the kernel's name after each compile, where Triton is installed."""

    def compiled(*_: Any, **kwargs: Any) -> None:
        function = kwargs.get("fn")
        name = getattr(function, "name", None) or str(kwargs.get("repr", "a kernel"))
        if not name.rpartition(".")[2].startswith("triton_"):  # those are Inductor's own
            on_compile(name.rpartition(".")[2])

    if importlib.util.find_spec("triton") is not None:
        stack.enter_context(_triton.hook(_triton.COMPILED, compiled, "the audit does not see what Triton compiles"))
