"""One Mamba-3 layer's recurrence on a mixed batch, from its formulas: token by token."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.mamba3 import Recurrence
from tests.ops.common.mixing import rows_of


def mamba3_mixing(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    B: Tensor,
    C: Tensor,
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    *plan_and_chunk_size: Any,
    null_slot: int = -1,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
    rounds_more: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Return (output, angle_state, ssm_state, k_state, v_state), all new.

    Computed in `dtype`; with `operands` k and q of prefills are rounded to that dtype before they are multiplied. With
    `rounds_more` angles are off, see `Head`.
    """
    *plan, _ = plan_and_chunk_size
    caches = (angle_state, ssm_state, k_state, v_state)
    run = Recurrence((x, dt, A, trap, angles, B, C), caches, dtype=dtype, rounds_more=rounds_more, **options)
    run.output.zero_()
    for row in rows_of(*plan, null_slot=null_slot):
        run.operands = None if row.decodes else operands
        heads = run.begin(row.source if row.goes_on else None)
        if not row.tokens:
            run.keep(heads, row.target)
        for number, token in enumerate(row.tokens):
            run.read(heads, token)
            run.keep(heads, row.targets[number])
    return (run.output, *run.states)
