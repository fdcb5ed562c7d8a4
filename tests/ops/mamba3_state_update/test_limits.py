"""Steps and rates at the ends of what there is."""

import math
import os
from typing import Any

import pytest
import torch

import mamba_ops
from mamba_ops import use_backend

BACKENDS = ["torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]


def call_of(length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    lead, normal = (2, length) if length else (2,), torch.randn
    call = {"x": normal(*lead, 1, 4), "dt": normal(*lead, 1).sigmoid(), "A": -normal(*lead, 1).exp()}
    call |= {"trap": normal(*lead, 1), "angles": normal(*lead, 2), "B": normal(*lead, 1, 4), "C": normal(*lead, 1, 4)}
    sizes = {"angle_state": (1, 2), "ssm_state": (1, 4, 4), "k_state": (1, 4), "v_state": (1, 4)}
    return call | {name: normal(2, *size) for name, size in sizes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("dt", [1e4, 1e9, 1e20])
def test_angles_stay_within_a_turn_whatever_the_steps_are(dt: float, length: int, backend: str) -> None:
    call = call_of(length)
    call["dt"].fill_(dt)
    with use_backend(backend):
        mamba_ops.mamba3_state_update(**call)
    assert call["angle_state"].abs().max() <= math.pi * (1 + 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("is_scan", "length"), [(False, 0), (False, 3), (True, 3)])
@pytest.mark.parametrize("rate", [-1e30, -torch.inf])
def test_a_rate_without_end_forgets_all_before(rate: float, length: int, is_scan: bool, backend: str) -> None:
    """The state is what the last token has written."""
    call = call_of(length)
    call["A"].fill_(rate)
    op: Any = mamba_ops.mamba3_state_update
    if is_scan:
        op, more = mamba_ops.mamba3_chunk_scan, {"chunk_size": 2, "has_initial_state": torch.ones(2, dtype=torch.bool)}
        call |= more
    with use_backend(backend):
        y = op(**call)
    assert y.isfinite().all()
    last = {n: call[n][:, -1] if length else call[n] for n in ("x", "dt", "trap")}
    own = torch.sigmoid(last["trap"]) * last["dt"]
    want = own[..., None, None] * last["x"].unsqueeze(-1) * call["k_state"].unsqueeze(-2)
    torch.testing.assert_close(call["ssm_state"], want)
