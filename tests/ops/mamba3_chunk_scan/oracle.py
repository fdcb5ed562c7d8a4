"""Mamba-3's recurrence over whole sequences, token by token."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.mamba3 import Recurrence


def mamba3_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    cu_seqlens: Tensor | None = None,
    angle_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    k_state: Tensor | None = None,
    v_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
    rounds_more: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Return (output, angle_state, ssm_state, k_state, v_state), all new; a cache that is left out stays so.

    Computed in `dtype`; with `operands` k and q are rounded to that dtype before they are multiplied. With
    `rounds_more` angles are off, see `Head`.
    """
    caches = (angle_state, ssm_state, k_state, v_state)
    options |= {"dtype": dtype, "operands": operands, "rounds_more": rounds_more}
    run, before = (Recurrence((x, dt, A, trap, angles, B, C), caches, **options) for _ in range(2))
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    for row in range(x.shape[0] if ends is None else len(ends) - 1):
        slot = row if slots is None else int(slots.reshape(slots.shape[0], -1)[row, 0])
        padding = slots is not None and (slot < 0 or slot == null_slot)
        target = slot if write_slots is None else int(write_slots.reshape(write_slots.shape[0], -1)[row, 0])
        is_kept = write_slots is None or (target >= 0 and target != null_slot)
        places = [(row, t) for t in range(x.shape[1])] if ends is None else list(range(ends[row], ends[row + 1]))
        goes_on = has_initial_state is not None and has_initial_state[row] and not padding
        heads = before.begin(slot if goes_on else None)
        for at in places:
            if padding:
                run.output[at] = 0
            else:
                run.read(heads, at)
        if not padding and is_kept and (places or target != slot):
            run.keep(heads, target)
    return (run.output, *run.states)
