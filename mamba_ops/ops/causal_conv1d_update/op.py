"""causal_conv1d_update: the depthwise convolution of a decode step, over a cache of each row's last inputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import cpp, triton
from mamba_ops.ops._common.checking import (
    check_tensors,
    index_tensor,
    packed_rows,
    shape_is,
    slot_table,
    slots_for,
    tensor_rank,
)
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.values import check_counts, check_sequences
from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.causal_conv1d_update import cpp as on_cpp
from mamba_ops.registry import bad_argument

WIDEST = 8
"""Taps of a convolution, at most."""


class Arguments(NamedTuple):
    """A call of causal_conv1d_update: what its checks and its kernels get."""

    x: Tensor
    conv_state: Tensor
    weight: Tensor
    bias: Tensor | None
    slots: Tensor | None
    cu_seqlens: Tensor | None
    num_accepted_tokens: Tensor | None
    silu: bool
    null_slot: int
    newest_last: bool
    output: Tensor


@mamba.op(
    mutates=("conv_state", "out"),
    reference="mamba_ops.ops.causal_conv1d_update.reference:causal_conv1d_update",
    arguments=Arguments,
    replaces="causal_conv1d_update",
    out_may_be="x",
    added=("newest_last",),
    gradients_in="mamba_ops.functional.causal_conv1d",
)
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    newest_last: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve each row's new tokens with the inputs before them, write `out`, and advance `conv_state` in place.

    Args:
        x: one token a row `(n, dim)`, a few `(n, length, dim)`, or packed `(tokens, dim)` with `cu_seqlens`.
        conv_state: `(slots, dim, state_len)`, state_len >= width - 1; column 0 is the oldest input. Mutated.
        weight: `(dim, width)`, width 2 to 8, oldest tap first.
        bias: `(dim,)`.
        slots: int32 or int64 `(>= n,)` or `(>= n, columns)`, of which column 0 is read; two rows must not share a slot.
            None: row i uses slot i, and none is padding.
        cu_seqlens: int32 or int64 `(n + 1,)`; row i has tokens cu_seqlens[i] up to cu_seqlens[i + 1].
        num_accepted_tokens: int32 or int64 `(n,)`; speculative decoding: how many tokens of the last call were right, 0
            to state_len - width + 2.
        silu: apply silu to the result.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero and no state is touched.
        newest_last: the last column holds the newest input, as in caches of mamba_ssm and Transformers, which have more
            columns than a window needs: at most 7. Not with `num_accepted_tokens`.
        out: like `x`, of any floating dtype, in other memory or `x` itself. Mutated.

    All floating dtypes mix; everything is computed in float32 (float64 for float64 `x`) and rounded once at each store.
    A row without tokens leaves its state alone; tokens that belong to no row are neither read nor written.

    With q new tokens in a row, `window` its last width - 1 inputs followed by these q, and state its slot:

        out[t] = silu(bias + sum_j weight[:, j] * window[t + j])        j = 0 .. width - 1
        window = [state[:, first : first + width - 1], x_0 .. x_(q-1)]

    Without `num_accepted_tokens`, first is 0 and columns 0 .. width - 2 become the last width - 1 entries of window.
    With it, first is max(num_accepted_tokens - 1, 0) and columns 0 .. width - 3 + q become
    window[1:], that is every input that the next call may go back to; what does not fit in state_len is dropped.
    All other columns stay. With `newest_last`, first is state_len - width + 1, and all columns become the last
    state_len inputs.
    """


@causal_conv1d_update.allocate_output
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@causal_conv1d_update.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x")
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("x", call.x, {2: "(n, dim)", 3: "(n, length, dim)"})
    else:
        tensor_rank("x", call.x, {2: "(tokens, dim)"}, hint="with cu_seqlens the rows are packed one after another")
    tensor_rank("conv_state", call.conv_state, {3: "(slots, dim, state_len)"})
    tensor_rank("weight", call.weight, {2: "(dim, width)"}, hint="squeeze the middle axis of a Conv1d's weight")

    n, dim, width = row_count(call.x, call.cu_seqlens), call.x.shape[-1], call.weight.shape[1]
    if not 2 <= width <= WIDEST:
        raise bad_argument("weight", got=f"width {width}", expected=f"a width of 2 to {WIDEST}")
    shape_is("weight", call.weight, (dim, width), hint="its dim is the last axis of x")
    shape_is("bias", call.bias, (dim,))
    shape_is("out", call.output, tuple(call.x.shape), hint="it is like x")

    slot_count, state_len = call.conv_state.shape[0], call.conv_state.shape[2]
    shape_is("conv_state", call.conv_state, (slot_count, dim, state_len), hint="its dim is the last axis of x")
    slot_table("slots", call.slots, rows=n)
    if call.slots is None and slot_count < n:
        hint = "without slots row i uses slot i"
        raise bad_argument("conv_state", got=f"{slot_count} slots", expected=f"at least {n}", hint=hint)
    if call.newest_last and state_len > WIDEST - 1:
        expected = f"at most {WIDEST - 1} with newest_last"
        raise bad_argument("conv_state", got=f"state_len {state_len}", expected=expected)
    if call.newest_last and call.num_accepted_tokens is not None:
        hint = "which inputs are the newest is not known before they are accepted"
        raise bad_argument("newest_last", got="True", expected="False with num_accepted_tokens", hint=hint)
    needed, hint = width - 1, "it holds the last width - 1 inputs"
    if call.num_accepted_tokens is not None:
        index_tensor("num_accepted_tokens", call.num_accepted_tokens)
        shape_is("num_accepted_tokens", call.num_accepted_tokens, (n,), hint="one count a row")
        if call.x.dim() == 3 and call.x.shape[1] > 1:
            needed, hint = (
                width - 2 + call.x.shape[1],
                "with num_accepted_tokens it also holds the new inputs, less one",
            )
    if state_len < needed:
        raise bad_argument("conv_state", got=f"state_len {state_len}", expected=f"at least {needed}", hint=hint)
    slots_for("conv_state", call.conv_state, call.slots)


@causal_conv1d_update.validate_values
def _validate_values(call: Arguments) -> None:
    check_sequences(call, call.x, "conv_state")
    windows = call.conv_state.shape[2] - call.weight.shape[1] + 2
    why = f", as conv_state holds {windows} windows"
    check_counts("num_accepted_tokens", call.num_accepted_tokens, 0, windows, why=why)


def _unsupported(x: Tensor, conv_state: Tensor | None) -> str | None:
    """Takes no float64 x or conv_state."""
    if conv_state is not None and conv_state.dtype == torch.float64:
        return "moves what it keeps through float32, and conv_state is float64"
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None


triton.implements(
    causal_conv1d_update, "mamba_ops.ops.causal_conv1d_update.triton:causal_conv1d_update", unsupported=_unsupported
)
cpp.implements(causal_conv1d_update, on_cpp.__name__ + ":causal_conv1d_update", unsupported=on_cpp.unsupported)
