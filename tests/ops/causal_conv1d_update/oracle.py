"""The oracle of causal_conv1d_update: one row, one token and one tap at a time, written from the formulas."""

from itertools import pairwise

import torch
from torch import Tensor


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return what the op leaves in `out` and in `conv_state`, both new tensors; the arguments stay as they are.

    Everything is computed in `dtype` and rounded once to the dtype of `out` (of `x` without it) and of `conv_state`.
    Tokens that belong to no row keep what `out` holds, NaN without it.
    """
    output = torch.full_like(x, torch.nan) if out is None else out.clone()
    state = conv_state.clone()
    width = weight.shape[1]
    for row, places in enumerate(_tokens_of_rows(x, cu_seqlens)):
        slot = row if slots is None else int(slots[row] if slots.dim() == 1 else slots[row, 0])
        if slots is not None and (slot < 0 or slot == null_slot):
            for place in places:
                output[place] = 0
            continue
        if not places:
            continue
        first = state.shape[2] - (width - 1) if newest_last else 0
        if num_accepted_tokens is not None:
            first = min(max(int(num_accepted_tokens[row]) - 1, 0), state.shape[2] - (width - 1))
        # Each entry as the output sees it, and as it is stored: an old column moves as it is, a new input is rounded.
        exact = [conv_state[slot, :, first + j].to(dtype) for j in range(width - 1)]
        stored = [conv_state[slot, :, j] for j in range(first)] if newest_last else []
        stored += [conv_state[slot, :, first + j] for j in range(width - 1)]
        for place in places:
            exact.append(x[place].to(dtype))
            stored.append(x[place].to(state.dtype))
            acc = torch.zeros(x.shape[-1], dtype=dtype, device=x.device)
            if bias is not None:
                acc = acc + bias.to(dtype)
            for tap in range(width):
                acc = acc + exact[len(exact) - width + tap] * weight[:, tap].to(dtype)
            if silu:
                acc = acc * torch.sigmoid(acc)
            output[place] = acc.to(output.dtype)
        kept = stored[1:]
        if num_accepted_tokens is None:
            kept = stored[-(state.shape[2] if newest_last else width - 1) :]
        for column, entry in enumerate(kept[: state.shape[2]]):
            state[slot, :, column] = entry
    return output, state


def _tokens_of_rows(x: Tensor, cu_seqlens: Tensor | None) -> list[list[tuple[int, ...]]]:
    """List, for every row, the indices of its tokens in `x`."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [[(token,) for token in range(start, end)] for start, end in pairwise(ends)]
    if x.dim() == 2:
        return [[(row,)] for row in range(x.shape[0])]
    return [[(row, token) for token in range(x.shape[1])] for row in range(x.shape[0])]
