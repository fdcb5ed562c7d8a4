"""Samples of calls, and how far a kernel may be from the truth."""

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


def error_budget(truth: Tensor, low: Tensor, stored: torch.dtype) -> Tensor:
    """Return how far, element by element, a kernel may be from the truth.

    Twice the largest error that the oracle itself makes when it computes in the kernel's precision, plus one rounding
    of the stored dtype: the budget comes from the data, no tolerance is set by hand.

    Args:
        truth: the oracle's result in float64.
        low: the oracle's result computed in float32 and rounded as the kernel's is.
        stored: dtype of the kernel's result.
    """
    finite = torch.isfinite(truth)
    slip = (low.double() - truth)[finite].abs().max() if finite.any() else torch.zeros((), dtype=torch.float64)
    return 2 * slip + torch.finfo(stored).eps * truth.abs() + torch.finfo(stored).tiny


def assert_within_budget(actual: Tensor, truth: Tensor, low: Tensor, what: str = "result") -> None:
    """Raise AssertionError, with the worst element, if a kernel's result is outside `error_budget`."""
    error = (actual.double() - truth).abs()
    budget = error_budget(truth, low, actual.dtype)
    wrong = ~(error <= budget)  # NaN is wrong too
    if wrong.any():
        worst = int((error - budget).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements outside the budget; worst at flat index {worst}: "
            f"got {actual.flatten()[worst].item():.6g}, truth {truth.flatten()[worst].item():.6g}, "
            f"budget {budget.flatten()[worst].item():.3g}"
        )
