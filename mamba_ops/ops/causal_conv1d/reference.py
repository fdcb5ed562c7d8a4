"""The plain-torch kernel of causal_conv1d: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.slots import initial_states, row_at, row_bounds, row_ends, store_rows
from mamba_ops.ops.causal_conv1d.op import Arguments

_BLOCK = 2**17  # numbers that the reference convolves at a time: a CPU's cache holds them


def causal_conv1d(call: Arguments) -> None:
    n = row_count(call.x, call.cu_seqlens)
    if n == 0 or (call.x.numel() == 0 and call.write_slots is None):
        return
    dim, width = call.weight.shape
    history = width - 1

    rows = torch.arange(n, device=call.x.device)
    if call.cu_seqlens is None:
        starts, ends = rows * call.x.shape[1], (rows + 1) * call.x.shape[1]
    else:
        starts, ends = row_bounds(call.cu_seqlens, call.x.shape[0])
    starts, lengths = starts.unsqueeze(1), (ends - starts).unsqueeze(1)
    slots = row_ends(call.slots, call.write_slots, call.null_slot, lengths.squeeze(1) == 0, call.conv_state)
    is_active = slots.is_active
    tokens = call.x.reshape(-1, dim)
    total = tokens.shape[0]

    past = call.x.new_zeros(n, history, dim)
    if call.conv_state is not None:
        known = torch.zeros_like(is_active) if call.has_initial_state is None else call.has_initial_state
        columns = call.conv_state[..., :history].transpose(1, 2)
        past = initial_states(columns, slots, known, columns.dtype)
        if call.x.numel() == 0:
            store_rows(columns, slots.target, past, slots.stored)
            return
    entry = torch.arange(history, device=call.x.device)
    first = starts + entry  # the first tokens of each sequence, and what follows where it is shorter
    firsts = tokens[first.clamp(max=total - 1)]

    compute = torch.promote_types(call.x.dtype, torch.float32)
    taps = call.weight.t().to(compute).contiguous()
    start = taps.new_zeros(()) if call.bias is None else call.bias.to(compute)

    def convolve(entries: Tensor, acc: Tensor, scratch: Tensor) -> None:
        """Set each token of `acc` from the `width` entries that end at it; all are `(..., dim)`."""
        acc.copy_(start)
        for tap in range(width):
            acc += torch.mul(entries[..., tap : tap + acc.shape[-2], :], taps[tap], out=scratch)
        if call.silu:  # not torch.sigmoid: on a CPU its last bit depends on an element's place
            acc /= torch.neg(acc, out=scratch).exp_().add_(1)

    # All tokens as if they were one sequence, in blocks; then those again that look back into their own past.
    token = torch.arange(total, device=call.x.device)
    row = row_at(ends, total).clamp(max=n - 1)
    if call.slots is not None:
        is_padding_token = ~is_active[row].unsqueeze(1)
    if call.cu_seqlens is not None:
        owned = ((token >= starts[row, 0]) & (token < ends[row])).unsqueeze(1)
    if isinstance(total, int):
        flat, block = call.output.reshape(-1, dim), min(max(_BLOCK // dim, 1), total)
        buffers = taps.new_empty(2, block, dim)
        for begin in range(history, total, block):
            part = slice(begin, min(begin + block, total))
            acc, scratch = buffers[:, : part.stop - begin]
            convolve(tokens[begin - history : part.stop].to(compute), acc, scratch)
            if call.slots is not None:
                acc.masked_fill_(is_padding_token[part], 0)
            flat[part] = acc if call.cu_seqlens is None else torch.where(owned[part], acc.to(flat.dtype), flat[part])
        if not call.output.is_contiguous():
            call.output.copy_(flat.view(call.output.shape))
        acc, scratch = taps.new_empty(2, n, history, dim)
        convolve(torch.cat((past, firsts), dim=1).to(compute), acc, scratch)
        acc.masked_fill_(~is_active[:, None, None], 0)
        if call.cu_seqlens is None:
            call.output[:, :history] = acc[:, : call.x.shape[1]]
        else:
            store_rows(call.output, first.flatten(), acc.flatten(0, 1), (entry < lengths).flatten())
    else:  # in a program for any length: every token looks its entries up
        place, result = token - starts[row, 0], start
        for tap in range(width):
            steps = history - tap
            known = past[row, (history + place - steps).clamp(0, history - 1)]
            looked_up = torch.where((place >= steps).unsqueeze(1), tokens[(token - steps).clamp(min=0)], known)
            result = result + looked_up.to(compute) * taps[tap]
        if call.silu:
            result = result / (1 + torch.exp(-result))
        if call.slots is not None:
            result = result.masked_fill(is_padding_token, 0)
        if call.cu_seqlens is not None:
            result = torch.where(owned, result.to(call.output.dtype), call.output)
        call.output.copy_(result.view(call.output.shape))

    if call.conv_state is not None:  # old entries move as they are, new ones are rounded to the state's dtype
        entry = lengths + entry
        old = past[rows.unsqueeze(1), entry.clamp(max=history - 1)].to(call.conv_state.dtype)
        new = tokens[(starts + entry - history).clamp(0, total - 1)].to(call.conv_state.dtype)
        kept = torch.where((entry < history).unsqueeze(-1), old, new).transpose(1, 2)
        store_rows(call.conv_state[..., :history], slots.target, kept, slots.stored)
