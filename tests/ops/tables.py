"""For each op a file of its own: bugs to plant in its kernel.

`BUGS` (and `SLOW_BUGS`, which take long to interpret) map a bug to a piece of the kernel's text and what to put there;
of a composed op the text is the op's own and `batch_of`'s. `KERNEL_BUGS` are for a Triton kernel that it has beside.
`SEEN_BY` names the sample to try first for a bug that others take long not to see.
"""

import importlib
from types import ModuleType

from mamba_ops.registry import Op


def tables_of(op: Op[...]) -> ModuleType:
    """The file of an op."""
    return importlib.import_module(f"tests.ops.{op.name}.planted_bugs")
