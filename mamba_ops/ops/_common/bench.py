"""What ops say of their benchmarks: cases, the sizes of the layers that these are of, how rows and slots lie."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import Op, use_backend

LARGE, SMALL, TINY = "large", "small", "tiny"
"""Layers of the largest models; what a CPU takes milliseconds for; what Triton's interpreter runs in seconds."""
MAMBA1 = {LARGE: (8192, 16, 256), SMALL: (512, 16, 16), TINY: (16, 16, 8)}
"""Channels, size of the state, rank of the steps. Large: Falcon-Mamba 7B."""
MAMBA2 = {LARGE: (128, 64, 128, 8, 256), SMALL: (16, 32, 64, 1, 64), TINY: (4, 16, 16, 2, 16)}
"""Heads, channels of each, size of the state, groups, chunk. Large: Codestral Mamba 7B."""
CHANNELS = {LARGE: 10240, SMALL: 640, TINY: 48}
"""Of the convolution of the same layer."""
WIDTH = 4
LONG, SHORT = [((4096,),), ((1024,) * 16,)], [((256,),), ((64,) * 4,)]
"""Lengths of sequences, as `by_scale` takes them."""
COLD_BYTES = 256 << 20  # distinct state that is touched before any is touched again: more than a GPU's L2 cache holds
MOST_TABLES = 2048

Call = Callable[[Mapping[str, Tensor], Any], Any]
"""From the caches, which it updates, and a slot table (None for an op without) to the output; all else is bound."""


class Calls(NamedTuple):
    """A contestant's call as it is checked, caches and all, and as it is timed."""

    checked: Call
    timed: Call


class NotTaken(ValueError):
    """A peer does not take such a case; the message says what."""


@dataclass(frozen=True)
class Case:
    """One set of inputs of an op: the call of it, what it should give, and the least that it takes.

    Attributes:
        op, name: whose call, and what is particular about it.
        arguments: of the op by name, but for its caches and out; `slots`, if it has them, is the first of the tables.
        caches: by the names of the arguments, what the op reads and writes besides. Slot 0 is in no table.
        out: for the output.
        tables: slot tables without a common slot, for calls one after the other; None stands for all of the caches.
        reads_caches: whether a call reads them; else it writes them alone.
        products: floating-point operations of matrix products, the fewest.
        exponentials: how many, the fewest.
        angles: names of caches that hold angles, which are compared on the circle.
        inside: for a composed op, the ops that it is made of: it runs on the backends that have kernels for them.
    """

    op: Op[...]
    name: str
    arguments: Mapping[str, Any]
    caches: Mapping[str, Tensor]
    out: Tensor
    tables: tuple[Tensor | None, ...] = (None,)
    reads_caches: bool = True
    products: int = 0
    exponentials: int = 0
    angles: tuple[str, ...] = ()
    inside: tuple[Op[...], ...] = ()

    @property
    def cache(self) -> Tensor:
        """The only cache, or the first."""
        return next(iter(self.caches.values()))

    @property
    def rows(self) -> int:
        """How many slots a call names."""
        return len(self.cache if self.tables[0] is None else self.tables[0])

    @property
    def bytes(self) -> int:
        """The fewest that one call can move: every input read once, every result written once."""
        given = nbytes(*(value for value in self.arguments.values() if isinstance(value, Tensor)), self.out)
        state = sum(nbytes(cache[0]) for cache in self.caches.values())
        return given + (1 + self.reads_caches) * (self.rows * state if state else 0)

    def named(self, cache: Tensor) -> Tensor:
        """Return a copy of the rows of a cache that the first table names, in its order."""
        return cache.clone() if self.tables[0] is None else cache[self.tables[0].long()]

    def ours(self) -> Call:
        """Return our op's call, on the backend that is selected when it is called."""
        given = {name: value for name, value in self.arguments.items() if name != "slots"} | {"out": self.out}

        return lambda caches, slots: self.op(**given, **caches, **({} if slots is None else {"slots": slots}))

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and the caches' rows after it, in the order of the first table: the reference's, in
        float64."""

        def wide(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        caches = {name: self.named(cache).double() for name, cache in self.caches.items()}
        given = {name: wide(value) for name, value in self.arguments.items()}
        if (table := self.tables[0]) is not None:
            given["slots"] = torch.arange(self.rows, dtype=table.dtype, device=table.device)
        with use_backend("torch"):
            return self.op(**given, **caches), caches


Build = Callable[[torch.device], Case]
Arrange = Callable[[Case, Callable[[str], Any]], Call | Calls]
"""Makes a peer's call of a case, with a function that imports a module of the peer, or raises ImportError. It arranges
the inputs as the peer's own layers do, and raises `NotTaken` for a case that the peer does not take."""


def by_scale(build: Callable[..., Case], *, large: Iterable[Any], small: Iterable[Any]) -> Callable[[str], list[Build]]:
    """Return what lists the cases of a scale, of the arguments that stand before the device."""
    return lambda scale: [partial(build, *each, scale=scale) for each in (large if scale == LARGE else small)]


def scale_of(device: torch.device) -> str:
    """Return the scale at which benchmarks of Triton kernels run: on a CPU these are interpreted."""
    return TINY if device.type == "cpu" else LARGE


def nbytes(*tensors: Tensor) -> int:
    """Return how many bytes tensors have."""
    return sum(t.numel() * t.element_size() for t in tensors)


def random(*shape: int, device: torch.device) -> Tensor:
    """Return normally distributed activations: bfloat16, which neither a CPU nor Triton's interpreter has the products
    of; float32 on a CPU."""
    return torch.randn(shape, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)


def spread(tokens: int, sequences: int) -> tuple[int, ...]:
    """Return the lengths of so many sequences, which differ by one token at most."""
    return tuple(tokens * (i + 1) // sequences - tokens * i // sequences for i in range(sequences))


def packed(lengths: tuple[int, ...], device: torch.device, *, carried: bool = False) -> dict[str, Any]:
    """Return where sequences of these lengths lie, their slots, and if they go on from states, that they do."""
    rows = len(lengths)
    return {
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        "slots": torch.arange(1, rows + 1, dtype=torch.int32, device=device),
        "has_initial_state": torch.ones(rows, dtype=torch.bool, device=device) if carried else None,
    }


def batched(case: Case) -> int:
    """Return how many sequences there are, all of one length.

    Raises:
        NotTaken: they differ.
    """
    lengths = set(case.arguments["cu_seqlens"].diff().tolist())
    if len(lengths) > 1:
        raise NotTaken("takes a dense batch, and the sequences differ in length")
    return case.rows


def channel_major(case: Case, *names: str) -> Case:
    """Return a case on the same numbers with a channel's tokens contiguous in these arguments and the output."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t()

    arguments = {name: moved(value) if name in names else value for name, value in case.arguments.items()}
    return replace(case, name=f"{case.name}, channel-major", arguments=arguments, out=moved(case.out))


def slot_tables(rows: int, row_bytes: int, device: torch.device) -> tuple[int, tuple[Tensor, ...]]:
    """Return the slots that a cache needs, and random tables into it, each in memory of its own as an engine's is.

    A round through all of them touches COLD_BYTES, so that no call finds its state in the L2 cache. Slot 0 is in none.
    """
    count = 2 if device.type == "cpu" else min(max(2, -(-COLD_BYTES // (rows * row_bytes))), MOST_TABLES)
    permutation = 1 + torch.randperm(count * rows, device=device).to(torch.int32)
    return 1 + count * rows, tuple(table.clone() for table in permutation.view(count, rows))


def of_tokens(tokens: int, sequences: int, *more: str) -> str:
    """Return what a case of whole sequences is called."""
    return ", ".join([f"{tokens} tokens", *([f"{sequences} sequences"] if sequences > 1 else []), *more])


def of_rows(rows: int) -> str:
    """Return what a case of decode is called."""
    return f"{rows} row{'s' * (rows > 1)}"
