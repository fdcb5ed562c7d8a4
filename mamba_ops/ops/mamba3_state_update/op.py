"""mamba3_state_update: a decode step of Mamba-3's recurrence, with one input and one output a head (SISO)."""

from typing import NamedTuple

from torch import Tensor

from mamba_ops.ops._common.checking import check_tensors, slot_for_each, slot_table, slots_for, tensor_rank
from mamba_ops.ops._common.mamba3_checks import CACHES, check_caches, check_tokens
from mamba_ops.ops._common.values import check_rows, check_update_slots
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
    slots: Tensor | None
    null_slot: int
    output: Tensor


@mamba.op(
    mutates=("angle_state", "ssm_state", "k_state", "v_state", "out"),
    composed=True,
    reference="mamba_ops.ops.mamba3_state_update.reference:mamba3_state_update",
    arguments=Arguments,
    replaces="mamba3_step",
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
    slots: Tensor | None = None,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Advance Mamba-3's states by one token per row, in place, and write that token's output.

    The recurrence is that of mamba3_chunk_scan; k and q are not rounded here. It is composed of selective_state_update,
    which reads two tokens: one that adds the product of the token before, and this one.

    Args:
        angle_state: cache (slots, heads, angles), from -pi to pi; mutated.
        ssm_state: cache (slots, heads, dim, dstate); mutated.
        k_state: cache (slots, heads, dstate) of the last B, turned; mutated.
        v_state: cache (slots, heads, dim) of the last x; mutated.
        x: (n, heads, dim).
        dt: (n, heads), the step sizes; positive.
        A: (n, heads), the rates; negative. A * dt above 0 counts as 0.
        trap: (n, heads): sigmoid(trap) is how much of a step goes to its own token, the rest to the one before.
        angles: (n, angles), raw; of all heads. At most dstate / 2.
        B, C: (n, groups, dstate), with heads a multiple of groups.
        B_bias, C_bias: (heads, dstate), added to B and C.
        D: skip weight, (heads,).
        z: gate, like x.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's states are, in column 0. None:
            row i uses slot i, and none is padding. No two rows have one slot.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing else is read or
            stored for it.
        out: like x, any float dtype, in other memory; mutated.
    """


@mamba3_state_update.allocate_output
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@mamba3_state_update.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x")
    tensor_rank("x", call.x, {3: "(n, heads, dim)"}, hint="one token a row; mamba3_chunk_scan reads more")
    check_tokens(call)
    check_caches(call)
    slot_table("slots", call.slots, rows=call.x.shape[0])
    for name in CACHES:
        slot_for_each(name, getattr(call, name), call.slots, rows=call.x.shape[0])
    slots_for("ssm_state", call.ssm_state, call.slots)


@mamba3_state_update.validate_values
def _validate_values(call: Arguments) -> None:
    rows = check_rows(call.x, None)
    check_update_slots(rows, call.ssm_state, "ssm_state", call.slots, None, None, call.null_slot)
