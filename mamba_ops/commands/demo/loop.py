"""A second backend for the demo, as a CPU has one only: the references of both decode ops, row by row.

It is added as any package adds a backend, and refuses what it does not take.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mamba_ops import causal_conv1d_update, selective_state_update
from mamba_ops.registry import Backend, Op

ROWS: dict[Op[...], tuple[str, ...]] = {  # op: its parameters that have one entry a row, if row i is in slot i
    causal_conv1d_update: ("x", "conv_state", "output"),
    selective_state_update: ("ssm_state", "state_scale", "x", "dt", "B", "C", "z", "output"),
}
_REFUSED = ("slots", "write_slots", "cu_seqlens", "num_accepted_tokens", "rounding_seed")


@contextmanager
def loop_backend() -> Iterator[None]:
    """Within the block, there is a backend `loop`, last in the default order."""
    loop = Backend("loop", devices=None, priority=-10)
    try:
        for op in ROWS:
            loop.implements(op, _row_by_row(op), unsupported=_unsupported)
        yield
    finally:
        loop.remove()


def _unsupported(call: Any) -> str | None:
    plain = all(getattr(call, name, None) is None for name in _REFUSED)
    return None if plain else "takes row i in slot i, as many tokens of each row, and no rounding_seed"


def _row_by_row(op: Op[...]) -> Callable[[Any], None]:
    reference = op.kernels["torch"].function

    def run(call: Any) -> None:
        for i in range(len(call.x)):
            tensors = {name: getattr(call, name) for name in ROWS[op]}
            row = {name: tensor if tensor is None else tensor[i : i + 1] for name, tensor in tensors.items()}
            reference(**call._replace(**row)._asdict())

    return run
