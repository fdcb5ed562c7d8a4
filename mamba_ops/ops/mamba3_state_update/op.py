"""mamba3_state_update: a decode step of Mamba-3's recurrence, or a few of them, for every row of a batch."""

from typing import NamedTuple

from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.checking import (
    accepted_tokens,
    check_tensors,
    packed_rows,
    slot_for_each,
    slot_table,
    slots_for,
    tensor_rank,
)
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.mamba3_checks import CACHES, check_caches, check_tokens, output_shape, unsupported_by_triton
from mamba_ops.ops._common.values import check_updates
from mamba_ops.ops._namespace import mamba


class Arguments(NamedTuple):
    """A call of mamba3_state_update: what its checks and its kernels get."""

    angle_state: Tensor
    ssm_state: Tensor
    k_state: Tensor
    v_state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    trap: Tensor
    angles: Tensor
    B: Tensor
    C: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    D: Tensor | None
    z: Tensor | None
    mimo_x: Tensor | None
    mimo_z: Tensor | None
    mimo_o: Tensor | None
    slots: Tensor | None
    write_slots: Tensor | None
    cu_seqlens: Tensor | None
    num_accepted_tokens: Tensor | None
    null_slot: int
    output: Tensor


@mamba.op(
    mutates=("angle_state", "ssm_state", "k_state", "v_state", "out"),
    composed=True,
    reference="mamba_ops.ops.mamba3_state_update.reference:mamba3_state_update",
    arguments=Arguments,
    replaces="mamba3_step",
    gradients_in="mamba_ops.functional.mamba3_chunk_scan",
)
def mamba3_state_update(
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Advance Mamba-3's states of every row by the row's tokens, in place, and write the tokens' outputs.

    The tokens come in one of three layouts: `(n, ...)`, one token a row; `(n, length, ...)`, a few tokens a row; or
    packed `(tokens, ...)` with `cu_seqlens`. The recurrence is that of mamba3_chunk_scan, which says what MIMO is; k
    and q are not rounded here. On Triton SISO has a kernel of its own. All else is composed of selective_state_update,
    which reads three tokens for each: one that adds the product of the token before, one that decays the state, and one
    that adds this one's; MIMO: of the first and the last kind as many as the rank.

    Args:
        angle_state: cache (slots, heads, angles), from -pi to pi; mutated.
        ssm_state: cache (slots, heads, dim, dstate); mutated.
        k_state: cache (slots, heads, dstate) of the last B, turned; mutated. MIMO: (slots, rank, heads, dstate).
        v_state: cache (slots, heads, dim) of the last x; mutated.
        x: (..., heads, dim).
        dt: (..., heads), the step sizes; positive.
        A: (..., heads), the rates; negative. A * dt above 0 counts as 0.
        trap: (..., heads): sigmoid(trap) is how much of a step goes to its own token, the rest to the one before.
        angles: (..., angles), raw; of all heads. At most dstate / 2.
        B, C: (..., groups, dstate), with heads a multiple of groups. MIMO: (..., rank, groups, dstate).
        B_bias, C_bias: (heads, dstate), added to B and C. MIMO: (heads, rank, dstate).
        D: skip weight, (heads,).
        z: gate, like x.
        mimo_x: (heads, rank, dim): input r of a head is x * mimo_x[:, r]. None: SISO.
        mimo_z: (heads, rank, dim), with mimo_x and z: gate r of a head is z * mimo_z[:, r].
        mimo_o: (heads, rank, dim), with mimo_x: the weights with which outputs are summed over the rank. None: they are
            not summed.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's states are, in column 0. None:
            row i uses slot i, and none is padding.
        write_slots: the same for where the new states go. None: where they came from. A null slot here means that the
            states are not stored.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. An empty row
            neither reads nor writes; tokens past the last row are left alone.
        num_accepted_tokens: int32 or int64, (n,), for speculative decoding; needs slots, and is at most their columns.
            Row i then starts from column max(num_accepted_tokens[i] - 1, 0) of its slots, and the states after its
            token t are stored in column t of its write_slots; beyond the columns nothing is stored. Otherwise the last
            states are stored in column 0.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing else is read or
            stored for it.
        out: like x, any float dtype, in other memory; mutated. MIMO without mimo_o: (..., rank, heads, dim).

    No two rows may store to one slot, nor one row store to a slot that another reads.
    """


@mamba3_state_update.allocate_output
def _output(x: Tensor, mimo_x: Tensor | None, mimo_o: Tensor | None) -> Tensor:
    return x.new_empty(output_shape(x, mimo_x, mimo_o))


@mamba3_state_update.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x")
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("x", call.x, {3: "(n, heads, dim)", 4: "(n, length, heads, dim)"})
    else:
        tensor_rank("x", call.x, {3: "(tokens, heads, dim)"}, hint="with cu_seqlens, tokens are packed")
    check_tokens(call)
    check_caches(call)
    n = row_count(call.x, call.cu_seqlens)
    slot_table("slots", call.slots, rows=n)
    slot_table("write_slots", call.write_slots, rows=n)
    for name in CACHES:
        slot_for_each(name, getattr(call, name), call.slots, rows=n)
    accepted_tokens(call.num_accepted_tokens, call.slots, rows=n)
    slots_for("ssm_state", call.ssm_state, call.slots)


@mamba3_state_update.validate_values
def _validate_values(call: Arguments) -> None:
    check_updates(call, call.x)


triton.implements(
    mamba3_state_update,
    "mamba_ops.ops.mamba3_state_update.triton:mamba3_state_update",
    unsupported=unsupported_by_triton,
    partial=True,
)
