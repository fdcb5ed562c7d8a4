"""Prefill for Mamba-1: the selective scan over whole sequences, where every channel has its own state."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import cpp, triton
from mamba_ops.ops._common.checking import (
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
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.values import check_sequences
from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.selective_scan import cpp as on_cpp
from mamba_ops.ops.selective_scan.blocks import check_blocks
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of selective_scan: what its checks and its kernels get."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    cu_seqlens: Tensor | None
    ssm_state: Tensor | None
    slots: Tensor | None
    write_slots: Tensor | None
    has_initial_state: Tensor | None
    null_slot: int
    block_size: int
    first_block: Tensor | None
    last_block: Tensor | None
    initial_block: Tensor | None
    chunk_ends: Tensor | None
    last_chunk: Tensor | None
    output: Tensor


@mamba.op(
    mutates=("ssm_state", "out"),
    reference="mamba_ops.ops.selective_scan.reference:selective_scan",
    arguments=Arguments,
    replaces="selective_scan|mamba_inner",
)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
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
        x: (..., dim).
        dt: (..., dim), the step sizes.
        A: (dim, dstate); negative. At -inf a step of 0 decays nothing, and any other all.
        B, C: (..., groups, dstate), with dim a multiple of groups, or (..., dstate): one group.
        D: skip weight, (dim,).
        z: gate, like x.
        dt_bias: added to dt, (dim,).
        dt_softplus: apply softplus to dt after the bias; linear above 20.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Tokens past
            the last row are neither read nor written.
        ssm_state: cache (slots, dim, dstate); mutated, rounded once at each store. None: no state is kept.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and none is padding. With block_size the columns are positions, see below.
        write_slots: the same for where the last state goes. None: where it came from. A null slot here means that the
            state is not stored.
        has_initial_state: bool, (n,): whether row i goes on from the state in its slot. None, or False: from zero.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing else is read or
            stored for it.
        block_size: tokens of a block of the prefix cache, which keeps a row's state at the end of every block; 0: there
            is no such cache, and none of the next five. Otherwise all five, cu_seqlens, ssm_state and slots are given.
        first_block, last_block, initial_block: int32 or int64, (n,): columns of slots. Row i's tokens begin in block
            first_block[i] and its last state goes to column last_block[i]; its initial state is in column
            initial_block[i], and the row is padding if the slot there is null.
        chunk_ends: int32 or int64, (chunks,): where each chunk ends among the packed tokens; chunks follow each other,
            and none has tokens of two rows.
        last_chunk: int32 or int64, (n,): the last chunk of row i; its first one follows that of the row before. A row
            without tokens has no chunk: last_chunk[i] is that of the row before, and -1 if there is none.
        out: like x, any float dtype, in other memory; mutated.

    For every row and channel, in float32 at least, from the row's initial state s on:

        d = softplus(dt[t] + dt_bias)
        s = s * exp(A * d) + d * B[t] * x[t]
        out[t] = (sum(s * C[t]) + D * x[t]) * (z[t] * sigmoid(z[t]))

    A row without tokens has no output; with a write slot other than its slot, its initial state is copied there. No two
    rows may store to one slot, nor one row store to a slot that another reads.

    With block_size > 0 a state is stored after every chunk of row i: after the last one in column last_block[i], after
    another one in column (p - 1) // block_size, p counting the row's tokens so far from first_block[i] * block_size
    on; where a row has several chunks and the first is shorter than a block, that one is taken to end at the end of its
    block. A null slot in such a column skips that store, and rows without tokens store nothing.
    """


selective_scan.by_rows = True  # on Triton lanes share the states of many


@selective_scan.allocate_output
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@selective_scan.validate
def _validate(call: Arguments) -> None:
    prefix = {"first_block": call.first_block, "last_block": call.last_block, "initial_block": call.initial_block}
    prefix |= {"last_chunk": call.last_chunk, "chunk_ends": call.chunk_ends}
    check_tensors(call, "x", indices=prefix)
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("x", call.x, {3: "(n, length, dim)"}, hint="packed tokens come with cu_seqlens")
    else:
        tensor_rank("x", call.x, {2: "(tokens, dim)"}, hint="with cu_seqlens, tokens are packed")
    *lead, dim = call.x.shape
    tensor_rank("A", call.A, {2: "(dim, dstate)"})
    dstate = call.A.shape[1]
    if dim == 0 or dstate == 0:
        raise bad_argument("A", got=f"shape {tuple(call.A.shape)}", expected="no size of 0")
    shape_is("dt", call.dt, tuple(call.x.shape), hint="dt is like x")
    shape_is("A", call.A, (dim, dstate), hint="one row a channel of x")
    rank = call.x.dim()
    tensor_rank("B", call.B, {rank: "(..., dstate)", rank + 1: "(..., groups, dstate), with the tokens of x"})
    groups = call.B.shape[-2] if call.B.dim() > rank else 1
    shape_is("B", call.B, (*lead, dstate), (*lead, groups, dstate), hint="tokens are those of x, dstate is A's")
    shape_is("C", call.C, tuple(call.B.shape), hint="C is like B")
    if groups == 0 or dim % groups:
        raise bad_argument("B", got=f"{groups} groups", expected=f"a divisor of the {dim} channels")
    shape_is("D", call.D, (dim,))
    shape_is("z", call.z, tuple(call.x.shape), hint="z is like x")
    shape_is("dt_bias", call.dt_bias, (dim,))
    shape_is("out", call.output, tuple(call.x.shape), hint="out is like x")

    n = row_count(call.x, call.cu_seqlens)
    slot_table("slots", call.slots, rows=n)
    slot_table("write_slots", call.write_slots, rows=n)
    initial_flags("ssm_state", call.ssm_state, call.has_initial_state, rows=n)
    if call.ssm_state is not None:
        shape_is("ssm_state", call.ssm_state, (count_of(call.ssm_state), dim, dstate), hint="(slots, dim, dstate)")
        slot_for_each("ssm_state", call.ssm_state, call.slots, rows=n)

    if not 0 <= call.block_size < 2**31:  # more times a number of blocks would not fit in an int64
        raise bad_argument("block_size", got=call.block_size, expected="0 or a number of tokens below 2**31")
    if call.block_size == 0:
        for name, tensor in prefix.items():
            if tensor is not None:
                raise bad_argument(name, got="a tensor", expected="none without block_size")
        return
    for name, tensor in {
        "cu_seqlens": call.cu_seqlens,
        "ssm_state": call.ssm_state,
        "slots": call.slots,
        **prefix,
    }.items():
        if tensor is None:
            hint = "the prefix cache keeps states of packed rows at the ends of blocks"
            raise bad_argument(name, got="none", expected="a tensor with block_size", hint=hint)
    if call.write_slots is not None:
        raise bad_argument(
            "write_slots", got="a tensor", expected="none with block_size", hint="slots has the columns of all blocks"
        )
    for name, tensor in prefix.items():
        if tensor is not None:
            index_tensor(name, tensor)
            if name != "chunk_ends":
                shape_is(name, tensor, (n,), hint="one for each row")
    if call.chunk_ends is not None:
        tensor_rank("chunk_ends", call.chunk_ends, {1: "(chunks,)"})
    if call.slots is not None:
        tensor_rank("slots", call.slots, {2: "(n, positions), one column a block"})


@selective_scan.validate_values
def _validate_values(call: Arguments) -> None:
    if call.block_size:
        check_blocks(call)
    else:
        check_sequences(call, call.x, "ssm_state")


def _unsupported(x: Tensor, A: Tensor) -> str | None:
    """Takes no float64 x, and a dstate of at most 256."""
    if A.shape[1] > 256:
        return f"takes a dstate of at most 256, and A has {A.shape[1]}"
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None


triton.implements(selective_scan, "mamba_ops.ops.selective_scan.triton:selective_scan", unsupported=_unsupported)
cpp.implements(selective_scan, on_cpp.__name__ + ":selective_scan", unsupported=on_cpp.unsupported)
