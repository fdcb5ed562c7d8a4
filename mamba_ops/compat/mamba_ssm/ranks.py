"""The names of mamba_ssm.distributed that its mixers import, for one rank: what is called of them is refused.

A mixer without a process group calls none of them.
"""

from typing import Any, NoReturn

from torch import nn

_INSTEAD = "no process group; split a layer of mamba_ops.layers with mamba_ops.distributed.tensor_parallel"


def all_reduce(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: there is one rank."""
    raise ValueError(f"all_reduce: process_group: got one, expected {_INSTEAD}")


def reduce_scatter(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: there is one rank."""
    raise ValueError(f"reduce_scatter: process_group: got one, expected {_INSTEAD}")


class _Split(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{type(self).__name__}: process_group: got one, expected {_INSTEAD}")


class ColumnParallelLinear(_Split):
    """Refused: there is one rank."""


class RowParallelLinear(_Split):
    """Refused: there is one rank."""
