"""Prefill for Mamba-1: the selective scan over whole sequences, every channel with a state of its own."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.checking import (
    floating,
    index_tensor,
    initial_flags,
    one_device,
    packed_rows,
    shape_is,
    slot_for_each,
    slot_table,
    tensor_rank,
)
from mamba_ops.ops.pieces import lay_out, row_count
from mamba_ops.ops.slots import initial_states, is_null, require_slots, row_ends, slot_columns, store_rows
from mamba_ops.registry import Sample, bad_argument, given

PIECE = 16  # tokens that the reference reads one after the other, of all pieces at once


@mamba.op(mutates=("ssm_state", "out"))
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
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
    out: Tensor | None = None,
) -> Tensor:
    """Run the recurrence over every sequence's tokens, write their outputs, and keep the last states in a cache.

    A sequence is a row: `(n, length, ...)`, or packed `(tokens, ...)` with `cu_seqlens`. Channel d uses group
    d // (dim / groups) of B and C. Any strides (channels next to each other, as projections leave them, are the fast
    path of kernels), and any mix of float16, bfloat16, float32 and float64.

    Args:
        u: (..., dim).
        delta: (..., dim), the step sizes.
        A: (dim, dstate); negative.
        B, C: (..., groups, dstate), with dim a multiple of groups, or (..., dstate): one group.
        D: skip weight, (dim,).
        z: gate, like u.
        delta_bias: added to delta, (dim,).
        delta_softplus: apply softplus to delta after the bias; linear above 20.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Tokens past
            the last row are neither read nor written.
        ssm_state: cache (slots, dim, dstate); mutated, rounded once at each store. None: no state is kept.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and no row is nobody. With block_size the columns are positions, see below.
        write_slots: the same for where the last state goes. None: where it came from. A null slot here means that the
            state is not stored.
        has_initial_state: bool, (n,): whether row i goes on from the state in its slot. None, or False: from zero.
        null_slot: a slot that means "nobody", as does any slot below 0. Such a row's output is zero, and nothing else
            is read or stored for it.
        block_size: tokens of a block of the prefix cache, which keeps a row's state at the end of every block; 0: there
            is no such cache, and none of the next five. Otherwise all five, cu_seqlens, ssm_state and slots are given.
        first_block, last_block, initial_block: int32 or int64, (n,): columns of slots. Row i's tokens begin in block
            first_block[i] and its last state goes to column last_block[i]; its initial state is in column
            initial_block[i], and the row is nobody if the slot there is null.
        chunk_ends: int32 or int64, (chunks,): where each chunk ends among the packed tokens; chunks follow each other,
            and none has tokens of two rows.
        last_chunk: int32 or int64, (n,): the last chunk of row i; its first one follows that of the row before. A row
            without tokens has no chunk: last_chunk[i] is that of the row before, and -1 if there is none.
        out: like u, any float dtype, in other memory; mutated.

    For every row and channel, in float32 at least, from the row's initial state s on:

        d = softplus(delta[t] + delta_bias)
        s = s * exp(A * d) + d * B[t] * u[t]
        out[t] = (sum(s * C[t]) + D * u[t]) * (z[t] * sigmoid(z[t]))

    A row without tokens has no output; with a write slot other than its slot, its initial state is copied there. No two
    rows may store to one slot, nor one row store to a slot that another reads.

    With block_size > 0 a state is stored after every chunk of row i: after the last one in column last_block[i], after
    another one in column (p - 1) // block_size, p counting the row's tokens so far from first_block[i] * block_size
    on; where a row has several chunks and the first is shorter than a block, that one is taken to end at the end of its
    block. A null slot in such a column skips that store, and rows without tokens store nothing.
    """
    output = given(out)
    compute = torch.promote_types(u.dtype, torch.float32)
    (dim, dstate), n = A.shape, row_count(u, cu_seqlens)
    if n == 0:
        return output
    blocks = block_size > 0
    pieces = lay_out(u, PIECE, 1, cu_seqlens, None)
    empty = pieces.of_row == 0
    of_rows = slots
    if slots is not None and initial_block is not None:
        of_rows = slot_columns(slots, n).gather(1, initial_block.long().unsqueeze(1))
    ends = row_ends(of_rows, write_slots, null_slot, empty, ssm_state)
    initial = u.new_zeros(n, dim, dstate, dtype=compute)
    if ssm_state is not None and has_initial_state is not None:
        initial = initial_states(ssm_state, ends, has_initial_state, compute)
    if u.numel() == 0:
        if ssm_state is not None and not blocks:
            store_rows(ssm_state, ends.target, initial, ends.stored)
        return output

    inside = pieces.inside & ends.somebody[pieces.row].unsqueeze(1)
    kept = None
    if slots is not None and ssm_state is not None and cu_seqlens is not None:
        of_blocks = (first_block, last_block, chunk_ends, last_chunk)
        kept = _kept_states(slot_columns(slots, n)[pieces.row], pieces.token, cu_seqlens, *of_blocks, block_size)
    if kept is not None and ssm_state is not None:
        kept = _Kept(kept.slot, inside & kept.stored & ~is_null(kept.slot, null_slot))
        require_slots(ssm_state, kept.slot, kept.stored)

    def laid_out(tokens: Tensor) -> Tensor:
        """An activation as (PIECE, pieces, ...), zero where there is no token."""
        return pieces.laid_out(tokens, inside, compute).transpose(0, 1)

    def of_channels(tokens: Tensor) -> Tensor:
        """B or C as (PIECE, pieces, groups or 1, channels of a group or 1, dstate)."""
        tokens = laid_out(tokens)
        return (tokens.unsqueeze(2) if tokens.dim() == 3 else tokens).unsqueeze(3)

    x, d = laid_out(u), laid_out(delta)
    if delta_bias is not None:
        d = d + delta_bias.to(compute)
    if delta_softplus:  # not torch's softplus: on a CPU its last bits depend on where an element stands
        d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
    d = torch.where(inside.t().unsqueeze(2), d, 0)
    b, c, rates = of_channels(B), of_channels(C), A.to(compute)
    by_group = (b.shape[2], dim // b.shape[2], 1)

    def advance(state: Tensor, t: int) -> Tensor:
        """The states of all pieces, (pieces, dim, dstate), after their token t."""
        pushed = ((d[t] * x[t]).view(-1, *by_group) * b[t]).flatten(1, 2)
        return state * torch.exp(rates * d[t].unsqueeze(2)) + pushed

    # What each piece would leave of nothing, then what each begins with, then all of it once more from there.
    left = x.new_zeros(x.shape[1], dim, dstate)
    for t in range(PIECE):
        left = advance(left, t)
    decay, begun, state = torch.exp(rates * d.sum(0).unsqueeze(2)), torch.zeros_like(left), initial
    first = pieces.end - pieces.of_row
    for number in range(pieces.longest):
        exists = number < pieces.of_row
        piece = torch.where(exists, first + number, 0)
        store_rows(begun, piece, state, exists)
        state = torch.where(exists.view(n, 1, 1), state * decay[piece] + left[piece], state)
    after, y = begun, torch.empty_like(x)
    for t in range(PIECE):
        after = advance(after, t)
        y[t] = (after.view(-1, *by_group[:2], dstate) * c[t]).sum(-1).flatten(1)
        if kept is not None and ssm_state is not None:
            store_rows(ssm_state, kept.slot[:, t], after, kept.stored[:, t])
    if D is not None:
        y = y + D.to(compute) * x
    if z is not None:
        gate = laid_out(z)
        y = y * (gate / (1 + torch.exp(-gate)))
    pieces.store(output, y.transpose(0, 1))
    if ssm_state is not None and not blocks:
        store_rows(ssm_state, ends.target, state, ends.stored)
    return output


class _Kept(NamedTuple):
    """In which slot the state after a token belongs, and whether it is stored, both (pieces, PIECE)."""

    slot: Tensor
    stored: Tensor


def _kept_states(
    slots: Tensor,
    token: Tensor,
    cu_seqlens: Tensor,
    first_block: Tensor | None,
    last_block: Tensor | None,
    chunk_ends: Tensor | None,
    last_chunk: Tensor | None,
    block_size: int,
) -> _Kept | None:
    """Say which of the `slots` of every piece get its states at the ends of chunks; None without a prefix cache."""
    if first_block is None or last_block is None or chunk_ends is None or last_chunk is None or chunk_ends.numel() == 0:
        return None
    ends, last = chunk_ends.long(), last_chunk.long()
    starts = cu_seqlens[:-1].long()
    chunk = torch.bucketize(token, ends, right=True).clamp(max=ends.shape[0] - 1)
    row = torch.bucketize(token, cu_seqlens[1:].long(), right=True).clamp(max=last.shape[0] - 1)
    first_chunk = torch.cat([last.new_zeros(1), last[:-1] + 1])
    short = ends[first_chunk.clamp(max=ends.shape[0] - 1)] - starts  # tokens of each row's first chunk
    skipped = torch.where((last > first_chunk) & (short < block_size), block_size - short, 0)
    position = first_block.long()[row] * block_size + skipped[row] + token - starts[row]
    column = torch.where(chunk == last[row], last_block.long()[row], position // block_size)
    piece = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
    return _Kept(slots[piece, column], ends[chunk] == token + 1)


@selective_scan.outputs
def _output(u: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@selective_scan.checks
def _checks(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    ssm_state: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    has_initial_state: Tensor | None,
    block_size: int,
    first_block: Tensor | None,
    last_block: Tensor | None,
    initial_block: Tensor | None,
    chunk_ends: Tensor | None,
    last_chunk: Tensor | None,
    output: Tensor,
) -> None:
    floats = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "ssm_state": ssm_state}
    prefix = {"first_block": first_block, "last_block": last_block, "initial_block": initial_block}
    prefix |= {"last_chunk": last_chunk, "chunk_ends": chunk_ends}
    indices = {"cu_seqlens": cu_seqlens, "slots": slots, "write_slots": write_slots, **prefix}
    floating(u=u, **floats, out=output)
    one_device(u.device, "u", **floats, **indices, has_initial_state=has_initial_state, out=output)

    packed_rows(cu_seqlens)
    if cu_seqlens is None:
        tensor_rank("u", u, {3: "(n, length, dim)"}, hint="packed tokens come with cu_seqlens")
    else:
        tensor_rank("u", u, {2: "(tokens, dim)"}, hint="with cu_seqlens, tokens are packed")
    *lead, dim = u.shape
    tensor_rank("A", A, {2: "(dim, dstate)"})
    dstate = A.shape[1]
    if dim == 0 or dstate == 0:
        raise bad_argument("A", got=f"shape {tuple(A.shape)}", expected="no size of 0")
    shape_is("delta", delta, tuple(u.shape), hint="delta is like u")
    shape_is("A", A, (dim, dstate), hint="one row a channel of u")
    rank = u.dim()
    tensor_rank("B", B, {rank: "(..., dstate)", rank + 1: "(..., groups, dstate), with the tokens of u"})
    groups = B.shape[-2] if B.dim() > rank else 1
    shape_is("B", B, (*lead, dstate), (*lead, groups, dstate), hint="tokens are those of u, dstate is A's")
    shape_is("C", C, tuple(B.shape), hint="C is like B")
    if groups == 0 or dim % groups:
        raise bad_argument("B", got=f"{groups} groups", expected=f"a divisor of the {dim} channels")
    shape_is("D", D, (dim,))
    shape_is("z", z, tuple(u.shape), hint="z is like u")
    shape_is("delta_bias", delta_bias, (dim,))
    shape_is("out", output, tuple(u.shape), hint="out is like u")

    n = row_count(u, cu_seqlens)
    slot_table("slots", slots, rows=n)
    slot_table("write_slots", write_slots, rows=n)
    initial_flags("ssm_state", ssm_state, has_initial_state, rows=n)
    if ssm_state is not None:
        shape_is("ssm_state", ssm_state, (ssm_state.shape[0], dim, dstate), hint="(slots, dim, dstate)")
        slot_for_each("ssm_state", ssm_state, slots, rows=n)

    if block_size < 0:
        raise bad_argument("block_size", got=block_size, expected="0 or a positive number of tokens")
    if block_size == 0:
        for name, tensor in prefix.items():
            if tensor is not None:
                raise bad_argument(name, got="a tensor", expected="none without block_size")
        return
    for name, tensor in {"cu_seqlens": cu_seqlens, "ssm_state": ssm_state, "slots": slots, **prefix}.items():
        if tensor is None:
            hint = "the prefix cache keeps states of packed rows at the ends of blocks"
            raise bad_argument(name, got="none", expected="a tensor with block_size", hint=hint)
    if write_slots is not None:
        raise bad_argument("write_slots", got="a tensor", expected="none with block_size", hint="slots says it all")
    for name, tensor in prefix.items():
        if tensor is not None:
            index_tensor(name, tensor)
            if name != "chunk_ends":
                shape_is(name, tensor, (n,), hint="one for each row")
    if chunk_ends is not None:
        tensor_rank("chunk_ends", chunk_ends, {1: "(chunks,)"})
    if slots is not None:
        tensor_rank("slots", slots, {2: "(n, positions), one column a block"})


@selective_scan.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    dim: int = 24,
    dstate: int = 8,
    groups: int = 2,
    length: int = 37,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each; rows have two pieces and a bit."""
    random = torch.Generator().manual_seed(0)
    tokens = 2 * length + 3

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def sample(
        name: str, *lead: int, groups: tuple[int, ...] = (groups,), dstate: int = dstate, **changes: Any
    ) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default."""
        lead = lead or (3, length)
        arguments = {
            "u": normal(*lead, dim),
            "delta": normal(*lead, dim),
            "A": -normal(dim, dstate, dtype=torch.float32).exp(),
            "B": normal(*lead, *groups, dstate),
            "C": normal(*lead, *groups, dstate),
            "D": normal(dim, dtype=torch.float32),
            "z": normal(*lead, dim),
            "delta_bias": normal(dim, dtype=torch.float32),
            "delta_softplus": True,
            "ssm_state": normal(8, dim, dstate, dtype=state_dtype),
            "slots": indices(5, 1, 2),
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("u", "delta", "A", "B", "C")), arguments)

    initial: dict[str, Any] = {"has_initial_state": torch.tensor((True, False, True), device=device)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    yield sample("base", **initial)
    yield Sample("no optionals", tuple(a.abs() if i == 1 else a for i, a in enumerate(sample("bare").args)))
    large = normal(2, length, dim) * 20
    yield sample("delta and gate of any size", 2, length, groups=(), delta=large, delta_bias=None, z=large)
    strided = normal(3, dim, length).transpose(1, 2)
    wide = normal(8, dim * dstate + 24, dtype=state_dtype)[:, 8:-16].view(8, dim, dstate)
    major: dict[str, Any] = {"u": strided, "z": strided.flip(0)}
    major["out"] = normal(3, dim, length, dtype=torch.float32).transpose(1, 2)
    yield sample("channel-major, padded slots", groups=(1,), ssm_state=wide, **major, **initial)
    yield sample("no slots", 3, 2, dstate=2 * dstate - 1, slots=None, null_slot=0, D=None, **initial)
    yield sample("words of four states", 3, 5, dstate=4, **initial)
    moved: dict[str, Any] = {"write_slots": indices(4, 7, 0, 9), "null_slot": 7}
    empty: dict[str, Any] = {"cu_seqlens": indices(0, length, length, tokens, dtype=torch.int64)}
    yield sample("packed, null rows", tokens, slots=indices((-1, 3), (0, 1), (7, 2)), null_slot=7, **packed, **initial)
    yield sample("packed, write slots", tokens, groups=(), **moved, **packed, **initial)
    out = normal(tokens + 4, dim, dtype=torch.float32)
    yield sample("packed, empty row", tokens + 4, write_slots=indices(4, 3, 0), out=out, **empty, **initial)

    long: dict[str, Any] = {"cu_seqlens": indices(0, 135, 140, 205), "write_slots": indices(3, 2, 7)}
    yield sample("packed, long", 205, groups=(1,), **long, **initial)
    stateless: dict[str, Any] = {"ssm_state": None, "slots": None, "write_slots": indices(3, 2, 4)}
    yield sample("write slots without states", 70, cu_seqlens=indices(0, 0, 68, 70), **stateless)

    # A row of 37 tokens whose first 5 end block 1; one of 3 tokens; one of 37, 12 of them at the end of block 1.
    table = indices((1, 2, 3, 4, 5), (6, -1, 6, 6, 6), (7, 0, 8, -1, 9), dtype=torch.int64)
    ends = indices(5, 21, 37, 40, 52, 56, 77)
    prefix: dict[str, Any] = {
        "ssm_state": normal(10, dim, dstate, dtype=state_dtype),
        "slots": table,
        "block_size": 16,
        "first_block": indices(1, 0, 1),
        "last_block": indices(4, 0, 4),
        "initial_block": indices(0, 1, 0),
        "chunk_ends": ends,
        "last_chunk": indices(2, 3, 6),
    }
    if length == 37:
        yield sample("prefix cache", tokens, **packed, **initial, **prefix)
