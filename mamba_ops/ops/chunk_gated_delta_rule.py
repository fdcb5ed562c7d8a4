"""Prefill with the gated delta rule: the recurrence over whole sequences, computed chunk by chunk.

Within a chunk what every token writes follows from a triangular system; between chunks only the state is carried.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.checking import (
    floating,
    initial_flags,
    one_device,
    packed_rows,
    shape_is,
    slot_for_each,
    slot_table,
    tensor_rank,
)
from mamba_ops.ops.gated_delta_rule_update import EPS, delta_rule_tokens
from mamba_ops.ops.pieces import lay_out, row_count
from mamba_ops.ops.slots import initial_states, row_ends, store_rows
from mamba_ops.registry import Sample, bad_argument, given

CHUNK = 64


@mamba.op(mutates=("state", "out"))
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Run the recurrence over every row's tokens, write their outputs, and keep the rows' last states in a cache.

    A row is a sequence: `(n, length, ...)`, or packed `(tokens, ...)` with `cu_seqlens`. Head h of v, of the state, of
    g and of beta uses head h // (v_heads / k_heads) of q and k. Any strides (heads whose numbers lie together are the
    fast path of kernels), and any mix of float16, bfloat16, float32 and float64.

    Args:
        q, k: (..., k_heads, k_dim).
        v: (..., v_heads, v_dim), with v_heads a multiple of k_heads.
        g: (..., v_heads), the log of the decay; at most 0.
        beta: (..., v_heads), 0 to 1, or to 2 where eigenvalues may be negative.
        scale: of q. None: k_dim ** -0.5.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Tokens past
            the last row are neither read nor written.
        state: cache (slots, v_heads, v_dim, k_dim); mutated, rounded once at each store. None: no state is kept.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and no row is nobody.
        write_slots: the same for where the last state goes. None: where it came from. A null slot here means that the
            state is not stored.
        has_initial_state: bool, (n,): whether row i goes on from the state in its slot. None, or False: from zero.
        qk_l2norm: divide every head of q and k by its length: by sqrt(sum(x^2) + 1e-6).
        null_slot: a slot that means "nobody", as does any slot below 0. Such a row's output is zero, and nothing else
            is read or stored for it.
        out: like v, any float dtype, in other memory; mutated.

    For every row and head, in float32 at least, from the row's initial state S on:

        S = S * exp(g[t])
        S = S + beta[t] * (v[t] - S k[t]) k[t]^T
        out[t] = S (scale * q[t])

    A row without tokens has no output; with a write slot other than its slot, its initial state is copied there. No two
    rows may store to one slot, nor one row store to a slot that another reads.

    The algorithm is that of "Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang, Kautz and Hatamizadeh), in
    chunks of 64 tokens counted from a row's first one. With G the sum of g up to a token of a chunk, and S the state
    before it, what the tokens write, U, solves (I + A) U = beta * (V - exp(G) K S^T) with
    A[i, j] = beta[i] (k[i] . k[j]) exp(G[i] - G[j]) for j < i.
    """
    output = given(out)
    compute = torch.promote_types(q.dtype, torch.float32)
    v_heads, v_dim, k_dim, n = v.shape[-2], v.shape[-1], q.shape[-1], row_count(v, cu_seqlens)
    if n == 0:
        return output
    pieces = lay_out(v, CHUNK, 1, cu_seqlens, None)
    empty = pieces.of_row == 0
    ends = row_ends(slots, write_slots, null_slot, empty, state)
    last = v.new_zeros(n, v_heads, v_dim, k_dim, dtype=compute)
    if state is not None and has_initial_state is not None:
        last = initial_states(state, ends, has_initial_state, compute)
    if v.numel() == 0:
        if state is not None:
            store_rows(state, ends.target, last, ends.stored)
        return output

    inside = pieces.inside & ends.somebody[pieces.row].unsqueeze(1)

    def laid_out(tokens: Tensor) -> Tensor:
        """An activation as (pieces, heads, CHUNK, ...), zero where there is no token; heads of q and k as of v."""
        return pieces.laid_out(tokens, inside, compute).transpose(1, 2)

    queries, keys, values, much = laid_out(q), laid_out(k), laid_out(v), laid_out(beta).unsqueeze(3)
    if qk_l2norm:
        queries, keys = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) for x in (queries, keys))
    queries = queries * (k_dim**-0.5 if scale is None else scale)
    of_one = v_heads // q.shape[-2]
    total = laid_out(g).cumsum(2).unsqueeze(3)
    between = total - total.transpose(2, 3)  # the decay from one token to another; above the diagonal it may overflow
    before = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    between = torch.exp(torch.where(before, between, -torch.inf))

    products = (keys @ keys.transpose(2, 3)).repeat_interleave(of_one, 1)
    weights = (queries @ keys.transpose(2, 3)).repeat_interleave(of_one, 1) * between
    queries, keys = (x.repeat_interleave(of_one, 1) for x in (queries, keys))
    system = (much * products * between).tril(-1)
    sides = torch.cat([much * values, much * torch.exp(total) * keys], dim=3)
    # What is written with nothing before, and how much of the state before the chunk that takes off.
    alone, through = (_inverse(system) @ sides).split([v_dim, k_dim], dim=3)
    opened = torch.exp(total) * queries
    closing, decay = torch.exp(total[:, :, -1:] - total) * keys, torch.exp(total[:, :, -1:])

    y = torch.zeros_like(values)
    first = pieces.end - pieces.of_row
    for number in range(pieces.longest):
        exists = number < pieces.of_row
        piece = torch.where(exists, first + number, 0)
        new = alone[piece] - through[piece] @ last.transpose(2, 3)
        store_rows(y, piece, opened[piece] @ last.transpose(2, 3) + weights[piece] @ new, exists)
        after = decay[piece] * last + new.transpose(2, 3) @ closing[piece]
        last = torch.where(exists.view(n, 1, 1, 1), after, last)

    pieces.store(output, y.transpose(1, 2))
    if state is not None:
        store_rows(state, ends.target, last, ends.stored)
    return output


def _inverse(system: Tensor) -> Tensor:
    """Return the inverse of 1 + system, `(..., CHUNK, CHUNK)`, which is strictly lower triangular.

    Not by torch's solver, which on a GPU may choose its algorithm by how many systems there are: the last bits of a row
    would depend on the other rows. Parts of 16 on the diagonal are solved by elimination, a column after the other.
    With P made of their inverses, and N = P @ (what is left of the system), N^4 is zero, and the whole inverse is
    (1 - N) (1 + N^2) P.
    """
    size = 16
    parts = CHUNK // size
    blocks = system.unflatten(-1, (parts, size)).unflatten(-3, (parts, size)).transpose(-3, -2)
    own = blocks.diagonal(dim1=-4, dim2=-3).movedim(-1, -3)
    solved = torch.eye(size, dtype=system.dtype, device=system.device).expand_as(own)
    for j in range(size - 1):
        solved = solved - own[..., j : j + 1] * solved[..., j : j + 1, :]
    place = torch.arange(parts, device=system.device)
    same = (place.unsqueeze(1) == place).view(parts, parts, 1, 1)
    whole = torch.where(same, solved.unsqueeze(-3), 0).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    left = torch.where(same, 0, blocks).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    n = whole @ left
    whole = whole + n @ (n @ whole)
    return whole - n @ whole


@chunk_gated_delta_rule.outputs
def _output(v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@chunk_gated_delta_rule.checks
def _checks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    has_initial_state: Tensor | None,
    output: Tensor,
) -> None:
    floats = {"q": q, "k": k, "g": g, "beta": beta, "state": state}
    indices = {"cu_seqlens": cu_seqlens, "slots": slots, "write_slots": write_slots}
    floating(v=v, **floats, out=output)
    one_device(v.device, "v", **floats, **indices, has_initial_state=has_initial_state, out=output)

    packed_rows(cu_seqlens)
    if cu_seqlens is None:
        tensor_rank("v", v, {4: "(n, length, v_heads, v_dim)"}, hint="packed tokens come with cu_seqlens")
    else:
        tensor_rank("v", v, {3: "(tokens, v_heads, v_dim)"}, hint="with cu_seqlens, tokens are packed")
    *lead, v_heads, v_dim = v.shape
    tensor_rank("q", q, {v.dim(): "(..., k_heads, k_dim), with the tokens of v"})
    k_dim = q.shape[-1]
    for name, tensor in (("v", v), ("q", q)):
        if 0 in tensor.shape[-2:]:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected="only tokens of size 0")
    delta_rule_tokens(q, k, tuple(lead), v_heads, k_dim)
    shape_is("g", g, (*lead, v_heads), hint="one number a token and head of v")
    shape_is("beta", beta, (*lead, v_heads), hint="one number a token and head of v")
    shape_is("out", output, tuple(v.shape), hint="out is like v")

    n = row_count(v, cu_seqlens)
    slot_table("slots", slots, rows=n)
    slot_table("write_slots", write_slots, rows=n)
    initial_flags("state", state, has_initial_state, rows=n)
    if state is not None:
        shape_is("state", state, (state.shape[0], v_heads, v_dim, k_dim), hint="(slots, v_heads, v_dim, k_dim)")
        slot_for_each("state", state, slots, rows=n)


@chunk_gated_delta_rule.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
    length: int = 75,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each; rows have a chunk and a bit."""
    random = torch.Generator().manual_seed(0)
    tokens = 2 * length + 3

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def sample(name: str, *lead: int, k_heads: int = k_heads, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default; q, k, v are parts of one tensor."""
        lead = lead or (3, length)
        keys, values = k_heads * k_dim, v_heads * v_dim
        q, k, v = normal(*lead, 2 * keys + values).split([keys, keys, values], dim=-1)
        arguments = {
            "q": q.unflatten(-1, (k_heads, k_dim)),
            "k": k.unflatten(-1, (k_heads, k_dim)),
            "v": v.unflatten(-1, (v_heads, v_dim)),
            "g": -0.1 * normal(*lead, v_heads, dtype=torch.float32).abs(),  # the last token still knows the first
            "beta": normal(*lead, v_heads).sigmoid(),
            "state": normal(9, v_heads, v_dim, k_dim, dtype=state_dtype),
            "slots": indices(5, 1, 2),
            "qk_l2norm": True,
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("q", "k", "v", "g", "beta")), arguments)

    initial: dict[str, Any] = {"has_initial_state": torch.tensor((True, False, True), device=device)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    empty: dict[str, Any] = {
        "cu_seqlens": indices(0, length, length, length, tokens, dtype=torch.int64),
        "slots": indices(5, 1, 2, 6),
        "write_slots": indices(4, 1, 3, 0),
        "has_initial_state": torch.tensor((True, False, True, True), device=device),
    }
    wide = normal(9, v_heads * v_dim * k_dim + 16, dtype=state_dtype)[:, 8:-8].view(9, v_heads, v_dim, k_dim)
    turned = normal(9, v_heads, k_dim, v_dim, dtype=state_dtype).transpose(2, 3)
    doubled, strong = 2 * normal(1, length, v_heads).sigmoid(), -40 * normal(1, length, v_heads).abs()
    yield sample("base", **initial)
    short = {"qk_l2norm": False, "scale": 0.3, "k": normal(2, 9, k_heads, k_dim) / k_dim**0.5}
    yield Sample("no cache", sample("bare", 2, 9).args, {"qk_l2norm": True})
    yield sample("not normalised, no slots", 2, 9, **short, slots=None, null_slot=0)
    yield sample("negative eigenvalues", 1, length, beta=doubled, k_heads=1, state=turned)
    yield sample("strong decay", 1, length, g=strong, k_heads=v_heads, state=wide)
    channel_major = normal(v_heads, v_dim, tokens).permute(2, 0, 1)
    moved: dict[str, Any] = {"write_slots": indices(7, -1, 0, 8), "null_slot": 7, "v": channel_major}
    yield sample("packed, null rows", tokens, slots=indices((-1, 3), (0, 1), (7, 2)), null_slot=7, **packed, **initial)
    yield sample("packed, write slots", tokens, **moved, **packed, **initial)
    out = normal(v_heads, v_dim, tokens + 4, dtype=torch.float32).permute(2, 0, 1)
    yield sample("packed, empty rows", tokens + 4, out=out, **empty)
