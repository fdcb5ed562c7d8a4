"""The plain-torch kernel of mamba3_state_update: its reference, composed of selective_state_update."""

import math
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.delta_rule_update import sigmoid
from mamba_ops.ops._common.mamba3 import (
    LEAST,
    MOST,
    Layout,
    Ranks,
    State,
    Tokens,
    by_head,
    layout,
    near_zero,
    one_later,
    read_at_once,
    reduced,
    total_turns,
    turns_of,
)
from mamba_ops.ops._common.slots import UpdateEnds, refuse_lengths_where_decomposing, store_rows, update_ends
from mamba_ops.ops.mamba3_state_update.op import Arguments
from mamba_ops.ops.selective_state_update import selective_state_update


def mamba3_state_update(call: Arguments) -> None:
    advance(call)


def advance(call: Arguments, *, check_only: bool = False) -> None:
    """Make a call; with `check_only` only ask if selective_state_update takes it."""
    compute, heads = torch.promote_types(call.x.dtype, torch.float32), call.x.shape[-2]
    is_flat, is_packed = call.x.dim() == 3 and call.cu_seqlens is None, call.cu_seqlens is not None
    if is_packed:
        refuse_lengths_where_decomposing()  # as the op inside would
    if not row_count(call.x, call.cu_seqlens):
        return
    rows = layout(call.x.unsqueeze(1) if is_flat else call.x, call.cu_seqlens)
    n, count = rows.starts.shape[0], rows.row.shape[0]
    if not count:
        return
    inside = torch.arange(_columns(call), device=rows.ends.device) < (rows.ends - rows.starts).unsqueeze(1)
    tables = (call.slots, call.write_slots, call.null_slot, call.num_accepted_tokens)
    ends = update_ends(*tables, inside, call.ssm_state)

    def packed(tensor: Tensor) -> Tensor:
        return (tensor if is_flat or is_packed else tensor.flatten(0, 1)).to(compute)

    def begun(cache: Tensor) -> Tensor:
        initial: Tensor = cache[torch.where(ends.is_active, ends.source, 0)].to(compute)
        return torch.where(ends.is_active.view(-1, *[1] * (cache.dim() - 1)), initial, 0)

    ranks, is_mimo = Ranks.of(call.mimo_x, call.mimo_z, call.mimo_o, compute), call.mimo_x is not None
    x, dt, A, trap, angles = map(packed, (call.x, call.dt, call.A, call.trap, call.angles))
    k, q = (by_head(packed(t), bias, heads, compute) for t, bias in ((call.B, call.B_bias), (call.C, call.C_bias)))
    k_begun = begun(call.k_state)
    state = State(begun(call.angle_state), k_begun if is_mimo else k_begun.unsqueeze(1), begun(call.v_state))
    if is_flat:
        angle = near_zero(state.angle + math.pi * reduced(turns_of(angles, dt)))
    else:
        angle = math.pi * total_turns(Tokens(x, dt, A, trap, angles, k, q), rows, state)
    k, q, v = ranks.rotate(k, angle), ranks.rotate(q, angle), ranks.spread(x)
    k_before, v_before = one_later(k, state.k, rows), one_later(v, ranks.spread(state.x), rows)
    early, rank = sigmoid(trap), k.shape[1]
    step, least = (-A * dt).clamp(LEAST, MOST).unsqueeze(1), early.new_full((count, rank, heads), LEAST)
    share = (early * dt)[:, None, :, None]

    def both(before: Tensor, now: Tensor, between: Tensor | None = None) -> Tensor:
        """The tokens of the step: those that add the products of the token before, one that decays, this one's."""
        between = torch.zeros_like(now[:, :1]) if between is None else between
        tokens = torch.cat((before, between, now), dim=1).flatten(0, 1)
        return tokens if is_packed else tokens.view(n, -1, *tokens.shape[1:])

    tokens = (
        both(v_before * ((1 - early) * dt / LEAST)[:, None, :, None], v * (share / LEAST)),
        both(least, least, step),
        step.new_full((heads,), -1),
        both(k_before, k),
        both(torch.zeros_like(q), q),
    )
    y = torch.zeros_like(tokens[0])
    inner: Any = selective_state_update.check_supported if check_only else selective_state_update.call_undispatched
    inner(call.ssm_state, *tokens, **_rows_of(call, rows, ends, 2 * rank + 1), out=y)
    if check_only:
        return
    y = y.view(count, 2 * rank + 1, *v.shape[2:])[:, rank + 1 :]
    if rank > 1:
        y = y + read_at_once(k, q, share * v, others=True)
    y = ranks.finish(y, x, call.D, None if call.z is None else packed(call.z))
    of_token = (-1, *[1] * (y.dim() - 1))
    y = torch.where(ends.is_active[rows.row].view(of_token), y, 0).to(call.output.dtype)
    if is_packed:
        y = torch.where(rows.owned.view(of_token), y, call.output)
    call.output.copy_(y.view(call.output.shape))
    speculates = call.num_accepted_tokens is not None
    kept = rows.starts.unsqueeze(1) + torch.arange(ends.target.shape[1], device=x.device)
    kept = (kept if speculates else rows.ends.unsqueeze(1) - 1).clamp(0, count - 1).flatten()
    for cache, value in ((call.angle_state, angle), (call.k_state, k if is_mimo else k[:, 0]), (call.v_state, x)):
        store_rows(cache, ends.target.flatten(), value[kept], ends.stored.flatten())


def _columns(call: Arguments) -> int:
    """Return how many states of a row are kept at most; rows of one length have no more than that."""
    if call.num_accepted_tokens is None:
        return 1
    table = call.slots if call.write_slots is None else call.write_slots
    columns = 1 if table is None or table.dim() == 1 else table.shape[1]
    if call.cu_seqlens is None:
        columns = min(columns, 1 if call.x.dim() == 3 else call.x.shape[1])
    return max(columns, 1)


def _rows_of(call: Arguments, rows: Layout, ends: UpdateEnds, each: int) -> dict[str, Tensor | int | None]:
    """Return what selective_state_update is told of rows, which has `each` tokens for one of the call."""
    bounds = None if call.cu_seqlens is None else torch.cat((rows.starts[:1], rows.ends)) * each
    found = {"cu_seqlens": bounds, "null_slot": call.null_slot}
    if call.num_accepted_tokens is None:
        return {**found, "slots": call.slots, "write_slots": call.write_slots}
    n, kept = ends.target.shape
    length = kept if call.cu_seqlens is not None or call.x.dim() == 3 else call.x.shape[1]
    table = torch.full((n, length, each), -1, dtype=torch.int64, device=ends.target.device)
    table[:, :kept, -1] = torch.where(ends.stored, ends.target, -1)
    first = torch.where(ends.is_active, ends.source, -1).unsqueeze(1)
    return {
        **found,
        "slots": first,
        "write_slots": table.flatten(1),
        "num_accepted_tokens": torch.ones_like(first[:, 0]),
    }
