"""Calls of our own op that a GPU's backend refuses, or that CUDA graphs do; beside them what both take."""

import torch
from torch import Tensor, nn

import mamba_ops


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return a state, and one token for each of three rows."""
    rows, heads, dim, dstate = 3, 2, 8, 16
    shapes = ((rows, heads, dim, dstate), *[(rows, heads, dim)] * 2, (heads,), *[(rows, 1, dstate)] * 2)
    state, x, dt, A, B, C = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return state, x, dt, -A.abs(), B, C


class StateAsInput(nn.Module):
    """What the caller passes may lie elsewhere in the next call."""

    def forward(self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mamba_ops.selective_state_update(state, x, dt, A, B, C, dt_softplus=True)  # planted


class StateAsBuffer(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("state", inputs(dtype)[0])

    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mamba_ops.selective_state_update(self.state, x, dt, A, B, C, dt_softplus=True)  # planted


def as_input() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """CUDA graphs are not recorded."""
    return StateAsInput(), inputs(torch.float32)


def refused() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Triton leaves float64 to torch."""
    return StateAsBuffer(torch.float64), inputs(torch.float64)[1:]


def twin() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Neither."""
    return StateAsBuffer(torch.float32), inputs(torch.float32)[1:]
