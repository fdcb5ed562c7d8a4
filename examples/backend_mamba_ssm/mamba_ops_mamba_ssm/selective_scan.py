"""Mamba-1's selective scan on `selective_scan_cuda.fwd`; loaded when it first runs."""

import selective_scan_cuda
from torch import Tensor

from mamba_ops.ops import slots as slot_tables


def _by_channel(tokens: Tensor) -> Tensor:
    """(n, length, ...) as (n, ..., length), a channel's tokens side by side."""
    return tokens.movedim(1, -1).contiguous()


def _grouped(tokens: Tensor) -> Tensor:
    """B or C as (n, groups, dstate, length)."""
    return _by_channel(tokens if tokens.dim() == 4 else tokens.unsqueeze(2))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    ssm_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    block_size: int = 0,
    first_block: Tensor | None = None,
    last_block: Tensor | None = None,
    initial_block: Tensor | None = None,
    chunk_ends: Tensor | None = None,
    last_chunk: Tensor | None = None,
    output: Tensor,
) -> None:
    out, states, *gated = selective_scan_cuda.fwd(
        _by_channel(x),
        _by_channel(dt),
        A.float().contiguous(),
        _grouped(B),
        _grouped(C),
        None if D is None else D.float().contiguous(),
        None if z is None else _by_channel(z),
        None if dt_bias is None else dt_bias.float().contiguous(),
        dt_softplus,
    )
    output.copy_((gated[0] if gated else out).movedim(-1, 1))
    source, is_active = (table[:, 0] for table in slot_tables.row_slots(slots, x.shape[0], null_slot, x.device))
    if slots is not None:
        output.masked_fill_(~is_active.view(-1, 1, 1), 0)
    if ssm_state is not None:
        target, stored = source, is_active
        if write_slots is not None:
            target, stored = (
                table[:, 0] for table in slot_tables.row_slots(write_slots, x.shape[0], null_slot, x.device)
            )
        # A chunk's products and states alternate; the last chunk's states are the row's.
        slot_tables.store_rows(ssm_state, target, states[:, :, -1, 1::2], stored & is_active)
