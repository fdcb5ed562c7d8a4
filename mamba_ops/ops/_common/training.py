"""What the forwards of all ops that record gradients share: outputs, and states that go in and come out."""

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import floating, one_device, shape_is


def new_output(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return a new tensor like x; zeros where rows are packed, for tokens that are in no row."""
    return x.new_empty(x.shape) if cu_seqlens is None else x.new_zeros(x.shape)


def dtype_of_states(x: Tensor, initial_states: Tensor | None) -> torch.dtype:
    """Return the dtype of final states: that of the initial ones, else float32 at least."""
    if initial_states is not None:
        return initial_states.dtype
    return torch.float64 if x.dtype == torch.float64 else torch.float32  # whatever x is: it is not checked yet


def check_initial_states(initial_states: Tensor | None, x: Tensor, shape: tuple[int, ...], hint: str) -> None:
    """Raise the ValueError about initial states, if there are any and they are wrong."""
    if initial_states is not None:
        floating(initial_states=initial_states)
        shape_is("initial_states", initial_states, shape, hint=hint)
        one_device(x.device, initial_states=initial_states)


def states_to_run_on(initial_states: Tensor | None, final_states: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the cache for a forward, with row i's state in slot i, and which of its rows have an initial state.

    It is `final_states` where they are asked for; initial states themselves are not written.
    """
    if initial_states is None:
        return final_states, None
    states = initial_states.clone() if final_states is None else final_states.copy_(initial_states)
    return states, torch.ones(states.shape[0], dtype=torch.bool, device=states.device) if states.numel() else None
