"""The oracle of causal_conv1d: one sequence, one token and one tap at a time, written from the formulas."""

from itertools import pairwise

import torch
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    conv_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """Return what the op leaves in `out` and in `conv_state`, both new tensors; the arguments stay as they are.

    Everything is computed in `dtype` and rounded once to the dtype of `out` (of `x` without it) and of `conv_state`.
    Tokens that belong to no sequence keep what `out` holds, NaN without it.
    """
    output = torch.full_like(x, torch.nan) if out is None else out.clone()
    state = None if conv_state is None else conv_state.clone()
    width = weight.shape[1]
    for sequence, places in enumerate(_tokens_of_sequences(x, cu_seqlens)):
        slot = sequence if slots is None else int(slots.reshape(slots.shape[0], -1)[sequence, 0])
        if slots is not None and (slot < 0 or slot == null_slot):
            for place in places:
                output[place] = 0
            continue
        target = slot if write_slots is None else int(write_slots.reshape(write_slots.shape[0], -1)[sequence, 0])
        is_kept = write_slots is None or (target >= 0 and target != null_slot)
        if not places and (target == slot or not is_kept):
            continue
        # Each entry as the output sees it, and as it is stored: an old column moves as it is, a new input is rounded.
        nothing = torch.zeros(x.shape[-1], dtype=dtype, device=x.device)
        exact, stored = [nothing] * (width - 1), [nothing] * (width - 1)
        if conv_state is not None and has_initial_state is not None and has_initial_state[sequence]:
            stored = [conv_state[slot, :, column] for column in range(width - 1)]
            exact = [column.to(dtype) for column in stored]
        for place in places:
            exact.append(x[place].to(dtype))
            stored.append(x[place])
            acc = torch.zeros(x.shape[-1], dtype=dtype, device=x.device)
            if bias is not None:
                acc = acc + bias.to(dtype)
            for tap in range(width):
                acc = acc + exact[len(exact) - width + tap] * weight[:, tap].to(dtype)
            if silu:
                acc = acc * torch.sigmoid(acc)
            output[place] = acc.to(output.dtype)
        if state is not None and is_kept:
            for column, entry in enumerate(stored[-(width - 1) :]):
                state[target, :, column] = entry.to(state.dtype)
    return output, state


def _tokens_of_sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[list[tuple[int, ...]]]:
    """List, for every sequence, the indices of its tokens in `x`."""
    if cu_seqlens is None:
        return [[(sequence, token) for token in range(x.shape[1])] for sequence in range(x.shape[0])]
    return [[(token,) for token in range(start, end)] for start, end in pairwise(cu_seqlens.tolist())]
