"""Helpers for the samples and the error inputs of ops."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.slots import slot_columns
from mamba_ops.registry import ErrorInput, Op, Sample


class SampleTensors:
    """Makes tensors for one op's samples, from one seed and on the CPU: the same values on every device.

    Args:
        device: where the tensors go.
        dtype: of floating tensors, if no other is given.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed numbers."""
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def indices(self, *values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        """Return these integers (or flags, with dtype bool); a tuple is a row of a table."""
        return torch.tensor(values, dtype=dtype, device=self.device)


def error_table(*cases: tuple[str, str, Callable[[Any], Any], str]) -> list[ErrorInput]:
    """Return wrong calls: sample, argument, what to pass for it, and the error, a regular expression.

    "got ..." is about this argument; an error about another one begins with its name: "weight: got ...".
    """
    return [
        ErrorInput(sample, argument, change, f"{argument}: {error}" if error.startswith("got ") else error)
        for sample, argument, change, error in cases
    ]


def training_samples(op: "Op[...]", state: str, device: torch.device, **sizes: Any) -> Iterator[Sample]:
    """Yield calls of an op's forward companions, made of its own samples; those that differ in slots alone but once.

    Args:
        op: the op.
        state: its cache. The states that a sample goes on from become `initial_states`.
        device, sizes: as for the op's samples.
    """
    forward = op.forward_states_op
    seen = set()
    for sample in op.make_samples(device, **sizes):
        bound = op.bind(sample.args, sample.kwargs)
        call = {name: bound.get(name) for name in forward.__signature__.parameters}
        if bound["has_initial_state"] is not None:
            final = forward.allocate(**call)[forward.returns.index("final_states")]
            cache, rows = bound[state], final.shape[0]
            slots = torch.arange(rows, device=device)
            if bound["slots"] is not None:
                slots = slot_columns(bound["slots"], rows)[:, 0].clamp(min=0)
            call["initial_states"] = cache[slots][..., : final.shape[-1]]
        key = tuple(_looks(value) for value in call.values())
        if key not in seen:
            seen.add(key)
            yield Sample(sample.name, tuple(call.values()))


def _looks(value: Any) -> Any:
    """What makes a sample's argument another than one of an earlier sample."""
    if not isinstance(value, Tensor):
        return value
    numbers = () if value.is_floating_point() else tuple(value.tolist())
    return value.dtype, value.shape, value.stride(), numbers
