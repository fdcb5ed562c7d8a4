"""Decode with Kimi Delta Attention: one step of the recurrence, or a few, for every row of a batch.

The state stays in the caller's cache; slot tables say which entry each row reads and which it writes.
"""

from typing import Any, NamedTuple

from torch import Tensor

from mamba_ops.backends import flashinfer, triton
from mamba_ops.ops._common.delta_rule import check_lower_bound, check_update, unsupported_by_triton
from mamba_ops.ops._common.narrow import default_seed, meant
from mamba_ops.ops._common.values import check_updates
from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.kda_update import flashinfer as on_flashinfer
from mamba_ops.registry import bad_argument


class Arguments(NamedTuple):
    """A call of kda_update: what its checks and its kernels get."""

    ssm_state: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    a: Tensor | None
    b: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None
    scale: float | None
    slots: Tensor | None
    write_slots: Tensor | None
    cu_seqlens: Tensor | None
    num_accepted_tokens: Tensor | None
    qk_l2norm: bool
    null_slot: int
    rounding_seed: Tensor | None
    philox_rounds: int
    state_scale: Tensor | None
    output: Tensor


@mamba.op(
    mutates=("ssm_state", "state_scale", "out"),
    reference="mamba_ops.ops.kda_update.reference:kda_update",
    arguments=Arguments,
    replaces="fused_recurrent_kda|recurrent_kimi_delta_attention",
    gradients_in="mamba_ops.functional.chunk_kda",
)
def kda_update(
    ssm_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    rounding_seed: Tensor | None = None,
    philox_rounds: int = 0,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Advance the cached `ssm_state` of every row by the row's tokens, in place, and write the tokens' outputs.

    The tokens come in one of three layouts: `(n, ...)`, one token a row; `(n, length, ...)`, a few tokens a row; or
    packed `(tokens, ...)` with `cu_seqlens`. Head h of v, of the state and of the gates uses head
    h // (v_heads / k_heads) of q and k. Any strides, and any mix of float16, bfloat16, float32 and float64. The decays
    of a state and the share of a value that is written are either given as `g` and `beta`, or computed from `a`, `b`,
    `A_log` and `dt_bias`.

    Args:
        ssm_state: (slots, v_heads, v_dim, k_dim); mutated, rounded once at each store.
        q, k: (..., k_heads, k_dim).
        v: (..., v_heads, v_dim), with v_heads a multiple of k_heads.
        g: (..., v_heads, k_dim), the log of the decay of each channel of a key; at most 0.
        beta: (..., v_heads), 0 to 1, or to 2 where eigenvalues may be negative.
        a: (..., v_heads, k_dim), with b instead of g and beta.
        b: (..., v_heads).
        A_log: (v_heads,), with a and b.
        dt_bias: (v_heads, k_dim), with a and b.
        lower_bound: below 0: with a and b, no g is less. None: there is none.
        scale: of q. None: k_dim ** -0.5.
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
        qk_l2norm: divide every head of q and k by its length: by sqrt(sum(x^2) + 1e-6).
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing is read or
            stored for it.
        rounding_seed: one int64, () or (1,): a state of float16, int16 or float8_e4m3fn, which it must be, is rounded
            stochastically at each store, as by `mamba_ops.selective_state_update`. None: to the nearest.
        philox_rounds: rounds of the generator for that, 100 at most. 0: 10.
        state_scale: float32, (slots, v_heads, v_dim), with an ssm_state of int16 or float8_e4m3fn, and with no other: a
            row of k_dim numbers stands for them times its scale. Mutated together with the state: at each store a row's
            scale is its largest size divided by the format's, 32767 or 448, and its numbers are rounded after they were
            multiplied by the inverse. A row with an infinity or NaN becomes NaN.
        out: like v, any float dtype, in other memory; mutated.

    For every row and head, in float32 at least, from the row's state S on:

        g = -exp(A_log) * softplus(a[t] + dt_bias)            where it is not given; softplus is linear above 20
        g = lower_bound * sigmoid(exp(A_log) * (a[t] + dt_bias))                  that instead, with lower_bound
        beta = sigmoid(b[t])
        S = S * exp(g)                                        every column of S by its own decay
        S = S + beta * (v[t] - S k[t]) k[t]^T
        out[t] = S (scale * q[t])

    The state is not rounded between the tokens of a row. No two rows may store to one slot, nor one row store to a slot
    that another reads.

    The reference keeps all rows padded to the longest and, given cu_seqlens, reads that length on the host. The
    recurrence is that of "Kimi Linear: An Expressive, Efficient Attention Architecture" (Moonshot AI, 2025), the gate
    with a lower bound that of its later models.
    """


@kda_update.allocate_output
def _output(v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@kda_update.validate
def _validate(call: Arguments) -> None:
    check_update(call, by_channel=True)
    check_lower_bound(call.lower_bound)
    if call.lower_bound is not None and call.a is None:
        hint = "g is given, which has its bound already"
        raise bad_argument("lower_bound", got=call.lower_bound, expected="none without a and b", hint=hint)


@kda_update.validate_values
def _validate_values(call: Arguments) -> None:
    check_updates(call, call.v)


@kda_update.default_arguments
def _default_arguments(ssm_state: Tensor, rounding_seed: Tensor | None, philox_rounds: int) -> dict[str, Any]:
    return default_seed(ssm_state, rounding_seed, philox_rounds)


@kda_update.meant
def _meant(ssm_state: Tensor, state_scale: Tensor | None) -> dict[str, tuple[Tensor, Tensor] | None]:
    return meant(ssm_state, state_scale)


triton.implements(kda_update, "mamba_ops.ops.kda_update.triton:kda_update", unsupported=unsupported_by_triton)
flashinfer.implements(
    kda_update,
    "mamba_ops.ops.kda_update.flashinfer:kda_update",
    unsupported=on_flashinfer.unsupported,
    unsupported_layout=on_flashinfer.unsupported_layout,
)
