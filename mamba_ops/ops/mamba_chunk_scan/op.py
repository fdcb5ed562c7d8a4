"""Prefill for Mamba-2: the selective state space recurrence (SSD) over whole sequences, computed chunk by chunk.

Within a chunk the recurrence is a masked product of matrices; between chunks only the state is carried.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.checking import (
    check_chunk_size,
    check_limits,
    check_tensors,
    count_of,
    index_tensor,
    initial_flags,
    packed_rows,
    shape_is,
    slot_for_each,
    slot_table,
    tensor_rank,
)
from mamba_ops.ops._common.chunk_layout import most_chunks, row_count
from mamba_ops.ops._common.values import check_counts, check_sequences
from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of mamba_chunk_scan: what its checks and its kernels get."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    chunk_size: int
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    cu_seqlens: Tensor | None
    num_computed_tokens: Tensor | None
    ssm_state: Tensor | None
    slots: Tensor | None
    write_slots: Tensor | None
    has_initial_state: Tensor | None
    null_slot: int
    chunk_states: Tensor | None
    output: Tensor


@mamba.op(
    mutates=("ssm_state", "chunk_states", "out"),
    reference="mamba_ops.ops.mamba_chunk_scan.reference:mamba_chunk_scan",
    arguments=Arguments,
    replaces="mamba_chunk_scan|ssd_|mamba_split_conv1d",
)
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
    num_computed_tokens: Tensor | None = None,
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
        A: (heads,); negative. At -inf a step of 0 decays nothing, and any other all.
        B, C: (..., groups, dstate), with heads a multiple of groups.
        chunk_size: tokens of a chunk, 1 to 4096. Results depend on it by rounding alone.
        D: skip weight, (heads,) or (heads, dim).
        z: gate, like x.
        dt_bias: added to dt, (heads,).
        dt_softplus: apply softplus to dt after the bias; linear above 20.
        dt_min, dt_max: limits of dt after the softplus, always applied: a negative dt counts as 0 unless dt_min says
            otherwise.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Tokens past
            the last row are neither read nor written.
        num_computed_tokens: int32 or int64, (n,): how many tokens of a row came before these. Its chunks end at
            multiples of chunk_size counted from the very first token, so the first one may be short. None: zero.
        ssm_state: cache (slots, heads, dim, dstate); mutated, rounded once at each store. None: no state is kept.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and none is padding.
        write_slots: the same for where the last state goes. None: where it came from. A null slot here means that the
            state is not stored.
        has_initial_state: bool, (n,): whether row i goes on from the state in its slot. None, or False: from zero.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing else is read or
            stored for it.
        chunk_states: (chunks, heads, dim, dstate), any float dtype; mutated. Row c becomes the state after chunk c,
            where chunks are numbered through all rows in order. Entries beyond the last chunk stay. At least
            tokens // chunk_size + n chunks (tokens: n * length without cu_seqlens), with num_computed_tokens n more.
        out: like x, any float dtype, in other memory; mutated.

    For every row and head, in float32 at least, from the row's initial state s on:

        d = clamp(softplus(dt[t] + dt_bias), dt_min, dt_max)
        s = s * exp(A * d) + d * x[t] * B[t]
        out[t] = (sum(s * C[t]) + D * x[t]) * (z[t] * sigmoid(z[t]))

    A row without tokens has no chunk and no output; with a write slot other than its slot, its initial state is copied
    there. No two rows may store to one slot, nor one row store to a slot that another reads.

    The reference reads nothing on the host but lengths on a CPU, where it reads rows one by one in chunks of up to 64
    tokens. Elsewhere, and for chunk_states, it arranges the tokens in as many chunks as there can be, or in halves,
    quarters, ... of chunks, until the square of their size is at most the size of a head's state.
    """


@mamba_chunk_scan.allocate_output
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@mamba_chunk_scan.validate
def _validate(call: Arguments) -> None:
    cache, kept = call.ssm_state, call.chunk_states
    check_tensors(call, "x")
    check_chunk_size(call.chunk_size)
    check_limits(call.dt_min, call.dt_max)
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("x", call.x, {4: "(n, length, heads, dim)"}, hint="packed tokens come with cu_seqlens")
    else:
        tensor_rank("x", call.x, {3: "(tokens, heads, dim)"}, hint="with cu_seqlens, tokens are packed")
    *lead, heads, dim = call.x.shape
    tensor_rank("B", call.B, {call.x.dim(): "like x: (..., groups, dstate)"})
    groups, dstate = call.B.shape[-2:]
    for name, tensor, sizes in (("x", call.x, (heads, dim)), ("B", call.B, (groups, dstate))):
        if 0 in sizes:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected="only tokens of size 0")
    shape_is("dt", call.dt, (*lead, heads), hint="one step size a token and head of x")
    shape_is("A", call.A, (heads,), hint="one number a head of x")
    shape_is("B", call.B, (*lead, groups, dstate), hint="tokens are those of x")
    shape_is("C", call.C, tuple(call.B.shape), hint="C is like B")
    if heads % groups:
        raise bad_argument("B", got=f"{groups} groups", expected=f"a divisor of the {heads} heads")
    shape_is("D", call.D, (heads,), (heads, dim))
    shape_is("z", call.z, tuple(call.x.shape), hint="z is like x")
    shape_is("dt_bias", call.dt_bias, (heads,))
    shape_is("out", call.output, tuple(call.x.shape), hint="out is like x")

    n = row_count(call.x, call.cu_seqlens)
    if call.num_computed_tokens is not None:
        index_tensor("num_computed_tokens", call.num_computed_tokens)
        shape_is("num_computed_tokens", call.num_computed_tokens, (n,), hint="one for each row")
    slot_table("slots", call.slots, rows=n)
    slot_table("write_slots", call.write_slots, rows=n)
    initial_flags("ssm_state", cache, call.has_initial_state, rows=n)
    if cache is not None:
        shape_is("ssm_state", cache, (count_of(cache), heads, dim, dstate), hint="(slots, heads, dim, dstate)")
        slot_for_each("ssm_state", cache, call.slots, rows=n)
    if kept is not None:
        shape_is("chunk_states", kept, (count_of(kept), heads, dim, dstate), hint="(chunks, heads, dim, dstate)")
        most = most_chunks(math.prod(lead), n, call.chunk_size, call.num_computed_tokens)
        if kept.shape[0] < most:
            got, hint = f"{kept.shape[0]} chunks", "as many as there can be, whatever the rows' lengths"
            raise bad_argument("chunk_states", got=got, expected=f"at least {most}", hint=hint)


@mamba_chunk_scan.validate_values
def _validate_values(call: Arguments) -> None:
    check_sequences(call, call.x, "ssm_state")
    check_counts("num_computed_tokens", call.num_computed_tokens, 0)


def _unsupported(x: Tensor, B: Tensor) -> str | None:
    """Takes no float64 x, and a dstate of at most 256."""
    if B.shape[-1] > 256:
        return f"takes a dstate of at most 256, and B has {B.shape[-1]}"
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None


triton.implements(mamba_chunk_scan, "mamba_ops.ops.mamba_chunk_scan.triton:mamba_chunk_scan", unsupported=_unsupported)
