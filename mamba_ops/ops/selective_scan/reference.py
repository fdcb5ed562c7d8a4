"""The plain-torch kernel of selective_scan: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import before, carried, chunk_layout, row_count
from mamba_ops.ops._common.decay import finite_rates
from mamba_ops.ops._common.rows import rows_here
from mamba_ops.ops._common.slots import initial_states, is_padding, row_ends, slot_columns, store_rows
from mamba_ops.ops.selective_scan.blocks import kept_states
from mamba_ops.ops.selective_scan.by_row import scan_rows
from mamba_ops.ops.selective_scan.op import Arguments

PIECE = 16  # tokens that the reference reads one after the other, of all pieces at once


def selective_scan(call: Arguments) -> None:
    compute = torch.promote_types(call.x.dtype, torch.float32)
    (dim, dstate), n = call.A.shape, row_count(call.x, call.cu_seqlens)
    if n == 0:
        return
    blocks = call.block_size > 0
    if not blocks and (rows := rows_here(call.x, call.cu_seqlens)) is not None:
        scan_rows(call, rows, compute)
        return
    layout = chunk_layout(call.x, PIECE, 1, call.cu_seqlens, None)
    empty = layout.of_row == 0
    of_rows = call.slots
    if call.slots is not None and call.initial_block is not None:
        block, of_rows = call.initial_block.long().unsqueeze(1), slot_columns(call.slots, n)
        is_column = (block >= 0) & (block < of_rows.shape[1])
        of_rows = torch.where(is_column, of_rows.gather(1, torch.where(is_column, block, 0)), -1)
    ends = row_ends(of_rows, call.write_slots, call.null_slot, empty, call.ssm_state)
    initial = call.x.new_zeros(n, dim, dstate, dtype=compute)
    if call.ssm_state is not None and call.has_initial_state is not None:
        initial = initial_states(call.ssm_state, ends, call.has_initial_state, compute)
    if call.x.numel() == 0:
        if call.ssm_state is not None and not blocks:
            store_rows(call.ssm_state, ends.target, initial, ends.stored)
        return

    inside = layout.inside & ends.is_active[layout.row].unsqueeze(1)
    kept = kept_states(call, layout.token)
    if kept is not None and call.slots is not None and call.ssm_state is not None:
        table, column = slot_columns(call.slots, n)[layout.row], kept.column
        is_column = (column >= 0) & (column < table.shape[1])
        targets = table.gather(1, torch.where(is_column, column, 0))
        stored = inside & kept.stored & is_column & ~is_padding(targets, call.null_slot, call.ssm_state.shape[0])

    def gather(tokens: Tensor) -> Tensor:
        """An activation as (PIECE, pieces, ...), zero where there is no token."""
        return layout.gather(tokens, inside, compute).transpose(0, 1)

    def of_channels(tokens: Tensor) -> Tensor:
        """B or C as (PIECE, pieces, groups or 1, channels of a group or 1, dstate)."""
        tokens = gather(tokens)
        return (tokens.unsqueeze(2) if tokens.dim() == 3 else tokens).unsqueeze(3)

    x, d = gather(call.x), gather(call.dt)
    if call.dt_bias is not None:
        d = d + call.dt_bias.to(compute)
    if call.dt_softplus:  # not torch's softplus: on a CPU its last bits depend on where an element stands
        d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
    d = torch.where(inside.t().unsqueeze(2), d, 0)
    b, c, rates = of_channels(call.B), of_channels(call.C), finite_rates(call.A.to(compute))
    by_group = (b.shape[2], dim // b.shape[2], 1)

    def advance(state: Tensor, t: int) -> Tensor:
        """The states of all pieces, (pieces, dim, dstate), after their token t."""
        pushed = ((d[t] * x[t]).view(-1, *by_group) * b[t]).flatten(1, 2)
        return state * torch.exp(rates * d[t].unsqueeze(2)) + pushed

    # What each piece would leave of nothing, then what each begins with, then all of it once more from there.
    left = x.new_zeros(x.shape[1], dim, dstate)
    for t in range(PIECE):
        left = advance(left, t)
    begins, decay = (layout.number == 0).view(-1, 1, 1), torch.exp(rates * d.sum(0).unsqueeze(2))
    begun = torch.where(begins, initial[layout.row], 0)
    ended = carried(left + decay * begun, decay, layout.number, layout.longest)
    after, read = begun + before(ended, begins), []
    for t in range(PIECE):
        after = advance(after, t)
        read.append((after.view(-1, *by_group[:2], dstate) * c[t]).sum(-1).flatten(1))
        if kept is not None and call.ssm_state is not None:
            store_rows(call.ssm_state, targets[:, t], after, stored[:, t])
    y = torch.stack(read)
    if call.D is not None:
        y = y + call.D.to(compute) * x
    if call.z is not None:
        gate = gather(call.z)
        y = y * (gate / (1 + torch.exp(-gate)))
    y = torch.where(inside.t().unsqueeze(2), y, 0)  # a NaN in A or D would reach padding
    layout.store(call.output, y.transpose(0, 1))
    if call.ssm_state is not None and not blocks:
        last = torch.where(empty.view(n, 1, 1), initial, ended[(layout.end - 1).clamp(min=0)])
        store_rows(call.ssm_state, ends.target, last, ends.stored)
