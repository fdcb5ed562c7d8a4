"""One set of inputs of an op: the call of it, what it should give, and how its rows and slots lie."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import ops, use_backend

COLD_BYTES = 256 << 20  # distinct state that is touched before any is touched again: more than a GPU's L2 cache holds
MOST_TABLES = 2048

Call = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""From the caches, which it updates, and a slot table to the output; everything else is bound."""


@dataclass(frozen=True)
class Case:
    """One set of inputs. Slot 0 of the caches is in no table.

    Attributes:
        op, name: whose call, and what is particular about it.
        arguments: of the op, but for its caches and out; `slots` is the first of the tables.
        caches: by the names of the arguments.
        out: for the output.
        bytes: the fewest that one call can move: every input read once, every result written once.
        tables: slot tables without a common slot, for calls one after the other.
        products: floating-point operations of matrix products, the fewest.
        exponentials: how many, the fewest.
    """

    op: str
    name: str
    arguments: dict[str, Any]
    caches: dict[str, Tensor]
    out: Tensor
    bytes: int
    tables: tuple[Tensor, ...] = field(default=())
    products: int = 0
    exponentials: int = 0

    @property
    def cache(self) -> Tensor:
        """The only cache, or the first."""
        return next(iter(self.caches.values()))

    @property
    def rows(self) -> int:
        """How many slots a call names."""
        return len(self.tables[0])

    def ours(self) -> Call:
        """Return our op's call, on the backend that is selected when it is called."""
        op = ops()[self.op]
        given = {name: value for name, value in self.arguments.items() if name != "slots"} | {"out": self.out}

        def call(caches: Mapping[str, Tensor], slots: Tensor) -> Tensor:
            out: Tensor = op(**given, **caches, slots=slots)
            return out

        return call

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and the caches' rows after it, in the order of the first table: the reference's, in
        float64."""

        def wide(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        table = self.tables[0]
        caches = {name: cache[table.long()].double() for name, cache in self.caches.items()}
        given = {name: wide(value) for name, value in self.arguments.items()}
        given["slots"] = torch.arange(self.rows, dtype=table.dtype, device=table.device)
        with use_backend("torch"):
            return ops()[self.op](**given, **caches), caches


def spread(tokens: int, sequences: int) -> tuple[int, ...]:
    """Return the lengths of so many sequences, which differ by one token at most."""
    return tuple(tokens * (i + 1) // sequences - tokens * i // sequences for i in range(sequences))


def packed(lengths: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Return where sequences of these lengths lie, and their slots."""
    return {
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        "slots": torch.arange(1, len(lengths) + 1, dtype=torch.int32, device=device),
    }


def slot_tables(rows: int, row_bytes: int, device: torch.device) -> tuple[int, tuple[Tensor, ...]]:
    """Return the slots that a cache needs, and random tables into it, each in memory of its own as an engine's is.

    A round through all of them touches COLD_BYTES, so that no call finds its state in the L2 cache. Slot 0 is in none.
    """
    count = 2 if device.type == "cpu" else min(max(2, -(-COLD_BYTES // (rows * row_bytes))), MOST_TABLES)
    permutation = 1 + torch.randperm(count * rows, device=device).to(torch.int32)
    return 1 + count * rows, tuple(table.clone() for table in permutation.view(count, rows))
