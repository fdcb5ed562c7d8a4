"""Prefill for Mamba-2: the selective state space recurrence (SSD) over whole sequences, computed chunk by chunk.

Within a chunk the recurrence is a masked product of matrices; between chunks only the state is carried.
"""

import math
from collections.abc import Iterator
from typing import Any

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
from mamba_ops.ops.pieces import Pieces, lay_out, most_chunks, row_count
from mamba_ops.ops.slots import initial_states, row_ends, store_rows
from mamba_ops.registry import Sample, bad_argument, given


@mamba.op(mutates=("ssm_state", "chunk_states", "out"))
def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    cu_seqlens: Tensor | None = None,
    computed_tokens: Tensor | None = None,
    ssm_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    chunk_states: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run the recurrence over every row's tokens, write their outputs, and keep the rows' last states in a cache.

    A row is a sequence: `(n, length, ...)`, or packed `(tokens, ...)` with `cu_seqlens`. Head h uses group
    h // (heads / groups) of B and C. Any strides, and any mix of float16, bfloat16, float32 and float64.

    Args:
        x: (..., heads, dim).
        dt: (..., heads), the step sizes.
        A: (heads,); negative.
        B, C: (..., groups, dstate), with heads a multiple of groups.
        chunk_size: tokens of a chunk, at most; any positive number. Results depend on it by rounding alone.
        D: skip weight, (heads,) or (heads, dim).
        z: gate, like x.
        dt_bias: added to dt, (heads,).
        dt_softplus: apply softplus to dt after the bias; linear above 20.
        dt_min, dt_max: limits of dt after the softplus, always applied: a negative dt counts as 0 unless dt_min says
            otherwise.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Tokens past
            the last row are neither read nor written.
        computed_tokens: int32 or int64, (n,): how many tokens of a row came before these. Its chunks end at multiples
            of chunk_size counted from the very first token, so the first one may be short. None: zero.
        ssm_state: cache (slots, heads, dim, dstate); mutated, rounded once at each store. None: no state is kept.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and no row is nobody.
        write_slots: the same for where the last state goes. None: where it came from. A null slot here means that the
            state is not stored.
        has_initial_state: bool, (n,): whether row i goes on from the state in its slot. None, or False: from zero.
        null_slot: a slot that means "nobody", as does any slot below 0. Such a row's output is zero, and nothing else
            is read or stored for it.
        chunk_states: (chunks, heads, dim, dstate), any float dtype; mutated. Row c becomes the state after chunk c,
            where chunks are numbered through all rows in order. What lies beyond the last chunk stays. At least
            tokens // chunk_size + n chunks (tokens: n * length without cu_seqlens), with computed_tokens n more.
        out: like x, any float dtype; mutated.

    For every row and head, in float32 at least, from the row's initial state s on:

        d = clamp(softplus(dt[t] + dt_bias), dt_min, dt_max)
        s = s * exp(A * d) + d * x[t] * B[t]
        out[t] = (sum(s * C[t]) + D * x[t]) * (z[t] * sigmoid(z[t]))

    A row without tokens has no chunk and no output; with a write slot other than its slot, its initial state is copied
    there. No two rows may store to one slot, nor one row store to a slot that another reads.

    The reference asks the host nothing: it lays the tokens out in as many chunks as there can be at most, or in halves,
    quarters, ... of them, until the square of their size is no more than that of a head's state.
    """
    output = given(out)
    cache, kept = ssm_state, chunk_states
    compute = torch.promote_types(x.dtype, torch.float32)
    heads, dim, dstate = *x.shape[-2:], B.shape[-1]
    n = row_count(x, cu_seqlens)
    if n == 0:
        return output

    size = chunk_size
    while size % 2 == 0 and size * size > dim * dstate:
        size //= 2
    pieces = lay_out(x, size, chunk_size // size, cu_seqlens, computed_tokens)
    empty = pieces.of_row == 0
    ends = row_ends(slots, write_slots, null_slot, empty, cache)
    initial = None
    if cache is not None and has_initial_state is not None:
        initial = initial_states(cache, ends, has_initial_state, compute)
    last = x.new_zeros(n, heads, dim, dstate, dtype=compute) if initial is None else initial
    if x.numel() > 0:
        inside = pieces.inside & ends.somebody[pieces.row].unsqueeze(1)
        u, d, b, c = (pieces.laid_out(tokens, inside, compute) for tokens in (x, dt, B, C))
        if dt_bias is not None:
            d = d + dt_bias.to(compute)
        if dt_softplus:  # not torch's softplus: on a CPU its last bits depend on where an element stands
            d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
        d = torch.where(inside.unsqueeze(2), d.clamp(dt_min, dt_max), 0)
        y, states = _scan(u, d, A.to(compute), b, c, initial, pieces)
        if D is not None:
            y = y + (D if D.dim() == 2 else D.unsqueeze(1)).to(compute) * u
        if z is not None:
            gate = pieces.laid_out(z, inside, compute)
            y = y * (gate / (1 + torch.exp(-gate)))

        last = torch.where(empty.view(n, 1, 1, 1), last, states[(pieces.end - 1).clamp(min=0)])
        if kept is not None:
            store_rows(kept, pieces.closes.cumsum(0) - 1, states, pieces.closes & ends.somebody[pieces.row])
        pieces.store(output, y)
    if cache is not None:
        store_rows(cache, ends.target, last, ends.stored)
    return output


@mamba_chunk_scan.outputs
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@mamba_chunk_scan.checks
def _checks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_min: float,
    dt_max: float,
    cu_seqlens: Tensor | None,
    computed_tokens: Tensor | None,
    ssm_state: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    has_initial_state: Tensor | None,
    chunk_states: Tensor | None,
    output: Tensor,
) -> None:
    cache, kept = ssm_state, chunk_states
    floats = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    floats |= {"ssm_state": cache, "chunk_states": kept}
    indices = {"cu_seqlens": cu_seqlens, "computed_tokens": computed_tokens, "slots": slots, "write_slots": write_slots}
    floating(x=x, **floats, out=output)
    one_device(x.device, **floats, **indices, has_initial_state=has_initial_state, out=output)

    if chunk_size < 1:
        raise bad_argument("chunk_size", got=chunk_size, expected="a positive number of tokens")
    if not dt_min <= dt_max:
        raise bad_argument("dt_min", got=dt_min, expected=f"at most dt_max, which is {dt_max}")
    packed_rows(cu_seqlens)
    if cu_seqlens is None:
        tensor_rank("x", x, {4: "(n, length, heads, dim)"}, hint="packed tokens come with cu_seqlens")
    else:
        tensor_rank("x", x, {3: "(tokens, heads, dim)"}, hint="with cu_seqlens, tokens are packed")
    *lead, heads, dim = x.shape
    tensor_rank("B", B, {x.dim(): "like x: (..., groups, dstate)"})
    groups, dstate = B.shape[-2:]
    for name, tensor, sizes in (("x", x, (heads, dim)), ("B", B, (groups, dstate))):
        if 0 in sizes:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected="only tokens of size 0")
    shape_is("dt", dt, (*lead, heads), hint="one step size a token and head of x")
    shape_is("A", A, (heads,), hint="one number a head of x")
    shape_is("B", B, (*lead, groups, dstate), hint="tokens are those of x")
    shape_is("C", C, tuple(B.shape), hint="C is like B")
    if heads % groups:
        raise bad_argument("B", got=f"{groups} groups", expected=f"a divisor of the {heads} heads")
    shape_is("D", D, (heads,), (heads, dim))
    shape_is("z", z, tuple(x.shape), hint="z is like x")
    shape_is("dt_bias", dt_bias, (heads,))
    shape_is("out", output, tuple(x.shape), hint="out is like x")

    n = row_count(x, cu_seqlens)
    if computed_tokens is not None:
        index_tensor("computed_tokens", computed_tokens)
        shape_is("computed_tokens", computed_tokens, (n,), hint="one for each row")
    slot_table("slots", slots, rows=n)
    slot_table("write_slots", write_slots, rows=n)
    initial_flags("ssm_state", cache, has_initial_state, rows=n)
    if cache is not None:
        shape_is("ssm_state", cache, (cache.shape[0], heads, dim, dstate), hint="(slots, heads, dim, dstate)")
        slot_for_each("ssm_state", cache, slots, rows=n)
    if kept is not None:
        shape_is("chunk_states", kept, (kept.shape[0], heads, dim, dstate), hint="(chunks, heads, dim, dstate)")
        most = most_chunks(math.prod(lead), n, chunk_size, computed_tokens)
        if kept.shape[0] < most:
            got, hint = f"{kept.shape[0]} chunks", "as many as there can be, whatever the rows' lengths"
            raise bad_argument("chunk_states", got=got, expected=f"at least {most}", hint=hint)


@mamba_chunk_scan.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    dim: int = 16,
    dstate: int = 16,
    groups: int = 2,
    chunk_size: int = 8,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change one thing each; rows have two chunks and a half."""
    random = torch.Generator().manual_seed(0)
    length = 5 * chunk_size // 2
    tokens = 2 * length + 3

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def states(count: int, dtype: torch.dtype = state_dtype) -> Tensor:
        return normal(count, heads, dim, dstate, dtype=dtype)

    def sample(name: str, *lead: int, groups: int = groups, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default."""
        lead = lead or (3, length)
        arguments = {
            "x": normal(*lead, heads, dim),
            "dt": normal(*lead, heads),
            "A": -normal(heads, dtype=torch.float32).exp(),
            "B": normal(*lead, groups, dstate),
            "C": normal(*lead, groups, dstate),
            "chunk_size": chunk_size,
            "D": normal(heads, dtype=torch.float32),
            "dt_bias": normal(heads, dtype=torch.float32),
            "dt_softplus": True,
            "ssm_state": states(8),
            "slots": indices(5, 1, 2),
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("x", "dt", "A", "B", "C", "chunk_size")), arguments)

    initial: dict[str, Any] = {"has_initial_state": torch.tensor((True, False, True), device=device)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    computed: dict[str, Any] = {"computed_tokens": indices(3, 2 * chunk_size, chunk_size - 1)}
    most = tokens // chunk_size + 6  # enough chunks for three packed rows

    yield sample("base")
    yield Sample("no optionals", sample("bare").args)
    yield sample("no softplus", dt_softplus=False)
    yield sample("dt above 20", dt=normal(3, length, heads) * 20, dt_bias=None)
    yield sample("dt limits", dt_min=0.25, dt_max=0.75)
    yield sample("D per channel", D=normal(heads, dim))
    yield sample("gate", z=normal(3, length, heads, dim))
    yield sample("one group", groups=1)
    yield sample("a group per head", groups=heads)
    yield sample("odd chunks", 1, length, slots=indices(5), chunk_size=3)
    yield sample("one long chunk", 2, 150, chunk_size=256, has_initial_state=initial["has_initial_state"][:2])
    yield sample("one token", 3, 1, **initial)
    yield sample("no rows", 0, length)
    yield sample("rows of no token", 3, 0, **initial)

    yield sample("initial states", **initial)
    yield sample("float16 states", ssm_state=states(8, torch.float16), **initial)
    wide = normal(8, heads * dim * dstate + 24, dtype=state_dtype)
    yield sample("padded slots", ssm_state=wide[:, 8:-16].view(8, heads, dim, dstate), **initial)
    transposed = normal(8, heads, dstate, dim, dtype=state_dtype).transpose(2, 3)
    yield sample("transposed state", ssm_state=transposed, **initial)
    yield sample("no slots", slots=None, null_slot=0, **initial)
    yield sample("slot table", slots=indices((5, 1), (0, 3), (7, 6), (2, 2), dtype=torch.int64), **initial)
    yield sample("write slots", write_slots=indices(4, 3, 7), **initial)
    yield sample("write slots alone", slots=None, write_slots=indices(4, 3, 7), **initial)
    yield sample("null rows", slots=indices(-1, 3, -7), **initial)
    yield sample("null slot 0", slots=indices(5, 0, 2), null_slot=0, **initial)
    yield sample("null destination", write_slots=indices(4, -1, 0), null_slot=0, **initial)

    yield sample("packed", tokens, **packed)
    yield sample("packed, initial states", tokens, **packed, **initial)
    yield sample("packed, empty rows", length, cu_seqlens=indices(0, 0, length, length, dtype=torch.int64))
    copied: dict[str, Any] = {"cu_seqlens": indices(0, length, length, length), "write_slots": indices(3, 4, 6)}
    yield sample("packed, empty rows, write slots", length, **copied, **initial)
    yield sample("packed, tokens past the end", tokens + 5, **packed, out=normal(tokens + 5, heads, dim))
    yield sample("absolute chunks", **computed, **initial)
    yield sample("absolute chunks, packed", tokens, **packed, **computed, **initial)
    yield sample("chunk states", chunk_states=states(3 * length // chunk_size + 3))
    changes: dict[str, Any] = {**packed, **computed, "slots": indices(5, -1, 2), "chunk_states": states(2 * most)[::2]}
    yield sample("chunk states, packed", tokens, **changes, **initial)

    yield sample("float32 output", out=normal(3, length, heads, dim, dtype=torch.float32))
    other = torch.float16 if dtype != torch.float16 else torch.float32
    mixed: dict[str, Any] = {
        "B": normal(3, length, groups, dstate, dtype=other),
        "A": -normal(heads, dtype=other).abs(),
    }
    yield sample("mixed dtypes", **mixed, dt=normal(3, length, heads, dtype=other))
    strided: dict[str, Any] = {"z": normal(dim, length, heads, 3).permute(3, 1, 2, 0)}
    strided |= {"B": normal(dstate, groups, length, 3).permute(3, 2, 1, 0)}
    x, out = (normal(3, heads, dim, length, dtype=d).permute(0, 3, 1, 2) for d in (dtype, torch.float32))
    yield sample("transposed activations", **strided, x=x, out=out)
    sizes = [heads * dim, groups * dstate, groups * dstate, heads]
    x, B, C, dt = normal(tokens, sum(sizes)).split(sizes, dim=1)
    views: dict[str, Any] = {"x": x.unflatten(1, (heads, dim)), "B": B.unflatten(1, (groups, dstate)), "dt": dt}
    yield sample("views of a projection", tokens, **packed, **views, C=C.unflatten(1, (groups, dstate)))
    yield sample(
        "everything",
        tokens + 5,
        **packed,
        **computed,
        **initial,
        D=normal(heads, dim),
        z=normal(tokens + 5, heads, dim),
        dt_min=0.1,
        dt_max=2.0,
        slots=indices((5, 1), (0, 3), (7, 6)),
        write_slots=indices((2, 4), (3, 0), (0, -1)),
        null_slot=0,
        chunk_states=states(most + 2),
        out=normal(tokens + 5, heads, dim),
    )


def _scan(
    x: Tensor, d: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, pieces: Pieces
) -> tuple[Tensor, Tensor]:
    """The outputs, laid out as x is, and the state after every piece; all in one dtype, places without a token zero."""
    count, size, heads, dim = x.shape
    groups, dstate = B.shape[-2:]

    # The decay from before the piece to each token, and to the piece's end; by head, or group, before token from here.
    a = (d * A).cumsum(1).transpose(1, 2)
    whole = a[..., -1:]
    x = (x * d.unsqueeze(3)).transpose(1, 2)
    B, C = B.transpose(1, 2), C.transpose(1, 2)

    # What a piece adds to the state, and the state after every piece.
    ends = (x * torch.exp(whole - a).unsqueeze(3)).reshape(count, groups, -1, size, dim)
    states = (ends.transpose(-1, -2).flatten(2, 3) @ B).view(count, heads, dim, dstate)
    decay = torch.exp(whole).unsqueeze(3)
    begins = (pieces.number == 0).view(-1, 1, 1, 1)
    if initial is not None:
        initial = torch.where(begins, initial[pieces.row], 0)
        states += decay * initial
    reach = 1  # how many pieces a state has in it; each turn doubles that, without passing its row's first
    while reach < pieces.longest:
        near = (pieces.number[reach:] < reach).view(-1, 1, 1, 1)
        states[reach:] += (decay[reach:] * states[:-reach]).masked_fill_(near, 0)
        decay[reach:] *= decay[:-reach].masked_fill(near, 1)
        reach *= 2
    before = states.roll(1, 0).masked_fill_(begins, 0)
    if initial is not None:
        before += initial

    # What a token reads of the state before the piece, and of the piece's tokens up to itself.
    y = (C @ before.view(count, groups, -1, dstate).transpose(-1, -2)).view(count, groups, size, -1, dim)
    y = y.transpose(2, 3).reshape(count, heads, size, dim) * torch.exp(a).unsqueeze(3)
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    weights = (a.unsqueeze(3) - a.unsqueeze(2)).masked_fill_(later, -torch.inf).exp_()
    weights.view(count, groups, -1, size, size).mul_((C @ B.transpose(-1, -2)).unsqueeze(2))
    return (y + weights @ x).transpose(1, 2), states
