"""The plain-torch kernel of causal_conv1d_update: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.slots import is_padding, row_at, row_bounds, row_slots, slot_columns, store_rows
from mamba_ops.ops.causal_conv1d_update.op import Arguments


def _step(call: Arguments, history: int) -> None:
    """The usual call: rows of one length, nothing rolled back. No row needs an index."""
    x, conv_state, weight, bias = call.x, call.conv_state, call.weight, call.bias
    n, older = x.shape[0], history + 1 - weight.shape[1]  # columns that only move
    compute = torch.promote_types(x.dtype, torch.float32)
    new = x.unsqueeze(1) if x.dim() == 2 else x
    if call.slots is None:
        is_active, state = None, conv_state[:n, :, :history]
    else:
        slot = slot_columns(call.slots, n)[:, 0]
        is_active = ~is_padding(slot, call.null_slot, conv_state.shape[0])
        state = conv_state[torch.where(is_active, slot, 0)]
    old = state[:, :, :history].transpose(1, 2)

    window = torch.cat((old.to(compute), new.to(compute)), dim=1)
    length = new.shape[1]
    if isinstance(length, int) and length == 1:
        ends_at = window.unbind(1)[older:]
    else:  # a symbol is not compared
        ends_at = tuple(window[:, tap : tap + length] for tap in range(older, history + 1))
    acc = weight.new_zeros(x.shape[-1], dtype=compute) if bias is None else bias.to(compute)
    for entries, tap in zip(ends_at, weight.to(compute).unbind(1), strict=True):
        acc = acc + entries * tap
    if call.silu:
        acc = acc / (1 + torch.exp(-acc))  # not torch.sigmoid: on a CPU its last bit depends on an element's place
    if is_active is not None:
        acc = torch.where(is_active.view(n, *[1] * (acc.dim() - 1)), acc, 0)
    # Old entries move as they are, new ones are rounded to the state's dtype. Read first: `output` may be `x`.
    moved = torch.cat((old, new.to(old.dtype)), dim=1)[:, new.shape[1] :].transpose(1, 2)
    call.output.copy_(acc.view_as(x))
    if is_active is None:
        state.copy_(moved)
    else:
        state[:, :, :history] = moved
        store_rows(conv_state, slot, state, is_active)


def causal_conv1d_update(call: Arguments) -> None:
    n = row_count(call.x, call.cu_seqlens)
    if n == 0 or call.x.numel() == 0:
        return
    dim, width = call.weight.shape
    state_len = call.conv_state.shape[2]
    history = state_len if call.newest_last else width - 1
    older = history + 1 - width  # columns that only move

    if call.cu_seqlens is None and call.num_accepted_tokens is None:
        _step(call, history)
        return

    rows = torch.arange(n, device=call.x.device)
    if call.cu_seqlens is None:
        length = 1 if call.x.dim() == 2 else call.x.shape[1]
        starts, ends = rows * length, (rows + 1) * length
    else:
        starts, ends = row_bounds(call.cu_seqlens, call.x.shape[0])
    lengths = ends - starts
    table = row_slots(call.slots, n, call.null_slot, call.x.device, call.conv_state.shape[0])
    slot, is_active = (column[:, 0] for column in table)
    # Old inputs start at column `first`; `kept` of its entries, from entry `kept_from` on, are what the state keeps.
    zero = torch.zeros_like(rows)
    if call.num_accepted_tokens is None:
        first, kept, kept_from = zero, zero + history, lengths
    else:
        first = (call.num_accepted_tokens.long() - 1).clamp(0, state_len - history)
        kept, kept_from = lengths + history - 1, zero + 1

    tokens = call.x.reshape(-1, dim)
    state = call.conv_state[torch.where(is_active, slot, 0)]

    def window(row: Tensor, entry: Tensor, dtype: torch.dtype) -> Tensor:
        """Gather entries of rows' windows as `(..., dim)`; an index outside a window gives anything."""
        old = state[row, :, (first[row] + entry).clamp(0, state_len - 1)]
        new = tokens[(starts[row] + entry - history).clamp(0, tokens.shape[0] - 1)]
        return torch.where((entry < history).unsqueeze(-1), old.to(dtype), new.to(dtype))

    # Every token looks up its row, then the `width` entries of the row's window that end at it.
    token = torch.arange(tokens.shape[0], device=call.x.device)
    row = row_at(ends, tokens.shape[0]).clamp(max=n - 1)
    owned = (token >= starts[row]) & (token < ends[row])
    taps = torch.arange(older, older + width, device=call.x.device)
    compute = torch.promote_types(call.x.dtype, torch.float32)
    inputs = window(row.unsqueeze(1), (token - starts[row]).unsqueeze(1) + taps, compute)
    acc = call.weight.new_zeros(dim, dtype=compute) if call.bias is None else call.bias.to(compute)
    for tap in range(width):
        acc = acc + inputs[:, tap] * call.weight[:, tap].to(compute)
    if call.silu:
        acc = acc / (1 + torch.exp(-acc))  # not torch.sigmoid: on a CPU its last bit depends on an element's place
    acc = torch.where(is_active[row].unsqueeze(-1), acc, 0)

    # Old entries move as they are, new ones are rounded to the state's dtype.
    columns = torch.arange(state_len, device=call.x.device)
    moved = window(rows.unsqueeze(1), kept_from.unsqueeze(1) + columns, call.conv_state.dtype).transpose(1, 2)
    state = torch.where((columns < kept.unsqueeze(1)).unsqueeze(1), moved, state)

    result = torch.where(owned.unsqueeze(-1), acc.to(call.output.dtype), call.output.reshape(-1, dim))
    call.output.copy_(result.reshape(call.x.shape))
    store_rows(call.conv_state, slot, state, is_active & (lengths > 0))
