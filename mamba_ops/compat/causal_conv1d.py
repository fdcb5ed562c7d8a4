"""The functions of causal_conv1d 1.7, over our ops."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops import ops
from mamba_ops.compat.arguments import (
    States,
    check_states,
    floating,
    is_silu,
    only,
    refuse,
    with_states,
    without_gradients,
    written,
)
from mamba_ops.compat.packing import Packed, convolved_apart
from mamba_ops.ops._common.checking import one_device, shape_is, slot_table
from mamba_ops.ops._common.slots import is_padding, store_rows
from mamba_ops.ops._common.values import slots_in_cache
from mamba_ops.ops.causal_conv1d_update.op import WIDEST
from mamba_ops.registry import answering, bad_argument, use_backend
from mamba_ops.registry.errors import in_call_of

_LONGEST = 2**16  # inputs that a state keeps: more would be memory alone, by mistake all that there is


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
        seq_idx: int32 or int64 `(batch, length)`, the sequence that each token is of, where a row has several; the
            output of a token with a negative one is zero. An eager call waits for the device, once a tensor. No final
            states then.
        initial_states: `(batch, dim, width - 1)`, the inputs before the first of each row.
        return_final_states: whether to return `(output, final states)`.
        final_states_out: where the final states go, `(batch, dim, width - 1)`. Mutated.
        activation: None, "silu" or "swish".
        cu_seqlens: not in the original. int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to
            cu_seqlens[i + 1]; batch is 1, and initial states may be of the n sequences.
        others: refused.
    """
    name = "causal_conv1d_fn"
    refuse(name, **others)
    if not return_final_states:
        refuse(name, final_states_out=final_states_out)
    batch, dim, length = x.shape
    packed = Packed(name, (batch, length), seq_idx, cu_seqlens)
    silu = is_silu(name, activation)
    if packed.is_packed and return_final_states:
        expected = "no final states: a row has those of several sequences"
        raise ValueError(f"{name}: seq_idx: got packed sequences, expected {expected}")
    history = weight.shape[-1] - 1
    if packed.first is not None:
        check_states(name, "initial_states", initial_states, (batch, dim, history))
        out = convolved_apart(packed.first, x.transpose(1, 2), weight, bias, initial_states, activate=silu)
        return _outside(out, packed).transpose(1, 2)
    rows = packed.flat(x.transpose(1, 2))
    if not return_final_states and initial_states is None:
        out = ops.causal_conv1d(rows, weight, bias, cu_seqlens=packed.cu_seqlens, silu=silu)
        return _outside(packed.rows(out), packed).transpose(1, 2)
    initial_states = packed.initial("initial_states", initial_states)
    shape = (packed.count(), dim, history)
    check_states(name, "final_states_out", final_states_out, shape)
    inputs = {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}
    written(name, inputs, final_states_out=final_states_out)
    out, states = with_states(
        name,
        ops.causal_conv1d,
        *(rows, weight, bias),
        cache="conv_state",
        shape=shape,
        dtype=x.dtype,
        initial=("initial_states", initial_states),
        silu=silu,
        cu_seqlens=packed.cu_seqlens,
    )
    if final_states_out is not None:
        states = final_states_out.copy_(states)
    out = _outside(packed.rows(out), packed).transpose(1, 2)
    return (out, states) if return_final_states else out


def _outside(out: Tensor, packed: Packed) -> Tensor:
    """Return `(batch, length, dim)` with zeros for the tokens of no sequence."""
    return out if packed.outside is None else out.masked_fill(packed.outside.unsqueeze(-1), 0)


@answering
@without_gradients
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
        weight, bias: `(dim, width)`, width 2 to 8, and `(dim,)`; state_len is at least width - 1.
        activation: None, "silu" or "swish".
        cache_seqlens: int32 or int64 `(batch,)`: conv_state is a circular buffer then; new inputs go to the columns
            from cache_seqlens % state_len on, and the width - 1 columns before are the past.
        conv_state_indices: int32 or int64 `(batch,)`, the slot of each row; a negative one is padding, whose output is
            zero.
    """
    name = "causal_conv1d_update"
    silu = is_silu(name, activation)
    state_len, width = conv_state.shape[2], weight.shape[1]
    if not 2 <= width <= WIDEST:
        raise ValueError(f"{name}: weight: got width {width}, expected a width of 2 to {WIDEST}")
    if state_len < width - 1:
        raise ValueError(
            f"{name}: conv_state: got state_len {state_len}, expected at least {width - 1}; "
            "it holds the last width - 1 inputs"
        )
    rows = x if x.dim() == 2 else x.transpose(1, 2)
    if cache_seqlens is None and state_len < WIDEST:
        newest_last = state_len >= width
        out = ops.causal_conv1d_update(
            rows, conv_state, weight, bias, slots=conv_state_indices, silu=silu, newest_last=newest_last
        )
    else:
        out = _update_of_window(rows, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    return out if x.dim() == 2 else out.transpose(1, 2)


def _update_of_window(
    rows: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    slots: Tensor | None,
) -> Tensor:
    """Run the op on a copy of the columns that it reads, then store the new inputs; a state may be of any length."""
    name, n, state_len, history = "causal_conv1d_update", rows.shape[0], conv_state.shape[2], weight.shape[1] - 1
    _check_update(rows, conv_state, cache_seqlens, slots)
    written(name, conv_state=conv_state)
    slot = torch.arange(n, device=rows.device) if slots is None else slots[:n].long()
    is_active = ~is_padding(slot, -1, conv_state.shape[0])
    state = conv_state[torch.where(is_active, slot, 0)]
    if cache_seqlens is None:
        window = state[..., state_len - history :]
    else:
        places = (cache_seqlens.long().unsqueeze(1) + torch.arange(-history, 0, device=rows.device)) % state_len
        window = state.gather(2, places.unsqueeze(1).expand(-1, state.shape[1], -1))
    own = torch.where(is_active, torch.arange(n, device=rows.device), -1)
    out = ops.causal_conv1d_update(rows, window.contiguous(), weight, bias, slots=own, silu=silu)
    new = (rows.unsqueeze(1) if rows.dim() == 2 else rows).transpose(1, 2).to(conv_state.dtype)
    if cache_seqlens is None:
        state = torch.cat((state, new), dim=2)[..., new.shape[2] :]
    else:
        first = max(new.shape[2] - state_len, 0)  # what would be overwritten at once
        places = (cache_seqlens.long().unsqueeze(1) + torch.arange(first, new.shape[2], device=rows.device)) % state_len
        state = state.scatter(2, places.unsqueeze(1).expand(-1, state.shape[1], -1), new[..., first:])
    store_rows(conv_state, slot, state, is_active)
    return out


def _check_update(rows: Tensor, conv_state: Tensor, cache_seqlens: Tensor | None, slots: Tensor | None) -> None:
    """Raise, before anything is written, about what the op does not see."""
    name, n = "causal_conv1d_update", rows.shape[0]
    floating(name, x=rows, conv_state=conv_state)
    try:
        shape_is("conv_state", conv_state, (conv_state.shape[0], rows.shape[-1], conv_state.shape[2]))
        slot_table("conv_state_indices", slots, rows=n)
        if slots is None and conv_state.shape[0] < n:
            raise bad_argument("conv_state", got=f"{conv_state.shape[0]} slots", expected=f"at least {n}")
        if cache_seqlens is not None:
            shape_is("cache_seqlens", cache_seqlens, (n,), hint="one position a row")
            if cache_seqlens.dtype not in (torch.int32, torch.int64):
                raise bad_argument("cache_seqlens", got=str(cache_seqlens.dtype), expected="int32 or int64")
        one_device(rows.device, "x", conv_state=conv_state, cache_seqlens=cache_seqlens, conv_state_indices=slots)
        if slots is not None and slots.device.type == "cpu" and not torch.compiler.is_compiling():
            slots_in_cache("conv_state_indices", slots[:n], slots[:n] >= 0, conv_state, "conv_state")
    except ValueError as error:
        raise in_call_of(name, error) from None


@answering
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Return the last inputs of packed sequences, `(n, dim, state_len)`; zeros before those of shorter ones.

    Args:
        x: `(tokens, dim)`.
        cu_seqlens: int32 or int64 `(n + 1,)`.
        state_len: how many inputs, 65536 at most.
    """
    floating("causal_conv1d_varlen_states", x=x)
    if state_len > _LONGEST:
        raise ValueError(f"causal_conv1d_varlen_states: state_len: got {state_len}, expected at most {_LONGEST}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"got {str(cu_seqlens.dtype).removeprefix('torch.')}, expected int32 or int64"
        raise ValueError(f"causal_conv1d_varlen_states: cu_seqlens: {got}")
    if x.dim() != 2 or cu_seqlens.dim() != 1:
        got = f"shapes {tuple(x.shape)} and {tuple(cu_seqlens.shape)}"
        raise ValueError(f"causal_conv1d_varlen_states: x, cu_seqlens: got {got}, expected (tokens, dim) and (n + 1,)")
    bounds = cu_seqlens.long()
    places = bounds[1:].unsqueeze(1) + torch.arange(-state_len, 0, device=x.device)
    inside = (places >= bounds[:-1].unsqueeze(1)).unsqueeze(-1)
    if not x.shape[0]:
        return x.new_zeros(places.shape[0], state_len, x.shape[1]).transpose(1, 2)
    return torch.where(inside, x[places.clamp(0, x.shape[0] - 1)], 0).transpose(1, 2)


# -- causal_conv1d.cpp_functions --------------------------------------------------------------------------------------


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """Do what `causal_conv1d_fn` does; final states are written where there is a place for them."""
    options: dict[str, Any] = {"seq_idx": seq_idx, "initial_states": initial_states}
    options["activation"] = "silu" if silu_activation else None
    if final_states_out is None:
        return only(causal_conv1d_fn(x, weight, bias, **options))
    options |= {"return_final_states": True, "final_states_out": final_states_out}
    return only(causal_conv1d_fn(x, weight, bias, **options))


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and initial_states, which are None for what is; `dx` is written to."""
    with torch.enable_grad():
        tensors = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial_states)]
        own_x, own_weight, own_bias, own_states = tensors
        result = causal_conv1d_fn(
            *(own_x, own_weight, own_bias, seq_idx, own_states, dfinal_states is not None),  # type: ignore[arg-type]
            activation="silu" if silu_activation else None,
        )
        results = result if isinstance(result, tuple) else (result,)
        wanted = [t for t in (own_x, own_weight, own_bias) if t is not None]
        wanted += [own_states] if own_states is not None and return_dinitial_states else []
        outer = (dout,) if dfinal_states is None else (dout, dfinal_states)
        found = iter(torch.autograd.grad(results, wanted, outer))
    grads = [next(found) if t is not None and any(t is w for w in wanted) else None for t in tensors]
    if dx is not None and grads[0] is not None:
        grads[0] = dx.copy_(grads[0])
    return tuple(grads)


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """Do what `causal_conv1d_update` does."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


# -- the references of causal_conv1d.causal_conv1d_interface ----------------------------------------------------------


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | States:
    """Do what `causal_conv1d_fn` does, on the backend `torch`."""
    options: dict[str, Any] = {"return_final_states": return_final_states, "final_states_out": final_states_out}
    with use_backend("torch"):
        return causal_conv1d_fn(
            x, weight, bias, seq_idx=seq_idx, initial_states=initial_states, activation=activation, **options
        )


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """Do what `causal_conv1d_update` does, on the backend `torch`."""
    with use_backend("torch"):
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Do what `causal_conv1d_varlen_states` does."""
    return causal_conv1d_varlen_states(x, cu_seqlens, state_len)
