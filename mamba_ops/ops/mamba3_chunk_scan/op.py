"""mamba3_chunk_scan: Mamba-3's recurrence over whole sequences, with one input and output a head, or several."""

from typing import NamedTuple

from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.checking import (
    check_chunk_size,
    check_tensors,
    initial_flags,
    packed_rows,
    slot_for_each,
    slot_table,
    tensor_rank,
)
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.mamba3_checks import CACHES, check_caches, check_tokens, output_shape, unsupported_by_triton
from mamba_ops.ops._common.values import check_sequences
from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of mamba3_chunk_scan: what its checks and its kernels get."""

    x: Tensor
    dt: Tensor
    A: Tensor
    trap: Tensor
    angles: Tensor
    B: Tensor
    C: Tensor
    chunk_size: int
    B_bias: Tensor | None
    C_bias: Tensor | None
    D: Tensor | None
    z: Tensor | None
    mimo_x: Tensor | None
    mimo_z: Tensor | None
    mimo_o: Tensor | None
    cu_seqlens: Tensor | None
    angle_state: Tensor | None
    ssm_state: Tensor | None
    k_state: Tensor | None
    v_state: Tensor | None
    slots: Tensor | None
    write_slots: Tensor | None
    has_initial_state: Tensor | None
    null_slot: int
    output: Tensor


@mamba.op(
    mutates=("angle_state", "ssm_state", "k_state", "v_state", "out"),
    composed=True,
    reference="mamba_ops.ops.mamba3_chunk_scan.reference:mamba3_chunk_scan",
    arguments=Arguments,
    replaces="mamba3_siso|mamba3_mimo",
)
def mamba3_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    angle_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    k_state: Tensor | None = None,
    v_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Run Mamba-3's recurrence over every row's tokens, write their outputs, and keep the rows' last states in caches.

    Trapezoidal rule, states that turn, no convolution. A row is a sequence: `(n, length, ...)`, or packed
    `(tokens, ...)` with `cu_seqlens`. Head h uses group h // (heads / groups) of B and C. A head has one input and
    output (SISO), or with `mimo_x` as many as its rank (MIMO). On Triton SISO has kernels of its own. All else is
    composed of mamba_chunk_scan: see `mamba_ops/ops/_common/mamba3.py`.

    Args:
        x: (..., heads, dim).
        dt: (..., heads), the step sizes; positive.
        A: (..., heads), the rates of every token; negative. A * dt above 0 counts as 0.
        trap: (..., heads): sigmoid(trap) is how much of a step goes to its own token, the rest to the one before.
        angles: (..., angles), raw; of all heads. At most dstate / 2.
        B, C: (..., groups, dstate), with heads a multiple of groups. MIMO: (..., rank, groups, dstate).
        chunk_size: tokens of a chunk, 1 to 4096. Results depend on it by rounding alone.
        B_bias, C_bias: (heads, dstate), added to B and C. MIMO: (heads, rank, dstate).
        D: skip weight, (heads,).
        z: gate, like x.
        mimo_x: (heads, rank, dim): input r of a head is x * mimo_x[:, r]. None: SISO.
        mimo_z: (heads, rank, dim), with mimo_x and z: gate r of a head is z * mimo_z[:, r].
        mimo_o: (heads, rank, dim), with mimo_x: the weights with which outputs are summed over the rank. None: they are
            not summed.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Tokens past
            the last row are neither read nor written.
        angle_state: cache (slots, heads, angles), from -pi to pi; mutated.
        ssm_state: cache (slots, heads, dim, dstate); mutated.
        k_state: cache (slots, heads, dstate) of the last B, turned; mutated. MIMO: (slots, rank, heads, dstate).
        v_state: cache (slots, heads, dim) of the last x; mutated. All four caches, or None of them: no state is kept.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's states are, in column 0. None:
            row i uses slot i, and none is padding.
        write_slots: the same for where the last states go. None: where they came from. A null slot here means that they
            are not stored.
        has_initial_state: bool, (n,): whether row i goes on from the states in its slot. None, or False: from zero.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing else is read or
            stored for it.
        out: like x, any float dtype, in other memory; mutated. MIMO without mimo_o: (..., rank, heads, dim).

    For every row and head, in float32 at least, from the row's initial states angle, s, k' and v' on:

        angle = angle + tanh(angles[t]) * pi * dt[t]                              # of pair i, (2 i, 2 i + 1)
        k, q = turn(B[t] + B_bias, angle), turn(C[t] + C_bias, angle)             # pairs beyond the angles stay
        s = exp(A[t] * dt[t]) * (s + (1 - sigmoid(trap[t])) * dt[t] * v' * k') + sigmoid(trap[t]) * dt[t] * x[t] * k
        out[t] = (sum(s * q) + D * x[t]) * (z[t] * sigmoid(z[t]))
        k', v' = k, x[t]

    With mimo_x pair i is (i, i + dstate // 2), and the rank is an axis more of k and q:

        s = exp(A[t] * dt[t]) * (s + (1 - sigmoid(trap[t])) * dt[t] * sum_r v' * mimo_x[r] * k'[r])
            + sigmoid(trap[t]) * dt[t] * sum_r x[t] * mimo_x[r] * k[r]
        y[r] = (sum(s * q[r]) + D * x[t] * mimo_x[r]) * silu(z[t] * mimo_z[r])
        out[t] = sum_r mimo_o[r] * y[r]

    k and q are rounded to the dtype that x, B and C promote to before they are multiplied; on Triton also the state
    that is read, and values times their weights, to as many digits. A row without tokens has no output; with a write
    slot other than its slot, its initial states are copied there. No two rows may store to one slot, nor one row store
    to a slot that another reads.
    """


@mamba3_chunk_scan.allocate_output
def _output(x: Tensor, mimo_x: Tensor | None, mimo_o: Tensor | None) -> Tensor:
    return x.new_empty(output_shape(x, mimo_x, mimo_o))


@mamba3_chunk_scan.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x")
    check_chunk_size(call.chunk_size)
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("x", call.x, {4: "(n, length, heads, dim)"}, hint="packed tokens come with cu_seqlens")
    else:
        tensor_rank("x", call.x, {3: "(tokens, heads, dim)"}, hint="with cu_seqlens, tokens are packed")
    check_tokens(call)
    n = row_count(call.x, call.cu_seqlens)
    slot_table("slots", call.slots, rows=n)
    slot_table("write_slots", call.write_slots, rows=n)
    initial_flags("ssm_state", call.ssm_state, call.has_initial_state, rows=n)
    given = [name for name in CACHES if getattr(call, name) is not None]
    if given and len(given) < len(CACHES):
        missing = next(name for name in CACHES if name not in given)
        raise bad_argument(missing, got="None", expected=f"a cache, as {given[0]} is one", hint="all four, or none")
    if given:
        check_caches(call)
        for name in CACHES:
            slot_for_each(name, getattr(call, name), call.slots, rows=n)
    for name in () if given else ("slots", "write_slots"):
        if getattr(call, name) is not None:
            raise bad_argument(name, got="a tensor", expected="None where there are no caches")


@mamba3_chunk_scan.validate_values
def _validate_values(call: Arguments) -> None:
    check_sequences(call, call.x, "ssm_state")


def _unsupported(x: Tensor, B: Tensor, mimo_x: Tensor | None) -> str | None:
    """Takes one input and output a head (no mimo_x), no float64 x, and a dstate of at most 256: other calls run on the
    ops inside.
    """
    if B.shape[-1] > 256:
        return f"takes a dstate of at most 256, and B has {B.shape[-1]}"
    return unsupported_by_triton(x, mimo_x)


triton.implements(
    mamba3_chunk_scan,
    "mamba_ops.ops.mamba3_chunk_scan.triton:mamba3_chunk_scan",
    unsupported=_unsupported,
    partial=True,
)
