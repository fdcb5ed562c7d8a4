"""What layers written for fla do around its functions, `fla.layers.utils`: padding away and back, states by layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ops.compat.arguments import whole
from mamba_ops.compat.fla.index import prepare_cu_seqlens_from_mask, prepare_lens_from_mask
from mamba_ops.registry import answering


@answering
def get_unpad_data(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return which tokens of flat rows a mask keeps, where rows end without the others, and the longest's length.

    Waits for the device.

    Args:
        attention_mask: bool or integers `(batch, length)`.
    """
    longest = int(prepare_lens_from_mask(attention_mask).max())
    return attention_mask.flatten().nonzero().flatten(), prepare_cu_seqlens_from_mask(attention_mask), longest


@answering
def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Return entries of the first axis, x[indices]. Differentiable."""
    if x.dim() < 2:
        raise ValueError(f"index_first_axis: x: got shape {tuple(x.shape)}, expected two axes or more")
    return x[indices]


@answering
def index_put_first_axis(x: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return zeros whose first axis has `first_axis_dim` entries, with x at `indices`. Differentiable."""
    return x.new_zeros(first_axis_dim, *x.shape[1:]).index_put((indices.long(),), x)


@answering
def pad_input(hidden_states: Tensor, indices: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Return packed tokens `(tokens, ...)` as rows `(batch_size, seq_len, ...)`, zeros elsewhere. Differentiable.

    Args:
        hidden_states: the tokens.
        indices: `(tokens,)`, where each is in the flat rows, as `get_unpad_data` tells.
        batch_size, seq_len: of the rows.
    """
    whole("pad_input", batch_size=batch_size, seq_len=seq_len)
    rows: Tensor = index_put_first_axis(hidden_states, indices, batch_size * seq_len).unflatten(
        0, (batch_size, seq_len)
    )
    return rows


@answering
def unpad_input(
    q: Tensor, states: Sequence[Tensor], attention_mask: Tensor, q_len: int, keepdim: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor], tuple[int, int]]:
    """Return queries and states without padding, the queries' places, and where rows of both end, and their longest.

    Args:
        q: `(batch, q_len, ...)`.
        states: each `(batch, length, ...)`.
        attention_mask: bool or integers `(batch, length)`.
        q_len: the length, or 1: a step of decoding.
        keepdim: whether tokens are returned as one row, `(1, tokens, ...)`.
    """
    indices, ends, longest = get_unpad_data(attention_mask)
    batch, length = states[0].shape[:2]
    if q_len not in (1, length):
        raise NotImplementedError(f"unpad_input: q_len: got {q_len}, expected {length}, as the states have, or 1")
    kept = tuple(index_first_axis(state.flatten(0, 1), indices) for state in states)
    if q_len == length:
        q, q_indices, q_ends, q_longest = index_first_axis(q.flatten(0, 1), indices), indices, ends, longest
    else:
        q_ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        q, q_indices, q_longest = q.squeeze(1), q_ends[:-1], 1
    if keepdim:
        q, kept = q.unsqueeze(0), tuple(state.unsqueeze(0) for state in kept)
    return q, kept, q_indices, (q_ends, ends), (q_longest, longest)


def require_cache_layer_idx(module: nn.Module, past_key_values: Any) -> Any:
    """Return a layer's number; raise if there is a cache and it has none."""
    index = getattr(module, "layer_idx", None)
    if past_key_values is not None and index is None:
        raise ValueError(f"{type(module).__name__}: layer_idx: got None, expected a number, as there is a cache")
    return index


def get_layer_cache(module: nn.Module, past_key_values: Any) -> Any:
    """Return what a cache keeps for a layer; None: nothing yet."""
    index = require_cache_layer_idx(module, past_key_values)
    return past_key_values[index] if past_key_values is not None and len(past_key_values) > index else None


def update_layer_cache(module: nn.Module, past_key_values: Any, **kwargs: Any) -> Any:
    """Let a cache keep a layer's states; return it."""
    index = require_cache_layer_idx(module, past_key_values)
    if past_key_values is not None:
        past_key_values.update(layer_idx=index, **kwargs)
    return past_key_values
