"""The functions of causal_conv1d 1.6, over our ops."""

from torch import Tensor
from torch.nn import functional

from mamba_ops import ops
from mamba_ops.compat.arguments import Packed, States, check_states, is_silu, refuse, with_states, written
from mamba_ops.registry import answering


@answering
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    **others: object,
) -> Tensor | States:
    """Convolve sequences `(batch, dim, length)`; with `return_final_states` also return their last width - 1 inputs.

    Differentiable: x, weight, bias and initial_states; final states have gradients too.

    Args:
        x, weight, bias: `(batch, dim, length)`, `(dim, width)` and `(dim,)`.
        seq_idx: int32 or int64 `(batch, length)`, the sequence that each token is of, where a row has several. Without
            `cu_seqlens` too it waits for the device, and torch.compile does not trace it. No states then.
        initial_states: `(batch, dim, width - 1)`, the inputs before the first.
        return_final_states: whether to return `(output, final states)`.
        final_states_out: where the final states go, `(batch, dim, width - 1)`. Mutated.
        activation: None, "silu" or "swish".
        cu_seqlens: not in the original. int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to
            cu_seqlens[i + 1]; batch is 1.
        others: refused.
    """
    name = "causal_conv1d_fn"
    refuse(name, **others)
    if not return_final_states:
        refuse(name, final_states_out=final_states_out)
    batch, dim, length = x.shape
    packed = Packed(name, (batch, length), seq_idx, cu_seqlens)
    silu, rows = is_silu(name, activation), packed.flat(x.transpose(1, 2))
    if not return_final_states and initial_states is None:
        out = ops.causal_conv1d(rows, weight, bias, cu_seqlens=packed.cu_seqlens, silu=silu)
        return packed.rows(out).transpose(1, 2)
    if packed.cu_seqlens is not None:
        expected = "neither initial nor final states: they are of whole rows"
        raise ValueError(f"{name}: seq_idx: got packed sequences, expected {expected}")
    shape = (batch, dim, weight.shape[-1] - 1)
    check_states(name, "final_states_out", final_states_out, shape)
    written(name, final_states_out=final_states_out)
    out, states = with_states(
        name,
        ops.causal_conv1d,
        *(rows, weight, bias),
        cache="conv_state",
        shape=shape,
        dtype=x.dtype,
        initial=("initial_states", initial_states),
        silu=silu,
    )
    if final_states_out is not None:
        states = final_states_out.copy_(states)
    return (out.transpose(1, 2), states) if return_final_states else out.transpose(1, 2)


@answering
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve new inputs, `(batch, dim)` or `(batch, dim, length)`, with those before them, which `conv_state` holds.

    Args:
        x: the new inputs.
        conv_state: `(slots, dim, state_len)`, the last state_len inputs, the latest in the last column. Mutated.
        weight, bias: `(dim, width)`, width at least 2, and `(dim,)`; state_len is at least width - 1, and at most 7.
        activation: None, "silu" or "swish".
        cache_seqlens: refused; conv_state is no circular buffer here, its columns move.
        conv_state_indices: int32 or int64 `(batch,)`, the slot of each row; a negative one is padding.
    """
    refuse("causal_conv1d_update", cache_seqlens=cache_seqlens)
    silu = is_silu("causal_conv1d_update", activation)
    state_len, width = conv_state.shape[2], weight.shape[1]
    if width < 2:
        raise ValueError(f"causal_conv1d_update: weight: got width {width}, expected a width of 2 to 8")
    if state_len < width - 1:
        raise ValueError(
            f"causal_conv1d_update: conv_state: got state_len {state_len}, expected at least {width - 1}; "
            "it holds the last width - 1 inputs"
        )
    if spare := state_len + 1 - width:
        # The op's window begins in column 0, the original's ends in the last one. With a tap of weight zero for each
        # spare column the two are the same, and all columns shift.
        weight = functional.pad(weight, (spare, 0))
    rows = x if x.dim() == 2 else x.transpose(1, 2)
    out = ops.causal_conv1d_update(rows, conv_state, weight, bias, slots=conv_state_indices, silu=silu)
    return out if x.dim() == 2 else out.transpose(1, 2)
