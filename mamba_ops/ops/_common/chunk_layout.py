"""How references of chunked ops arrange the tokens of all rows in chunks.

A reference is also what an exported program is decomposed to, and then a length may be a symbol (`torch.SymInt`). So
nothing here, and nothing in a forward reference, branches on a length or counts to it. Lengths are read on the host
where they are there, on a CPU, and only to leave out pieces that no row has.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.slots import row_at, row_bounds, store_rows
from mamba_ops.registry.decomposition import is_decomposing


def row_count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def most_chunks(tokens: int, n: int, chunk_size: int, num_computed_tokens: Tensor | None) -> int:
    """How many chunks n rows can have: each may end in a short one, and begin with one if its start is not aligned."""
    return tokens // chunk_size + (n if num_computed_tokens is None else 2 * n)


class ChunkLayout(NamedTuple):
    """The tokens of all rows arranged in pieces: chunks, or equal parts of chunks."""

    row: Tensor  # (pieces,): the row of each
    number: Tensor  # (pieces,): the number of each within its row
    closes: Tensor  # (pieces,): whether it is the last one of its chunk
    token: Tensor  # (pieces, size): indices of the tokens among those of all rows; 0 where there is none
    inside: Tensor  # (pieces, size): whether there is one
    of_row: Tensor  # (n,): how many pieces each row has
    end: Tensor  # (n,): the piece after its last one
    longest: int  # the most pieces that a row can have
    packed: bool  # whether all rows' tokens are packed, as they are with cu_seqlens

    def gather(self, tokens: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
        """An activation as (pieces, size, ...), zero where not `inside`."""
        tokens = (tokens if self.packed else tokens.flatten(0, 1))[self.token]
        return torch.where(inside.view(*inside.shape, *[1] * (tokens.dim() - 2)), tokens, 0).to(dtype)

    def store(self, output: Tensor, values: Tensor) -> None:
        """Store values of this layout at their tokens in `output`; its other entries stay as they are."""
        packed = output if self.packed else output.new_empty(output.flatten(0, 1).shape)
        store_rows(packed, self.token.flatten(), values.flatten(0, 1), self.inside.flatten())
        if not self.packed:
            output.copy_(packed.view(output.shape))


def chunk_layout(
    x: Tensor, size: int, per_chunk: int, cu_seqlens: Tensor | None, num_computed_tokens: Tensor | None
) -> ChunkLayout:
    """Number the pieces of all rows in order, as many as there can be; those beyond the last hold no token."""
    n = row_count(x, cu_seqlens)
    if cu_seqlens is None:
        length = x.shape[1]
        starts, tokens = torch.arange(n, device=x.device) * length, n * length
        lengths = torch.full_like(starts, length)
    else:
        tokens = x.shape[0]
        starts, ends = row_bounds(cu_seqlens, tokens)
        lengths = ends - starts
    before = torch.zeros_like(starts) if num_computed_tokens is None else num_computed_tokens.long().clamp(min=0)
    skipped = before % size
    of_row = torch.where(lengths > 0, (skipped + lengths + size - 1) // size, 0)
    end = of_row.cumsum(0)

    longest = most = most_chunks(tokens, n, size, num_computed_tokens)
    if cu_seqlens is None:
        longest = (length - 1) // size + (1 if num_computed_tokens is None else 2)
        most = n * longest
    elif n > 0 and are_here(of_row):
        longest, most = (max(1, int(count)) for count in (of_row.max(), end[-1]))
    piece = torch.arange(most, device=x.device)
    row = row_at(end, most)
    exists = row < n
    row = row.clamp(max=n - 1)
    number = piece - (end - of_row)[row]
    closes = exists & ((number == of_row[row] - 1) | ((before[row] // size + number + 1) % per_chunk == 0))
    place = (number * size - skipped[row]).unsqueeze(1) + torch.arange(size, device=x.device)
    inside = exists.unsqueeze(1) & (place >= 0) & (place < lengths[row].unsqueeze(1))
    token = torch.where(inside, starts[row].unsqueeze(1) + place, 0)
    return ChunkLayout(row, number, closes, token, inside, of_row, end, longest, cu_seqlens is not None)


def are_here(lengths: Tensor) -> bool:
    """Whether lengths are on the host, so that nothing waits for them."""
    return lengths.device.type == "cpu" and not is_decomposing()


_MOST_TURNS = 20


def turns(longest: int) -> Iterator[int]:
    """Yield 1, 2, 4, ... as long as they are less than `longest`; of a symbol, less than the most that it may be.

    For a symbol without a limit there are 20 turns, which is enough for a million pieces.
    """
    for turn in range(63 if isinstance(longest, int) else _MOST_TURNS):
        reach = 2**turn
        if _is_at_most(longest, reach):
            return
        yield reach


def _is_at_most(size: int, limit: int) -> bool:
    if isinstance(size, int):
        return size <= limit
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size <= limit)


def carried(
    states: Tensor,
    steps: Tensor,
    number: Tensor,
    longest: int,
    through: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> Tensor:
    """Return the state after every piece, (pieces, ...), in log2(longest) turns.

    Args:
        states: what each piece leaves of nothing; of the first one of a row, also what it leaves of the initial state.
        steps: what becomes of a state over a piece: `through(state, step)`.
        number: (pieces,), the number of each within its row.
        longest: the most pieces that a row can have.
        through: an associative product of a state and a step, and of two steps.
    """
    for reach in turns(longest):
        near = (number < reach).view(-1, *[1] * (states.dim() - 1))  # no piece of the row is that far before
        earlier_states, earlier_steps = states.roll(reach, 0), steps.roll(reach, 0)
        states = states + through(earlier_states, steps).masked_fill_(near, 0)
        steps = torch.where(near, steps, through(earlier_steps, steps))
    return states


def before(states: Tensor, is_first: Tensor) -> Tensor:
    """Return the state before every piece, given the state after each: zero before the first one of a row."""
    return states.roll(1, 0).masked_fill_(is_first.view(-1, *[1] * (states.dim() - 1)), 0)


def fixed(longest: int) -> int:
    """Return a number to count to; raise ValueError if it is a symbol, for which there is no loop."""
    if isinstance(longest, int):
        return longest
    raise ValueError(
        "got a program in which the tokens of a row vary, expected one number of them: what the op is decomposed to "
        "counts them; export it at one length, or keep the op"
    )
