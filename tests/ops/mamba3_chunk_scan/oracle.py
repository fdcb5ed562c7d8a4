"""Mamba-3's recurrence over whole sequences, token by token."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.mamba3 import Head


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
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    angle_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    k_state: Tensor | None = None,
    v_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Return (output, angle_state, ssm_state, k_state, v_state), all new; a cache that is left out stays so.

    Computed in `dtype`; with `operands` k and q are rounded to that dtype before they are multiplied.
    """
    exact = dtype == torch.float64
    caches = (angle_state, ssm_state, k_state, v_state)
    states = [None if c is None else c.to(dtype if exact else c.dtype, copy=True) for c in caches]
    output = torch.empty_like(x) if out is None else out
    output = output.to(dtype if exact else output.dtype, copy=True)
    heads, dim = x.shape[-2:]
    dstate, of_one = B.shape[-1], heads // B.shape[-2]
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    for row in range(x.shape[0] if ends is None else len(ends) - 1):
        slot = row if slots is None else int(slots.reshape(slots.shape[0], -1)[row, 0])
        padding = slots is not None and (slot < 0 or slot == null_slot)
        target = slot if write_slots is None else int(write_slots.reshape(write_slots.shape[0], -1)[row, 0])
        is_kept = write_slots is None or (target >= 0 and target != null_slot)
        places = [(row, t) for t in range(x.shape[1])] if ends is None else list(range(ends[row], ends[row + 1]))
        for h in range(heads):
            zeros = (angles.shape[-1], (dim, dstate), dstate, dim)
            head = Head(*(torch.zeros(size, dtype=dtype) for size in zeros), operands)
            if has_initial_state is not None and has_initial_state[row] and not padding:
                head = Head(*(c[slot, h].to(dtype) for c in caches if c is not None), operands)
            for at in places:
                if padding:
                    output[at][h] = 0
                    continue
                b, c = B[at][h // of_one].to(dtype), C[at][h // of_one].to(dtype)
                b = b if B_bias is None else b + B_bias[h].to(dtype)
                c = c if C_bias is None else c + C_bias[h].to(dtype)
                u, numbers = x[at][h].to(dtype), (t[at][h].to(dtype) for t in (dt, A, trap))
                y = head.token(u, *numbers, angles[at].to(dtype), b, c)
                y = y if D is None else y + D[h].to(dtype) * u
                if z is not None:
                    gate = z[at][h].to(dtype)
                    y = y * gate * torch.sigmoid(gate)
                output[at][h] = y.to(output.dtype)
            if not padding and is_kept and (places or target != slot):
                for state, value in zip(states, (head.angle, head.s, head.k, head.v), strict=True):
                    if state is not None:
                        state[target, h] = value.to(state.dtype)
    return (output, *states)
