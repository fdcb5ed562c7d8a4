"""The plain-torch kernel of mamba_chunk_scan: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import ChunkLayout, before, carried, chunk_layout, row_count
from mamba_ops.ops._common.decay import finite_rates, log_decay_between
from mamba_ops.ops._common.rows import rows_here
from mamba_ops.ops._common.slots import initial_states, row_ends, store_rows
from mamba_ops.ops.mamba_chunk_scan.by_row import scan_rows
from mamba_ops.ops.mamba_chunk_scan.op import Arguments


def _scan(
    x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, layout: ChunkLayout
) -> tuple[Tensor, Tensor]:
    """The outputs, laid out as x is, and the state after every piece; all in one dtype, places without a token zero."""
    count, size, heads, dim = x.shape
    groups, dstate = B.shape[-2:]

    # The decay from before the piece to each token, and from token to token; by head, or group, before token from here.
    a = (d * finite_rates(A)).transpose(1, 2)
    since, between = torch.exp(a.cumsum(2)), log_decay_between(a).exp_()
    x = (x * d.unsqueeze(3)).transpose(1, 2)
    B, C = B.transpose(1, 2), C.transpose(1, 2)

    # What a piece adds to the state, and the state after every piece.
    ends = (x * between[:, :, -1].unsqueeze(3)).reshape(count, groups, -1, size, dim)
    states = (ends.transpose(-1, -2).flatten(2, 3) @ B).view(count, heads, dim, dstate)
    decay = torch.exp(a.sum(2)).view(count, heads, 1, 1)
    begins = (layout.number == 0).view(-1, 1, 1, 1)
    if initial is not None:
        initial = torch.where(begins, initial[layout.row], 0)
        states = states + decay * initial
    states = carried(states, decay, layout.number, layout.longest)
    begun = before(states, begins)
    if initial is not None:
        begun = begun + initial

    # What a token reads of the state before the piece, and of the piece's tokens up to itself.
    y = (C @ begun.view(count, groups, -1, dstate).transpose(-1, -2)).view(count, groups, size, -1, dim)
    y = y.transpose(2, 3).reshape(count, heads, size, dim) * since.unsqueeze(3)
    weights = between
    weights.view(count, groups, -1, size, size).mul_((C @ B.transpose(-1, -2)).unsqueeze(2))
    return (y + weights @ x).transpose(1, 2), states


def mamba_chunk_scan(call: Arguments) -> None:
    cache, kept = call.ssm_state, call.chunk_states
    compute = torch.promote_types(call.x.dtype, torch.float32)
    heads, dim, dstate = *call.x.shape[-2:], call.B.shape[-1]
    n = row_count(call.x, call.cu_seqlens)
    if n == 0:
        return
    if kept is None and (rows := rows_here(call.x, call.cu_seqlens)) is not None:
        scan_rows(call, rows, compute)
        return

    size = call.chunk_size
    while size % 2 == 0 and size * size > dim * dstate:
        size //= 2
    layout = chunk_layout(call.x, size, call.chunk_size // size, call.cu_seqlens, call.num_computed_tokens)
    empty = layout.of_row == 0
    ends = row_ends(call.slots, call.write_slots, call.null_slot, empty, cache)
    initial = None
    if cache is not None and call.has_initial_state is not None:
        initial = initial_states(cache, ends, call.has_initial_state, compute)
    last = call.x.new_zeros(n, heads, dim, dstate, dtype=compute) if initial is None else initial
    if call.x.numel() > 0:
        inside = layout.inside & ends.is_active[layout.row].unsqueeze(1)
        u, d, b, c = (layout.gather(tokens, inside, compute) for tokens in (call.x, call.dt, call.B, call.C))
        if call.dt_bias is not None:
            d = d + call.dt_bias.to(compute)
        if call.dt_softplus:  # not torch's softplus: on a CPU its last bits depend on where an element stands
            d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
        d = torch.where(inside.unsqueeze(2), d.clamp(call.dt_min, call.dt_max), 0)
        y, states = _scan(u, d, call.A.to(compute), b, c, initial, layout)
        if call.D is not None:
            y = y + (call.D if call.D.dim() == 2 else call.D.unsqueeze(1)).to(compute) * u
        if call.z is not None:
            gate = layout.gather(call.z, inside, compute)
            y = y * (gate / (1 + torch.exp(-gate)))

        last = torch.where(empty.view(n, 1, 1, 1), last, states[(layout.end - 1).clamp(min=0)])
        if kept is not None:
            store_rows(kept, layout.closes.cumsum(0) - 1, states, layout.closes & ends.is_active[layout.row])
        y = torch.where(inside.unsqueeze(2).unsqueeze(3), y, 0)  # a NaN in A or D would reach padding
        layout.store(call.output, y)
    if cache is not None:
        store_rows(cache, ends.target, last, ends.stored)
