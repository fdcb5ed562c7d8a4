"""Decode for Mamba-1 and Mamba-2: one step of the selective state space recurrence, or a few, for every row of a batch.

The state stays in the caller's cache; slot tables say which entry each row reads and which it writes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import cpp, flashinfer, triton
from mamba_ops.ops._common.checking import (
    check_tensors,
    index_tensor,
    packed_rows,
    shape_is,
    slot_for_each,
    slot_table,
    slots_for,
    tensor_rank,
)
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.narrow import check_rounding, check_state, default_seed, meant
from mamba_ops.ops._common.values import check_updates
from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.selective_state_update import cpp as on_cpp
from mamba_ops.ops.selective_state_update import flashinfer as on_flashinfer
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of selective_state_update: what its checks and its kernels get."""

    ssm_state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    slots: Tensor | None
    write_slots: Tensor | None
    cu_seqlens: Tensor | None
    num_accepted_tokens: Tensor | None
    null_slot: int
    rounding_seed: Tensor | None
    philox_rounds: int
    state_scale: Tensor | None
    output: Tensor


@mamba.op(
    mutates=("ssm_state", "state_scale", "out"),
    reference="mamba_ops.ops.selective_state_update.reference:selective_state_update",
    arguments=Arguments,
    replaces="selective_state_update",
    gradients_in="mamba_ops.functional.selective_scan or .mamba_chunk_scan",
)
def selective_state_update(
    ssm_state: Tensor,
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
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int = -1,
    rounding_seed: Tensor | None = None,
    philox_rounds: int = 0,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Advance the cached `ssm_state` of every row by the row's tokens, in place, and write the tokens' outputs.

    The tokens come in one of three layouts: `(n, ...)`, one token a row; `(n, length, ...)`, a few tokens a row; or
    packed `(tokens, ...)` with `cu_seqlens`. `...` is `(heads, dim)` for Mamba-2 and `(dim,)` for Mamba-1: one
    head, without its dimension. Head h uses group h // (heads / groups) of B and C. Any
    strides, and any mix of float16, bfloat16, float32 and float64.

    Args:
        ssm_state: (slots, heads, dim, dstate), or (slots, dim, dstate) for Mamba-1. Mutated; rounded once a store.
        x: (..., heads, dim), or (..., dim) for Mamba-1.
        dt: (..., heads, dim), or (..., heads): one step size for a whole head. Mamba-1: (..., dim).
        A: (heads, dim, dstate), or (heads,); negative. Mamba-1: (dim, dstate).
            At -inf a step of 0 decays nothing, and any other all.
        B, C: (..., groups, dstate), with heads a multiple of groups. Mamba-1: (..., dstate).
        D: skip weight, (heads, dim) or (heads,). Mamba-1: (dim,).
        z: gate, like x.
        dt_bias: added to dt, (heads, dim) or (heads,). Mamba-1: (dim,).
        dt_softplus: apply softplus to dt after the bias; linear above 20.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and none is padding.
        write_slots: the same for where the new state goes. None: where it came from. A null slot here means that the
            state is not stored.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. An empty row
            neither reads nor writes; tokens past the last row are left alone.
        num_accepted_tokens: int32 or int64, (n,), for speculative decoding; needs slots, and is at most their columns.
            Row i then starts from column max(num_accepted_tokens[i] - 1, 0) of its slots, and the state after its token
            t is stored in column t of its write_slots; beyond the columns nothing is stored. Otherwise the last state
            is stored in column 0.
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing is read or
            stored for it.
        rounding_seed: one int64, () or (1,): a state of float16, int16 or float8_e4m3fn, which it must be, is rounded
            stochastically at each store, in any of the forms above. None: to the nearest.
        philox_rounds: rounds of the generator for that, 100 at most. 0: 10.
        state_scale: float32, (slots, heads, dim), or (slots, dim) for Mamba-1, with an ssm_state of int16 or
            float8_e4m3fn, and with no other: a row of dstate numbers stands for them times its scale. Mutated together
            with the state: at each store a row's scale is its largest size divided by the format's, 32767 or 448, and
            its numbers are rounded after they were multiplied by the inverse. A row with an infinity or NaN becomes
            NaN.
        out: like x, any float dtype, in other memory; mutated.

    For every row, head and channel, in float32 at least, from the row's state s on:

        d = softplus(dt[t] + dt_bias)
        s = s * exp(A * d) + (B[t] * d) * x[t]
        out[t] = (sum(s * C[t]) + D * x[t]) * (z[t] * sigmoid(z[t]))

    The state is not rounded between the tokens of a row. No two rows may store to one slot, nor one row store to a slot
    that another reads.

    How an entry is rounded stochastically depends only on the seed, the slot that it is stored in and its place there:
    `round_stochastically` in mamba_ops/ops/_common/rounding.py gives the formula, which torch and Triton follow.
    FlashInfer has other random numbers, which depend on the slot that a row starts from.

    The reference keeps all rows padded to the longest and, given cu_seqlens, reads that length on the host.
    """


@selective_state_update.allocate_output
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@selective_state_update.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x", indices=["rounding_seed", "ssm_state"])
    ranks = {3: "(slots, dim, dstate)", 4: "(slots, heads, dim, dstate)"}
    tensor_rank("ssm_state", call.ssm_state, ranks, hint="Mamba-1 has no heads dimension, Mamba-2 has one")
    if 0 in call.ssm_state.shape[1:]:
        raise bad_argument("ssm_state", got=f"shape {tuple(call.ssm_state.shape)}", expected="only slots of size 0")
    *heads, dim, dstate = call.ssm_state.shape[1:]
    check_state(call.ssm_state, call.state_scale, "(slots, heads, dim)" if heads else "(slots, dim)")
    channels, axes = ((*heads, dim), "heads, dim") if heads else ((dim,), "dim")

    packed_rows(call.cu_seqlens)
    ranks, hint = {len(channels) + 1: f"(tokens, {axes})"}, "with cu_seqlens, tokens are packed"
    if call.cu_seqlens is None:
        ranks[len(channels) + 2], hint = f"(n, length, {axes})", f"ssm_state has {'' if heads else 'no '}heads"
    tensor_rank("x", call.x, ranks, hint=hint)
    lead = tuple(call.x.shape[: -len(channels)])
    shape_is("x", call.x, (*lead, *channels), hint=f"{axes} are those of ssm_state")
    shape_is("z", call.z, tuple(call.x.shape), hint="z is like x")
    shape_is("out", call.output, tuple(call.x.shape), hint="out is like x")

    parameters = [channels, tuple(heads)] if heads else [channels]  # per channel or per head
    shape_is("dt", call.dt, *[(*lead, *shape) for shape in parameters], hint="tokens are those of x")
    shape_is("A", call.A, (*channels, dstate), *parameters[1:])
    shape_is("D", call.D, *parameters)
    shape_is("dt_bias", call.dt_bias, *parameters)
    groups = tuple(call.B.shape[-2:-1]) if heads else ()
    shape_is("B", call.B, (*lead, *groups, dstate), hint="tokens are those of x, dstate is that of ssm_state")
    shape_is("C", call.C, tuple(call.B.shape), hint="C is like B")
    if heads and (groups == (0,) or heads[0] % groups[0]):
        raise bad_argument("B", got=f"{groups[0]} groups", expected=f"a divisor of the {heads[0]} heads")

    check_rounding(call.ssm_state, call.rounding_seed, call.philox_rounds)

    n = row_count(call.x, call.cu_seqlens)
    states = 1
    if call.num_accepted_tokens is not None:
        index_tensor("num_accepted_tokens", call.num_accepted_tokens)
        shape_is("num_accepted_tokens", call.num_accepted_tokens, (n,), hint="one for each row")
        if call.slots is None:
            hint = "num_accepted_tokens says which of its columns a row starts from"
            raise bad_argument("slots", got="None", expected="a slot table", hint=hint)
        states = max((states, *lead[1:]))  # a state is stored after every token
    slot_table("slots", call.slots, rows=n, columns=states if call.write_slots is None else 1)
    slot_table("write_slots", call.write_slots, rows=n, columns=states)
    slot_for_each("ssm_state", call.ssm_state, call.slots, rows=n)
    slots_for("ssm_state", call.ssm_state, call.slots)


@selective_state_update.validate_values
def _validate_values(call: Arguments) -> None:
    check_updates(call, call.x)


@selective_state_update.default_arguments
def _default_arguments(ssm_state: Tensor, rounding_seed: Tensor | None, philox_rounds: int) -> dict[str, Any]:
    return default_seed(ssm_state, rounding_seed, philox_rounds)


@selective_state_update.meant
def _meant(ssm_state: Tensor, state_scale: Tensor | None) -> dict[str, tuple[Tensor, Tensor] | None]:
    return meant(ssm_state, state_scale)


def _unsupported(x: Tensor) -> str | None:
    """Takes no float64 x."""
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None


triton.implements(
    selective_state_update,
    "mamba_ops.ops.selective_state_update.triton:selective_state_update",
    unsupported=_unsupported,
)
flashinfer.implements(
    selective_state_update,
    "mamba_ops.ops.selective_state_update.flashinfer:selective_state_update",
    unsupported=on_flashinfer.unsupported,
    unsupported_layout=on_flashinfer.unsupported_layout,
)
cpp.implements(
    selective_state_update,
    "mamba_ops.ops.selective_state_update.cpp:selective_state_update",
    unsupported=on_cpp.unsupported,
)
