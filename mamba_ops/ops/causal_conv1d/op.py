"""causal_conv1d: the depthwise convolution of whole sequences, which may go on where a cache left off."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.checking import check_tensors, packed_rows, shape_is, short, slot_table, tensor_rank
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.values import check_sequences
from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of causal_conv1d: what its checks and its kernels get."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    cu_seqlens: Tensor | None
    conv_state: Tensor | None
    slots: Tensor | None
    write_slots: Tensor | None
    has_initial_state: Tensor | None
    silu: bool
    null_slot: int
    output: Tensor


@mamba.op(
    mutates=("conv_state", "out"),
    reference="mamba_ops.ops.causal_conv1d.reference:causal_conv1d",
    arguments=Arguments,
    replaces="causal_conv1d|short_?conv",
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    conv_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve each sequence with its own past, write `out`, and leave the last inputs in `conv_state`, in place.

    Args:
        x: `(n, length, dim)`, or packed `(tokens, dim)` with `cu_seqlens`.
        weight: `(dim, width)`, width 2 to 8, oldest tap first.
        bias: `(dim,)`.
        cu_seqlens: int32 or int64 `(n + 1,)`; sequence i has tokens cu_seqlens[i] up to cu_seqlens[i + 1].
        conv_state: `(slots, dim, state_len)`, state_len >= width - 1; column 0 is the oldest input. Mutated.
            None: every sequence starts from zeros and nothing is kept.
        slots: int32 or int64 `(>= n,)` or `(>= n, columns)`, of which column 0 is read: where sequence i's last
            inputs are. None: sequence i uses slot i, and none is padding.
        write_slots: the same for where its last inputs go. None: where they came from. A null slot here means that they
            are not stored.
        has_initial_state: bool `(n,)`; which sequences go on from their slot. None: they all start from zeros.
        silu: apply silu to the result.
        null_slot: a sequence with this slot, or a negative one, is padding: its output is zero and no state is touched.
        out: like `x`, of any floating dtype, in other memory. Mutated.

    All floating dtypes mix; everything is computed in float32 (float64 for float64 `x`) and rounded once at each store.
    An empty sequence leaves its state alone; with a write slot other than its slot, its past is copied there. No two
    sequences may store to one slot, nor one sequence store to a slot that another reads. Tokens that belong to no
    sequence are neither read nor written.

    With h = width - 1, `past` the first h columns of a sequence's slot where it has an initial state and zeros where it
    has none, and window = [past, x_0 .. x_(length - 1)]:

        out[t] = silu(bias + sum_j weight[:, j] * window[t + j])        j = 0 .. h

    Columns 0 .. h - 1 of the slot, or of the write slot, become the last h entries of window; further columns stay.
    """


@causal_conv1d.allocate_output
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@causal_conv1d.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x")
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("x", call.x, {3: "(n, length, dim)"}, hint="packed sequences need cu_seqlens")
    else:
        tensor_rank(
            "x", call.x, {2: "(tokens, dim)"}, hint="with cu_seqlens the sequences are packed one after another"
        )
    tensor_rank("weight", call.weight, {2: "(dim, width)"}, hint="squeeze the middle axis of a Conv1d's weight")

    n, dim, width = row_count(call.x, call.cu_seqlens), call.x.shape[-1], call.weight.shape[1]
    if not 2 <= width <= 8:
        raise bad_argument("weight", got=f"width {width}", expected="a width of 2 to 8")
    shape_is("weight", call.weight, (dim, width), hint="its dim is the last axis of x")
    shape_is("bias", call.bias, (dim,))
    shape_is("out", call.output, tuple(call.x.shape), hint="it is like x")

    slot_table("slots", call.slots, rows=n)
    slot_table("write_slots", call.write_slots, rows=n)
    if call.has_initial_state is not None and call.has_initial_state.dtype != torch.bool:
        got = short(call.has_initial_state.dtype)
        raise bad_argument("has_initial_state", got=got, expected="bool", hint="compare it with 0")
    shape_is("has_initial_state", call.has_initial_state, (n,), hint="one a sequence")
    if call.conv_state is None:
        for name in ("slots", "write_slots", "has_initial_state"):
            if getattr(call, name) is not None:
                hint = "pass the cache that it refers to, or leave both out"
                raise bad_argument(name, got="a tensor", expected="None where there is no conv_state", hint=hint)
        return
    tensor_rank("conv_state", call.conv_state, {3: "(slots, dim, state_len)"})
    slot_count, state_len = call.conv_state.shape[0], call.conv_state.shape[2]
    shape_is("conv_state", call.conv_state, (slot_count, dim, state_len), hint="its dim is the last axis of x")
    if call.slots is None and slot_count < n:
        hint = "without slots sequence i uses slot i"
        raise bad_argument("conv_state", got=f"{slot_count} slots", expected=f"at least {n}", hint=hint)
    if state_len < width - 1:
        hint = "it holds the last width - 1 inputs"
        raise bad_argument("conv_state", got=f"state_len {state_len}", expected=f"at least {width - 1}", hint=hint)


@causal_conv1d.validate_values
def _validate_values(call: Arguments) -> None:
    check_sequences(call, call.x, "conv_state")


def _unsupported(x: Tensor, conv_state: Tensor | None) -> str | None:
    """Takes no float64 x or conv_state."""
    if conv_state is not None and conv_state.dtype == torch.float64:
        return "moves what it keeps through float32, and conv_state is float64"
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None


triton.implements(causal_conv1d, "mamba_ops.ops.causal_conv1d.triton:causal_conv1d", unsupported=_unsupported)
