"""For each op a file of its own: bugs to plant in it, and calls of it that are wrong.

`BUGS` (and `SLOW_BUGS`, which take long to interpret) map a bug to a piece of the kernel's text and what to put there;
a composed op has no kernel, there the text is the op's own and `batch_of`'s. `BAD_INPUT` lists wrong calls.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mamba_ops.registry import Op

BadInput = tuple[str, str, Callable[[Any], Any], str]
"""Name of a sample, which argument to change, how, and how the error begins (a regular expression)."""


def tables_of(op: Op[...]) -> ModuleType:
    """The file of an op."""
    return importlib.import_module(f"tests.ops.{op.name}.planted_bugs")
