"""The backend `mamba_ssm`: Mamba-1's selective scan on `selective_scan_cuda.fwd`."""

import torch
from torch import Tensor

from mamba_ops import selective_scan
from mamba_ops.ops import slots as slot_tables
from mamba_ops.registry import Backend

mamba_ssm = Backend("mamba_ssm", devices=("cuda",), requires="selective_scan_cuda", install="mamba-ssm", priority=15)


def _why_not(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    has_initial_state: Tensor | None,
    block_size: int,
    output: Tensor,
) -> str | None:
    if cu_seqlens is not None:
        return "takes no packed rows"
    if has_initial_state is not None:
        return "starts every row from zero, and has_initial_state is given"
    if block_size > 0:
        return "keeps no states of a prefix cache"
    if x.dtype == torch.float64:
        return "computes in float32, and x is float64"
    for name, tensor in (("dt", dt), ("B", B), ("C", C), ("z", z), ("out", output)):
        if tensor is not None and tensor.dtype != x.dtype:
            mine, other = (str(t.dtype).removeprefix("torch.") for t in (x, tensor))
            return f"takes {name} in x's {mine}, and it is {other}"
    if A.shape[1] > 256:
        return f"takes a dstate of at most 256, and A has {A.shape[1]}"
    return "takes at least one token, and there is none" if x.numel() == 0 else None


def _by_channel(tokens: Tensor) -> Tensor:
    """(n, length, ...) as (n, ..., length), a channel's tokens side by side."""
    return tokens.movedim(1, -1).contiguous()


def _grouped(tokens: Tensor) -> Tensor:
    """B or C as (n, groups, dstate, length)."""
    return _by_channel(tokens if tokens.dim() == 4 else tokens.unsqueeze(2))


@mamba_ssm.implements(selective_scan, unsupported=_why_not)
def _selective_scan(
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
    import selective_scan_cuda

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
