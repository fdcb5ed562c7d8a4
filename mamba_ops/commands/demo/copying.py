"""A second backend for the demo, as a CPU has one only: the references of both decode ops, on copies of the arguments.

It is added as any package adds a backend.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mamba_ops import causal_conv1d_update, selective_state_update
from mamba_ops.registry import Backend, Op


@contextmanager
def copying_backend() -> Iterator[None]:
    """Within the block, there is a backend `copying`, last in the default order."""
    copying = Backend("copying", devices=None, priority=-20)
    try:
        for op in (causal_conv1d_update, selective_state_update):
            copying.implements(op, _on_copies(op))
        yield
    finally:
        copying.remove()


def _on_copies(op: Op[...]) -> Callable[[Any], None]:
    reference = op.kernels["torch"].function

    def run(call: Any) -> None:
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call._asdict().items()}
        reference(**copies)
        for name in op.mutates:
            if copies[name] is not None:
                getattr(call, name).copy_(copies[name])

    return run
