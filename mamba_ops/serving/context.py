"""The forward context: layers, caches and plan, for ops that get the name of their layer alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mamba_ops.ops._common.sequences import HasPlan


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """A model's layers and caches by name, and the plan of the step that runs.

    Attributes:
        layers: the layers, as in `mamba_ops.layers`.
        caches: the caches of each layer, such as `StatePool.caches`.
        plan: the step's, the same for all layers. None: no plan, as in a profile run.
    """

    layers: Mapping[str, Any]
    caches: Mapping[str, Sequence[Tensor]]
    plan: HasPlan | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and not hasattr(self.plan, "tensors"):
            got, expected = f"a {type(self.plan).__name__}", "a mamba_ops.serving.Plan, or None"
            raise ValueError(f"ForwardContext: plan: got {got}, expected {expected}")


_current: ContextVar[ForwardContext | None] = ContextVar("forward context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Within the block, in this thread, ops by layer name find their layer in `context`."""
    before = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(before)


def current_context() -> ForwardContext:
    """Return the current context.

    Raises:
        RuntimeError: there is none.
    """
    if (context := _current.get()) is None:
        raise RuntimeError("no forward context: run the model inside `with mamba_ops.serving.forward_context(...)`")
    return context
