"""Samples of calls, right and wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of an op, by its front's arguments; tensors in it may be views with padding around them."""

    name: str  # what is particular about it, in a word or two
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def clone(self) -> "Sample":
        """Return the same call on copies of its tensors; views keep their strides and the padding around them."""
        copies: dict[int, Tensor] = {}
        return self._with(lambda tensor: _copy(tensor, copies))

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "Sample":
        """Return the same call with its floating tensors in another dtype, and all of them on another device."""
        return self._with(lambda t: t.to(device or t.device, dtype if t.is_floating_point() else t.dtype))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Sample":
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Sample(self.name, tuple(map(changed, self.args)), {n: changed(v) for n, v in self.kwargs.items()})


@dataclass(frozen=True)
class ErrorInput:
    """A wrong call of an op, made of a sample by changing one argument."""

    sample: str  # its name
    argument: str  # the one to change
    change: Callable[[Any], Any]  # returns what to pass, given what the sample passes (for `out`, an allocated output)
    error: str  # how the message begins after the op's name, a regular expression


def _copy(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """Copy a tensor's whole storage, once, and take the same view of it."""
    if id(tensor) not in copies:
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        copies[id(tensor)] = flat.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return copies[id(tensor)]
