"""The prefix cache of selective_scan: in which column of a slot table each chunk's last state belongs."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.slots import is_padding, never_decreasing, row_at, row_bounds, slot_columns
from mamba_ops.ops._common.values import check_counts, check_rows, refuse, slots_in_cache

if TYPE_CHECKING:
    from mamba_ops.ops.selective_scan.op import Arguments


class KeptStates(NamedTuple):
    """Of some packed tokens: the column of the state after each, and whether a chunk ends there."""

    column: Tensor
    stored: Tensor


def kept_states(call: "Arguments", token: Tensor) -> KeptStates | None:
    """Say where the states after the packed tokens `token` belong; None without a prefix cache, or without chunks."""
    first_block, last_block, chunk_ends, last_chunk = (
        call.first_block,
        call.last_block,
        call.chunk_ends,
        call.last_chunk,
    )
    if (
        call.cu_seqlens is None
        or first_block is None
        or last_block is None
        or last_chunk is None
        or chunk_ends is None
        or chunk_ends.numel() == 0
    ):
        return None
    tokens, chunks, size = call.x.shape[0], chunk_ends.shape[0], call.block_size
    ends = never_decreasing(chunk_ends, 0, tokens)
    last = never_decreasing(last_chunk, -1, chunks - 1)
    starts, row_ends = row_bounds(call.cu_seqlens, tokens)
    chunk = row_at(ends, tokens).clamp(max=chunks - 1)[token]
    row = row_at(row_ends, tokens).clamp(max=last.shape[0] - 1)[token]
    first_chunk = torch.cat([last.new_zeros(1), last[:-1] + 1])
    short = ends[first_chunk.clamp(max=chunks - 1)] - starts  # tokens of each row's first chunk
    skipped = torch.where((last > first_chunk) & (short < size), size - short, 0)
    position = first_block.long()[row] * size + skipped[row] + token - starts[row]
    column = torch.where(chunk == last[row], last_block.long()[row], position // size)
    return KeptStates(column, ends[chunk] == token + 1)


def check_blocks(call: "Arguments") -> None:
    """The chunks are those of the rows, and all columns and slots that they use are there."""
    if call.cu_seqlens is None or call.slots is None or call.ssm_state is None:
        return
    if call.chunk_ends is None or call.last_chunk is None or call.initial_block is None:
        return
    rows = check_rows(call.x, call.cu_seqlens)
    tokens, chunks, columns = call.x.shape[0], call.chunk_ends.shape[0], call.slots.shape[1]
    table = slot_columns(call.slots, rows.size)
    within = f", as slots has {columns} columns"
    for name in ("first_block", "last_block", "initial_block"):
        check_counts(name, getattr(call, name), 0, columns - 1, why=within)
    ends, last, has_tokens = call.chunk_ends.long(), call.last_chunk.long(), rows.lengths > 0
    check_counts("chunk_ends", ends, 0, tokens, why=f", as there are {tokens} tokens", what="for the end of chunk")
    falls = torch.cat([ends.new_zeros(1, dtype=torch.bool), ends.diff() < 0])
    refuse("chunk_ends", ends, falls, "no less than the entry before", what="for the end of chunk")
    check_counts("last_chunk", last, -1, chunks - 1, why=f", as there are {chunks} chunks")
    before = torch.cat([last.new_full((1,), -1), last[:-1]])
    refuse("last_chunk", last, has_tokens & (last <= before), "more than that of the row before")
    refuse("last_chunk", last, ~has_tokens & (last != before), "that of the row before, as the row has no tokens")
    row_end = call.cu_seqlens[1:].long()
    apart = has_tokens & (ends[last.clamp(min=0)] != row_end) if chunks else has_tokens
    refuse("last_chunk", last, apart, "the chunk that ends where the row does")

    initial = table.gather(1, call.initial_block.long().unsqueeze(1)).squeeze(1)
    is_active = ~is_padding(initial, call.null_slot)
    slots_in_cache("slots", initial, is_active & has_tokens, call.ssm_state, "ssm_state")
    if tokens == 0 or (kept := kept_states(call, torch.arange(tokens, device=call.x.device))) is None:
        return
    row = row_at(row_end, tokens)
    stored = kept.stored & (row < rows.size)
    row = row.clamp(max=rows.size - 1)
    stored &= is_active[row]
    beyond, expected = stored & (kept.column >= columns), f"at most {columns - 1}{within}"
    refuse("first_block", kept.column, beyond, expected, what="as the column for the state after token")
    targets = table[row].gather(1, torch.where(stored, kept.column, 0).unsqueeze(1)).squeeze(1)
    used = stored & ~is_padding(targets, call.null_slot)
    slots_in_cache("slots", targets, used, call.ssm_state, "ssm_state", what="for the state after token")
