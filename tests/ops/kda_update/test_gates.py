"""What layers make of their projections: decays, and how much is written."""

import pytest
import torch

from mamba_ops.ops.gated_delta_rule_update.reference import delta_rule_gates
from mamba_ops.ops.kda_update.reference import kda_gate

EXTREMES = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 19.0, 21.0, 100.0, 1e4])


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gradients_of_the_gate_are_finite_and_right(lower_bound: float | None) -> None:
    """An exponential that overflows where another branch is taken must not make NaN of its gradient."""
    a = EXTREMES.view(-1, 1, 1).clone().requires_grad_()
    A_log, dt_bias = torch.tensor([0.5], requires_grad=True), torch.tensor([[0.25]], requires_grad=True)
    g = kda_gate(a, A_log, dt_bias, lower_bound)
    gradients = torch.autograd.grad(g.sum(), (a, A_log, dt_bias))
    rate, d = A_log.double().exp(), a.double() + 0.25
    if lower_bound is None:
        expected, slope = -rate * torch.nn.functional.softplus(d), -rate * torch.sigmoid(d)
    else:
        share = torch.sigmoid(rate * d)
        expected, slope = lower_bound * share, lower_bound * share * (1 - share) * rate
    torch.testing.assert_close(g.double(), expected.view_as(g))
    torch.testing.assert_close(gradients[0].double(), slope.view_as(g), atol=1e-7, rtol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_of_the_gated_delta_rule_are_finite() -> None:
    a, b = (EXTREMES.view(-1, 1).clone().requires_grad_() for _ in range(2))
    gates = delta_rule_gates(a, b, torch.zeros(1), torch.zeros(1))
    slopes = torch.autograd.grad(sum(gate.sum() for gate in gates), (a, b))
    torch.testing.assert_close(slopes[0], -torch.sigmoid(a), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(slopes[1], torch.sigmoid(b) * torch.sigmoid(-b), atol=1e-7, rtol=1e-5)
