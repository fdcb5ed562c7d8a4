"""Decode steps of a convolution and of a recurrence, for any number of rows, which tests of swaps put into models."""

import torch

from mamba_ops.registry import Sample
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")


def conv_step(rows: int) -> Sample:
    dim, width, slots = 24, 4, 3 * rows + 2
    x, weight = torch.randn(rows, dim, device=DEVICE), torch.randn(dim, width, device=DEVICE)
    cache = torch.randn(slots, width - 1, dim, device=DEVICE).transpose(1, 2)
    return Sample("step", (x, cache, weight), {"slots": torch.arange(rows, device=DEVICE) + 1})


def ssm_step(rows: int) -> Sample:
    heads, dim, dstate, groups, slots = 4, 8, 16, 2, 3 * rows + 2  # 17 at first: no two sizes agree
    x, dt = torch.randn(rows, heads, dim, device=DEVICE), torch.rand(rows, heads, device=DEVICE)
    B, C = (torch.randn(rows, groups, dstate, device=DEVICE) for _ in range(2))
    state, A = torch.randn(slots, heads, dim, dstate, device=DEVICE), -torch.rand(heads, device=DEVICE)
    return Sample("step", (state, x, dt, A, B, C), {"slots": torch.arange(rows, device=DEVICE) + 1, "D": -A})
