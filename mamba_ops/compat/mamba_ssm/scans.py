"""The functions of mamba_ssm 2.3, over our ops."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mamba_ops import ops
from mamba_ops.compat.arguments import (
    States,
    floating,
    is_silu,
    numbers,
    only,
    per_head,
    refuse,
    upcast,
    with_states,
    without_gradients,
)
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn
from mamba_ops.compat.packing import Packed, with_skip_and_gate, without_past
from mamba_ops.layers import gated_rms_norm
from mamba_ops.registry import answering


@answering
@without_gradients
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    **others: object,
) -> Tensor:
    """Advance `state` by one token and return that token's output.

    Args:
        state: `(slots, heads, dim, dstate)`, or all arguments without heads. Mutated.
        x, dt, z: `(batch, heads, dim)`.
        A: `(heads, dim, dstate)`.
        B, C: `(batch, groups, dstate)`.
        D, dt_bias: `(heads, dim)`.
        dt_softplus: whether softplus is applied to dt after the bias.
        state_batch_indices: int32 or int64 `(batch,)`, the slot of each row; a negative one is padding.
        others: refused.
    """
    refuse("selective_state_update", **others)
    if state.dim() == 4:  # what is expanded from one number a head is passed without the expansion, and read once
        dt, A = per_head(dt, 1), per_head(A, 2)
        D, dt_bias = (None if t is None else per_head(t, 1) for t in (D, dt_bias))
    return ops.selective_state_update(
        state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, slots=state_batch_indices
    )


@answering
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    **others: object,
) -> Tensor | States:
    """Scan sequences of length `length`; with `return_final_states` also return their last states, in float32.

    Differentiable: x, dt, A, B, C, D, z, dt_bias and initial_states; final states have gradients too.

    Args:
        x, z: `(batch, length, heads, dim)`.
        dt: `(batch, length, heads)`.
        A, dt_bias: `(heads,)`.
        B, C: `(batch, length, groups, dstate)`.
        chunk_size: tokens per chunk.
        D: `(heads,)` or `(heads, dim)`.
        initial_states: `(batch, heads, dim, dstate)`.
        seq_idx: int32 or int64 `(batch, length)`, the sequence that each token is of, where a row has several; initial
            states are those of the rows' first ones, final states those of their last ones. Without `cu_seqlens` too an
            eager call waits for the device, once a tensor.
        cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1]; batch is
            1, and initial states may be of the n sequences.
        return_varlen_states: whether to return, last, the last states of all n sequences.
        dt_softplus: whether softplus is applied to dt after the bias.
        dt_limit: the least and the largest dt.
        return_final_states: whether to return `(output, final states)`.
        others: refused.
    """
    name = "mamba_chunk_scan_combined"
    refuse(name, **others)
    floating(name, x=x)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{name}: return_varlen_states: got it without cu_seqlens, expected both or neither")
    packed = Packed(name, x.shape[:2], seq_idx, cu_seqlens)
    with_last = return_final_states or return_varlen_states
    dt_min, dt_max = dt_limit
    options: dict[str, Any] = {"dt_min": dt_min, "dt_max": dt_max, "cu_seqlens": packed.cu_seqlens}
    if packed.first is not None:
        long = without_past(packed.first, x, dt, A, dt_bias=dt_bias, dt_softplus=dt_softplus, limit=dt_limit)
        tensors, options["dt_min"], options["dt_max"] = (long.x, long.dt, A, B, C, chunk_size), -math.inf, math.inf
    else:
        tensors = (packed.flat(x), packed.flat(dt), A, packed.flat(B), packed.flat(C), chunk_size)
        options |= {"D": D, "z": None if z is None else packed.flat(z), "dt_bias": dt_bias, "dt_softplus": dt_softplus}

    def finished(out: Tensor) -> Tensor:
        return packed.rows(out) if packed.first is None else with_skip_and_gate(out, x, D, z)

    if not with_last and initial_states is None:
        return finished(ops.mamba_chunk_scan(*tensors, **options))
    out, last = with_states(
        name,
        ops.mamba_chunk_scan,
        *tensors,
        cache="ssm_state",
        shape=(packed.count(), *x.shape[2:], B.shape[-1]),
        dtype=upcast(x),
        initial=("initial_states", packed.initial("initial_states", initial_states)),
        **options,
    )
    if not with_last:
        return finished(out)
    final = (packed.last(last),) if return_final_states else ()
    return (finished(out), *final, *((last,) if return_varlen_states else ()))


@answering
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    **others: object,
) -> Tensor | States:
    """Run a Mamba-2 mixer without caches from its first projection `zxbcdt` on, and return what the mixer returns.

    Differentiable: all tensors but seq_idx.

    Args:
        zxbcdt: `(batch, length, 2 * mlp + heads * dim + conv_dim + heads)`: a gated MLP's gate and value where there is
            one beside the mixer, gate, what is convolved, dt.
        conv1d_weight, conv1d_bias: `(conv_dim, width)` and `(conv_dim,)`, conv_dim = heads * dim + 2 * groups * dstate.
        dt_bias, A: `(heads,)`.
        D: `(heads, dim)`, or `(heads,)` with `headdim`.
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states: as for `mamba_chunk_scan_combined`.
        activation: of the convolution; None, "silu" or "swish".
        rmsnorm_weight: `(heads * dim,)`; None: the scan's output is gated and not normalised. The MLP's output, mlp
            channels, comes before that of the scan.
        rmsnorm_eps, norm_before_gate: of the norm.
        outproj_weight, outproj_bias: of the last projection; None: there is none.
        headdim: dim, where `D` does not tell.
        ngroups: groups of B and C, and of the norm's channels.
        others: refused.
    """
    name = "mamba_split_conv1d_scan_combined"
    refuse(name, **others)
    floating(
        name, zxbcdt=zxbcdt, rmsnorm_weight=rmsnorm_weight, outproj_weight=outproj_weight, outproj_bias=outproj_bias
    )
    numbers(name, rmsnorm_eps=rmsnorm_eps)
    heads, dim = D.shape if D.dim() == 2 else (D.shape[0], headdim)
    if dim is None:
        raise ValueError(f"{name}: headdim: got None, expected the size of a head, as D is per head")
    inner, conv_dim = heads * dim, conv1d_weight.shape[0]
    mlp, odd = divmod(zxbcdt.shape[-1] - inner - conv_dim - heads, 2)
    if mlp < 0 or odd:
        expected = f"{inner} + {conv_dim} + {heads} (gate, conv_dim, heads), and twice the channels of a gated MLP"
        raise ValueError(f"{name}: zxbcdt: got {zxbcdt.shape[-1]} channels, expected {expected}")
    mlp_gate, mlp_value, gate, mixed, dt = zxbcdt.split([mlp, mlp, inner, conv_dim, heads], dim=-1)
    is_silu(name, activation)
    Packed(name, zxbcdt.shape[:2], seq_idx)  # which would complain of the parts below otherwise
    convolved = only(
        causal_conv1d_fn(mixed.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    )
    half = (conv_dim - inner) // 2
    x, B, C = convolved.transpose(1, 2).split([inner, half, half], dim=-1)
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, dim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=gate.unflatten(-1, (heads, dim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    out, *states = y if isinstance(y, tuple) else (y,)
    out = out.flatten(-2)
    if rmsnorm_weight is not None:
        out = gated_rms_norm(
            out, gate, rmsnorm_weight, groups=ngroups, eps=rmsnorm_eps, norm_before_gate=norm_before_gate
        )
    if mlp:
        out = torch.cat((silu(mlp_gate) * mlp_value, out), dim=-1)
    if outproj_weight is not None:
        out = linear(out, outproj_weight, outproj_bias)
    return (out, states[0]) if states else out
