"""Gradients where a token forgets nearly everything, or all, before it: e^-40, and decays of -1e4 a token."""

import pytest
import torch

from mamba_ops.ops import mamba_chunk_scan
from mamba_ops.registry import Sample
from tests.conftest import ACCELERATOR
from tests.harness import backends_here
from tests.training.gradients import expected, gradients, named

DEVICE = ACCELERATOR or torch.device("cpu")
LENGTH = 70  # two chunks of 64


def decays() -> dict[str, dict[int, float]]:
    """The step sizes of some tokens, with A = -1; all others are ordinary."""
    strong = {"e^-40": 40.0, "-1e4": 1e4}
    cases = {
        f"{name} at {at}": {at: size} for name, size in strong.items() for at in (0, 5, 31, 32, 63, 64, LENGTH - 1)
    }
    return {**cases, "often": {at: 1e4 if at % 3 else 40.0 for at in range(0, LENGTH, 9)}}


@pytest.mark.parametrize("backend", backends_here(mamba_chunk_scan.backward_op, DEVICE))
def test_every_gradient_is_right_relative_to_its_own_head(backend: str) -> None:
    """One row a case: the gradients of a row, and of A for each head, to float32's rounding."""
    cases = list(decays().values())
    rows, heads = len(cases), 2
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    dt = torch.rand(rows, LENGTH, heads, generator=generator) * 0.1
    for row, sizes in enumerate(cases):
        for at, size in sizes.items():
            dt[row, at] = size
    x = tensor(rows, LENGTH, heads, 16) / dt.to(DEVICE).clamp(min=1).unsqueeze(-1)  # inputs are ordinary
    B, C = tensor(rows, LENGTH, 1, 16), tensor(rows, LENGTH, 1, 16)
    optional = (None, None, None, tensor(rows, heads, 16, 16), None, False, 0.0, float("inf"))
    A = -torch.ones(heads, device=DEVICE)
    grads = tensor(rows, LENGTH, heads, 16), tensor(rows, heads, 16, 16)
    sample = Sample("strong decay", (*grads, x, dt.to(DEVICE), A, B, C, 64, *optional))
    found = gradients(mamba_chunk_scan, sample, backend)
    truth = expected(mamba_chunk_scan, named(mamba_chunk_scan.backward_op, sample), torch.float64)
    for name in ("grad_x", "grad_dt", "grad_B", "grad_C", "grad_initial_states", "grad_A"):
        error, size = (found[name].cpu().double() - truth[name]).abs(), truth[name].abs()
        of_rows = int(error.dim() > 1)
        worst = (error.flatten(of_rows).amax(-1) / size.flatten(of_rows).amax(-1).clamp(min=1e-30)).max()
        assert worst < 1e-5 * (2 if name == "grad_A" else 1), f"{name}: {worst:.3g}"
