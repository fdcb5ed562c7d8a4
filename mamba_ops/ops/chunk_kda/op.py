"""Prefill with Kimi Delta Attention: the gated delta rule over whole sequences, with a decay for each channel of a key.

Within a chunk what every token writes follows from a triangular system; between chunks only the state is carried.
"""

from torch import Tensor

from mamba_ops.backends import flashinfer, triton
from mamba_ops.ops._common.delta_rule import PrefillArguments, check_prefill, unsupported_by_triton
from mamba_ops.ops._common.values import check_sequences
from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.chunk_gated_delta_rule.flashinfer import unsupported_layout
from mamba_ops.ops.chunk_kda import flashinfer as on_flashinfer

Arguments = PrefillArguments


@mamba.op(
    mutates=("ssm_state", "out"),
    reference="mamba_ops.ops.chunk_kda.reference:chunk_kda",
    arguments=Arguments,
    replaces="chunk_(kda|kimi_delta_attention)",
)
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    ssm_state: Tensor | None = None,
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
        g: (..., v_heads, k_dim), the log of the decay of each channel of a key; at most 0, and -inf for a channel that
            forgets all.
        beta: (..., v_heads), 0 to 1, or to 2 where eigenvalues may be negative.
        scale: of q. None: k_dim ** -0.5.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. Tokens past
            the last row are neither read nor written.
        ssm_state: cache (slots, v_heads, v_dim, k_dim); mutated, rounded once at each store. None: no state is kept.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and none is padding.
        write_slots: the same for where the last state goes. None: where it came from. A null slot here means that the
            state is not stored.
        has_initial_state: bool, (n,): whether row i goes on from the state in its slot. None, or False: from zero.
        qk_l2norm: divide every head of q and k by its length: by sqrt(sum(x^2) + 1e-6).
        null_slot: a row with this slot, or a negative one, is padding: its output is zero, and nothing else is read or
            stored for it.
        out: like v, any float dtype, in other memory; mutated.

    For every row and head, in float32 at least, from the row's initial state S on:

        S = S * exp(g[t])                                     every column of S by its own decay
        S = S + beta[t] * (v[t] - S k[t]) k[t]^T
        out[t] = S (scale * q[t])

    A row without tokens has no output; with a write slot other than its slot, its initial state is copied there. No two
    rows may store to one slot, nor one row store to a slot that another reads.

    The recurrence is that of "Kimi Linear: An Expressive, Efficient Attention Architecture" (Moonshot AI, 2025),
    computed in chunks of 64 tokens counted from a row's first one. With G the sum of g up to a token of a chunk, and S
    the state before it, what the tokens write, U, solves (I + A) U = beta * (V - (exp(G) K) S^T) with
    A[i, j] = beta[i] * sum over channels of k[i] k[j] exp(G[i] - G[j]) for j < i. Decays of any strength are exact:
    exponents are sums of the g between two tokens, and where a product of matrices needs a factor of each token they
    are split at a token between the two, or at one before them where so little decays that it can be undone.
    """


@chunk_kda.allocate_output
def _output(v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@chunk_kda.validate
def _validate(call: Arguments) -> None:
    check_prefill(call, by_channel=True)


@chunk_kda.validate_values
def _validate_values(call: Arguments) -> None:
    check_sequences(call, call.v, "ssm_state")


triton.implements(chunk_kda, "mamba_ops.ops.chunk_kda.triton:chunk_kda", unsupported=unsupported_by_triton)
flashinfer.implements(
    chunk_kda,
    "mamba_ops.ops.chunk_kda.flashinfer:chunk_kda",
    unsupported=on_flashinfer.unsupported,
    unsupported_layout=unsupported_layout,
)
