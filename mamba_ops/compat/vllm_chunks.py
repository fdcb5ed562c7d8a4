"""vLLM's SSD: its chunks may be shorter than the chunk size anywhere, and last states may go to a cache."""

import math

import torch
from torch import Tensor

from mamba_ops import ops
from mamba_ops.compat.arguments import all_have, check_states, floating, floating_dtypes, upcast, written
from mamba_ops.ops._common.checking import count_of, one_device, shape_is, slot_table, tensor_rank
from mamba_ops.ops._common.slots import store_rows
from mamba_ops.ops._common.values import slots_in_cache
from mamba_ops.registry import answering, bad_argument, is_plain
from mamba_ops.registry.errors import in_call_of


@answering
def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    cu_seqlens: Tensor,
    cu_chunk_seqlens: Tensor,
    last_chunk_indices: Tensor,
    seq_idx: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_intermediate_states: bool = False,
    state_dtype: torch.dtype | None = None,
    final_states_out: Tensor | None = None,
    final_state_indices: Tensor | None = None,
) -> Tensor | None:
    """Scan packed sequences, write the output to `out`, and their last states to `final_states_out` or return them.

    Args:
        x, z: `(tokens, heads, dim)`.
        dt: `(tokens, heads)`.
        A, dt_bias: `(heads,)`.
        B, C: `(tokens, groups, dstate)`.
        chunk_size: tokens per chunk, at most.
        cu_seqlens: int `(n + 1,)`.
        cu_chunk_seqlens, last_chunk_indices: int `(chunks + 1,)` and `(n,)`: which chunks there are, and the last one
            of each sequence. They decide what `return_intermediate_states` returns, and nothing but rounding otherwise.
        seq_idx: of no effect: it follows from the former.
        out: `(tokens, heads, dim)`. Mutated.
        D: `(heads,)` or `(heads, dim)`.
        initial_states: `(n, heads, dim, dstate)`; None: zeros.
        dt_softplus: whether softplus is applied to dt after the bias.
        dt_limit: the least and the largest dt, always applied.
        return_intermediate_states: return the states after every chunk, `(chunks, heads, dim, dstate)`.
        state_dtype: of what is returned; None: that of `C`.
        final_states_out: a cache `(slots, heads, dim, dstate)`, which takes each sequence's last state. Mutated.
        final_state_indices: int `(n,)`: where in it; a negative one is not stored, block 0 is a block like any other.
    """
    name = "mamba_chunk_scan_combined_varlen"
    if final_states_out is not None and return_intermediate_states:
        raise ValueError(f"{name}: return_intermediate_states: got it with final_states_out, expected one of the two")
    if (final_states_out is None) != (final_state_indices is None):
        raise ValueError(f"{name}: final_state_indices: got one of it and final_states_out, expected both or neither")
    floating(name, x=x, final_states_out=final_states_out)
    written(name, out=out, final_states_out=final_states_out)
    n, compute = cu_seqlens.shape[0] - 1, upcast(x)
    if final_states_out is not None and final_state_indices is not None:
        _check_final_states(final_states_out, (*x.shape[1:], B.shape[-1]), final_state_indices, n)
    floating_dtypes(name, state_dtype=state_dtype)
    kept = C.dtype if state_dtype is None else state_dtype
    state = x.new_zeros(n, *x.shape[1:], B.shape[-1], dtype=compute)
    check_states(name, "initial_states", initial_states, state.shape)
    if initial_states is not None:
        state.copy_(initial_states)
    dt_min, dt_max = dt_limit
    if return_intermediate_states:
        states = x.new_empty(cu_chunk_seqlens.shape[0] - 1 + n, *state.shape[1:], dtype=kept)
        d = dt.to(compute) if dt_bias is None else dt.to(compute) + dt_bias.to(compute)
        d = (torch.nn.functional.softplus(d) if dt_softplus else d).clamp(dt_min, dt_max)
        chunks = _Chunks(cu_chunk_seqlens, x.shape[0], chunk_size)
        y = ops.mamba_chunk_scan(
            chunks.padded(x),
            chunks.padded(d),
            A,
            chunks.padded(B),
            chunks.padded(C),
            chunk_size,
            D=D,
            z=None if z is None else chunks.padded(z),
            dt_min=-math.inf,
            cu_seqlens=torch.nn.functional.pad((last_chunk_indices + 1) * chunk_size, (1, 0)),
            ssm_state=state,
            has_initial_state=all_have(state),
            chunk_states=states,
            out=x.new_empty(chunks.tokens, *x.shape[1:], dtype=out.dtype),
        )
        chunks.unpad(y, out)
        return states[:-n] if n else states
    ops.mamba_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_min=dt_min,
        dt_max=dt_max,
        cu_seqlens=cu_seqlens,
        ssm_state=state,
        has_initial_state=all_have(state),
        out=out,
    )
    if final_states_out is None or final_state_indices is None:
        return state.to(kept)
    store_rows(final_states_out, final_state_indices[:n].long(), state, final_state_indices[:n] >= 0)
    return None


def _check_final_states(cache: Tensor, sizes: tuple[int, ...], slots: Tensor, n: int) -> None:
    """Raise, before anything is written, if the last states of n sequences can't be stored in a cache afterwards."""
    function = "mamba_chunk_scan_combined_varlen"
    try:
        shape_is("final_states_out", cache, (count_of(cache), *sizes), hint="(slots, heads, dim, dstate)")
        tensor_rank("final_state_indices", slots, {1: "(n,)"})
        slot_table("final_state_indices", slots, rows=n)
        one_device(slots.device, "final_state_indices", final_states_out=cache)
        if is_plain(cache) != is_plain(slots):
            got, expected = f"a {type(cache).__name__}", f"a {type(slots).__name__}, as final_state_indices is"
            raise bad_argument("final_states_out", got=got, expected=expected)
        if slots.device.type == "cpu":  # elsewhere looking would wait
            slots_in_cache("final_state_indices", slots[:n], slots[:n] >= 0, cache, "final_states_out")
    except ValueError as error:
        raise in_call_of(function, error) from None


class _Chunks:
    """Tokens with every chunk padded to its full size: a step size of zero leaves the state as it is."""

    def __init__(self, cu_chunk_seqlens: Tensor, tokens: int, size: int) -> None:
        starts, ends = cu_chunk_seqlens[:-1].long(), cu_chunk_seqlens[1:].long()
        self.tokens = starts.shape[0] * size
        index = starts.unsqueeze(1) + torch.arange(size, device=starts.device)
        self._inside = (index < ends.unsqueeze(1)).flatten()
        self._index = index.flatten().clamp(max=max(tokens - 1, 0))
        token = torch.arange(tokens, device=starts.device)
        chunk = (torch.searchsorted(cu_chunk_seqlens, token, right=True) - 1).clamp(max=max(starts.shape[0] - 1, 0))
        self._owned = token < cu_chunk_seqlens[-1]
        self._padded_index = (chunk * size + token - starts[chunk]).clamp(max=max(self.tokens - 1, 0))

    def padded(self, tensor: Tensor) -> Tensor:
        """Return an activation `(tokens, ...)` in the padded layout."""
        return torch.where(self._inside.view(-1, *[1] * (tensor.dim() - 1)), tensor[self._index], 0)

    def unpad(self, padded: Tensor, out: Tensor) -> None:
        """Write what was computed on padded tokens to `out`; tokens outside all chunks stay as they are."""
        if self.tokens and out.numel():
            out.copy_(torch.where(self._owned.view(-1, 1, 1), padded[self._padded_index], out))
