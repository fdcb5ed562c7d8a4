"""The functions of vLLM 0.33 over our ops, and its ops by layer name (vllm_layers.py).

Names, order and meaning of the arguments are vLLM's. Rows of block 0, the null block, or of a negative one are padding:
their outputs are zero, where vLLM leaves them undefined. Products are float32, where its convolutions round them first.
"""

import torch
from torch import Tensor

from mamba_ops import ops
from mamba_ops.compat import arguments, vllm_chunks, vllm_delta_rule, vllm_layers
from mamba_ops.compat.arguments import flags, floating, is_silu_or_flag, per_head, written
from mamba_ops.compat.fla.norms import l2norm
from mamba_ops.compat.mamba_ssm.norms import rmsnorm_fn
from mamba_ops.registry import answering

NULL_BLOCK_ID = 0
PAD_SLOT_ID = -1

mamba_mixer, mamba_mixer2 = vllm_layers.mamba_mixer, vllm_layers.mamba_mixer2
short_conv = vllm_layers.short_conv
gdn_attention_core_xpu = vllm_layers.gdn_attention_core_xpu
RMSNormGated, fused_post_conv_prep = vllm_delta_rule.RMSNormGated, vllm_delta_rule.fused_post_conv_prep
mamba_chunk_scan_combined_varlen = vllm_chunks.mamba_chunk_scan_combined_varlen
chunk_gated_delta_rule = vllm_delta_rule.chunk_gated_delta_rule
fused_recurrent_gated_delta_rule = vllm_delta_rule.fused_recurrent_gated_delta_rule
fused_recurrent_gated_delta_rule_packed_decode = vllm_delta_rule.fused_recurrent_gated_delta_rule_packed_decode
fused_sigmoid_gating_delta_rule_update = vllm_delta_rule.fused_sigmoid_gating_delta_rule_update
l2norm_fwd, rms_norm_gated = l2norm, rmsnorm_fn


@answering
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    dst_state_batch_indices: Tensor | None = None,
    null_block_id: int = NULL_BLOCK_ID,
    out: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_blackwell: bool = False,
    enable_stochastic_rounding: bool = False,
    cache_philox_rounds: int = 0,
) -> None:
    """Advance `state` by one token a row, or by a few, and write the tokens' outputs to `out`.

    Args:
        state: `(slots, heads, dim, dstate)`, or all arguments without heads. Mutated.
        x, dt, z: `(tokens, heads, dim)`.
        A: `(heads, dim, dstate)`.
        B, C: `(tokens, groups, dstate)`.
        D, dt_bias: `(heads, dim)`.
        dt_softplus: whether softplus is applied to dt after the bias.
        state_batch_indices: int32 or int64 `(n,)` or `(n, columns)`, the slots to read. None: row i reads slot i, and
            `dst_state_batch_indices` is not used.
        dst_state_batch_indices: the slots to write; None: the same. A null block is not written.
        null_block_id: the block of padding rows. Their output is zero (vLLM: that of a state of zeros).
        out: like `x`; must be given. Mutated.
        num_accepted_tokens: int `(n,)`: speculative decoding; the state after token t goes to column t.
        cu_seqlens: int `(n + 1,)`: rows of several tokens.
        is_blackwell: of no effect.
        enable_stochastic_rounding: whether a state of float16 is rounded up or down at random, with a new seed.
        cache_philox_rounds: rounds of the generator for that; 0: 10.
    """
    name = "selective_state_update"
    seed = torch.randint(2**32, (1,), device=state.device) if enable_stochastic_rounding else None
    if out is None:
        raise ValueError(f"{name}: out: got None, expected a tensor like x, which the output is written to")
    if state.dim() == 4:
        dt, A = per_head(dt, 1), per_head(A, 2)
        D, dt_bias = (None if t is None else per_head(t, 1) for t in (D, dt_bias))
    ops.selective_state_update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        slots=state_batch_indices,
        write_slots=None if state_batch_indices is None else dst_state_batch_indices,
        cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens,
        null_slot=null_block_id,
        rounding_seed=seed,
        philox_rounds=cache_philox_rounds,
        out=out,
    )


@answering
def selective_scan_fn(
    u: Tensor,
    ssm_states: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    query_start_loc: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_block_id: int = NULL_BLOCK_ID,
    block_size: int = 1024,
    block_idx_first_scheduled_token: Tensor | None = None,
    block_idx_last_scheduled_token: Tensor | None = None,
    initial_state_idx: Tensor | None = None,
    cu_chunk_seqlen: Tensor | None = None,
    last_chunk_indices: Tensor | None = None,
) -> Tensor:
    """Scan sequences; the output overwrites `z`, or `delta` where there is no `z`, and is returned.

    A `z` or `delta` without adjacent tokens is copied first, as in vLLM; the caller's tensor then stays as it is.

    Args:
        u, delta, z: packed `(dim, tokens)` with `query_start_loc`, else `(n, dim, length)`. One is mutated, see above.
        ssm_states: `(slots, dim, dstate)`. Mutated.
        A: `(dim, dstate)`.
        B, C: `(groups, dstate, tokens)` or `(n, groups, dstate, length)`; without groups: one.
        D, delta_bias: `(dim,)`.
        delta_softplus: whether softplus is applied to delta after the bias.
        query_start_loc: int `(n + 1,)`.
        cache_indices: int `(n,)`; with blocks `(n, columns)`. None: sequence i has slot i.
        has_initial_state: bool `(n,)`; None: no sequence has.
        null_block_id: the block of padding sequences. Their output is zero (vLLM: what was there).
        block_size, block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
            last_chunk_indices: states of a prefix cache, see `mamba_ops.selective_scan`; in use where the second is
            given.
    """
    flags("selective_scan_fn", delta_softplus=delta_softplus)
    target = delta if z is None else z
    target = target if target.stride(-1) == 1 else target.contiguous()
    written("selective_scan_fn", ssm_states=ssm_states, **{"delta" if z is None else "z": target})
    axis = 1 if query_start_loc is None else 0  # of tokens, for our ops
    blocks: dict[str, Tensor | int | None] = {}
    scheduled = (block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx)
    if any(tensor is not None for tensor in (*scheduled, cu_chunk_seqlen, last_chunk_indices)):
        blocks = {
            "block_size": block_size,
            "first_block": block_idx_first_scheduled_token,
            "last_block": block_idx_last_scheduled_token,
            "initial_block": initial_state_idx,
            "chunk_ends": None if cu_chunk_seqlen is None else cu_chunk_seqlen[1:],
            "last_chunk": last_chunk_indices,
        }

    # Tokens outside all sequences stay as they are.
    out = target.movedim(-1, axis).clone(memory_format=torch.contiguous_format)
    ops.selective_scan(
        u.movedim(-1, axis),
        delta.movedim(-1, axis),
        A,
        B.movedim(-1, axis),
        C.movedim(-1, axis),
        D=D,
        z=None if z is None else z.movedim(-1, axis),
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        cu_seqlens=query_start_loc,
        ssm_state=ssm_states,
        slots=cache_indices,
        has_initial_state=has_initial_state,
        null_slot=null_block_id,
        out=out,
        **blocks,  # type: ignore[arg-type]
    )
    return target.copy_(out.movedim(axis, -1))


@answering
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | bool | None = "silu",
    pad_slot_id: int = PAD_SLOT_ID,
    null_block_id: int = NULL_BLOCK_ID,
    metadata: object = None,
    validate_data: bool = False,
) -> Tensor:
    """Convolve packed sequences, keep their last inputs in `conv_states`, and return the output, like `x`.

    Args:
        x: `(dim, tokens)`; computed on in the dtype of `conv_states`.
        weight, bias: `(dim, width)` and `(dim,)`.
        conv_states: `(slots, dim, state_len)`, column 0 the oldest; columns from width - 1 on stay. Mutated.
        query_start_loc: int `(n + 1,)`.
        cache_indices: int `(n,)`. None: sequence i has slot i.
        has_initial_state: bool `(n,)`; None: no sequence has.
        activation: None, False, True, "silu" or "swish".
        null_block_id: the block of padding sequences. Their output is zero (vLLM: undefined).
        pad_slot_id, metadata, validate_data: of no effect: there is no layout on the host, and all calls are checked.
    """
    floating("causal_conv1d_fn", x=x, conv_states=conv_states)
    arguments.refuse("causal_conv1d_fn", metadata=metadata if isinstance(metadata, Tensor) else None)
    rows = x.to(conv_states.dtype).t()
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    ops.causal_conv1d(
        rows,
        weight,
        bias,
        cu_seqlens=query_start_loc,
        conv_state=conv_states,
        slots=cache_indices,
        has_initial_state=has_initial_state,
        silu=is_silu_or_flag("causal_conv1d_fn", activation),
        null_slot=null_block_id,
        out=out,
    )
    return out.t().to(x.dtype)


@answering
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    max_query_len: int = -1,
    null_block_id: int = NULL_BLOCK_ID,
    validate_data: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve new inputs with those before them; the result overwrites `x`, or goes to `out`, and is returned.

    Args:
        x: `(n, dim)`, `(n, dim, length)`, or `(tokens, dim)` with `query_start_loc`; computed on in the dtype of
            `conv_state`. Mutated where there is no `out`.
        conv_state: `(slots, dim, state_len)`. Mutated.
        weight, bias: `(dim, width)` and `(dim,)`.
        activation: None, False, True, "silu" or "swish".
        conv_state_indices: int `(n,)` or `(n, columns)`, of which column 0 is read. None: row i has slot i.
        num_accepted_tokens: int `(n,)`: speculative decoding, see `mamba_ops.causal_conv1d_update`.
        query_start_loc: int `(n + 1,)`.
        null_block_id: the block of padding rows. Their output is zero (vLLM: what was there).
        max_query_len, validate_data: of no effect: lengths are read on the device, and all calls are checked.
        out: of `x`'s shape, dtype and device.
    """
    name = "causal_conv1d_update"
    if out is not None and (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        got, expected = (f"{tuple(t.shape)} of {t.dtype} on {t.device}" for t in (out, x))
        raise ValueError(f"{name}: out: got {got}, expected {expected}, as x")
    floating(name, x=x, conv_state=conv_state)
    written(name, conv_state=conv_state, **{"x" if out is None else "out": x if out is None else out})
    rows = x.to(conv_state.dtype)
    if query_start_loc is not None and conv_state_indices is not None:
        query_start_loc = query_start_loc[: conv_state_indices.shape[0] + 1]
    if long := x.dim() == 3:
        rows = rows.transpose(1, 2)
    result = rows.clone(memory_format=torch.contiguous_format)  # tokens outside all rows stay as they are
    ops.causal_conv1d_update(
        rows,
        conv_state,
        weight,
        bias,
        slots=conv_state_indices,
        cu_seqlens=query_start_loc,
        num_accepted_tokens=num_accepted_tokens,
        silu=is_silu_or_flag(name, activation),
        null_slot=null_block_id,
        out=result,
    )
    return (x if out is None else out).copy_(result.transpose(1, 2) if long else result)
