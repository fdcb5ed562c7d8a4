"""Samples of calls, right and wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of an op, by its front's arguments.

    Attributes:
        name: what is particular about it, in a word or two.
        args, kwargs: the call; tensors in it may be views with padding around them.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def clone(self) -> "Sample":
        """Return the same call on copies of its tensors; views keep their strides and the padding around them."""
        copies: dict[int, Tensor] = {}
        return Sample(
            self.name,
            tuple(_copy(a, copies) for a in self.args),
            {name: _copy(a, copies) for name, a in self.kwargs.items()},
        )

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Sample":
        """Return the same call with its floating tensors in another dtype, and all of them on another device."""

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device or value.device, dtype if value.is_floating_point() else value.dtype)

        args = tuple(convert(a) for a in self.args)
        return Sample(self.name, args, {name: convert(a) for name, a in self.kwargs.items()})


@dataclass(frozen=True)
class ErrorInput:
    """A wrong call of an op, made of a sample by changing one argument.

    Attributes:
        sample: name of the sample.
        argument: the argument to change.
        change: returns what to pass for it, given what the sample passes (the allocated output, for `out`).
        error: how the message begins after the op's name, a regular expression.
    """

    sample: str
    argument: str
    change: Callable[[Any], Any]
    error: str


def _copy(value: Any, copies: dict[int, Tensor]) -> Any:
    """Copy a tensor's whole storage once and take the same view of it."""
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if (whole := copies.get(id(value))) is None:
        flat = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)
        whole = copies[id(value)] = flat.clone().as_strided(value.shape, value.stride(), value.storage_offset())
    return whole
