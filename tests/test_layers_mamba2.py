"""What is particular to layers.Mamba2: its parameters' names, its config, its gated norm."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from mamba_ops.layers import Mamba2, gated_rms_norm
from tests.layers import HIDDEN, new_layer

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_rms_norm(device: torch.device, groups: int, norm_before_gate: bool) -> None:
    x, gate = (torch.randn(3, 5, 16, device=device, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(16, device=device, dtype=torch.float64)
    got = gated_rms_norm(x, gate, weight, groups=groups, eps=1e-3, norm_before_gate=norm_before_gate)
    opened = gate * torch.sigmoid(gate)
    h = x if norm_before_gate else x * opened
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt() for part in h.split(16 // groups, dim=-1)]
    expected = torch.cat(parts, dim=-1) * weight * (opened if norm_before_gate else 1)
    torch.testing.assert_close(got, expected)
    assert gated_rms_norm(x.half(), gate, weight).dtype == torch.float16


def test_parameters_are_named_and_shaped_as_in_mamba_ssm() -> None:
    layer = new_layer("mamba2", "cpu")
    inner, conv_dim = 32, 32 + 2 * 2 * 16
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "in_proj.weight": (inner + conv_dim + 4, HIDDEN),
        "conv1d.weight": (conv_dim, 1, 4),
        "conv1d.bias": (conv_dim,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (inner,),
        "out_proj.weight": (HIDDEN, inner),
    }


def test_new_step_sizes_are_log_uniform_in_their_range() -> None:
    steps = functional.softplus(new_layer("mamba2", "cpu", heads=512, head_dim=1).dt_bias)
    torch.testing.assert_close(torch.stack([steps.min(), steps.max()]), torch.tensor([1e-3, 1e-1]), rtol=0.02, atol=0)
    torch.testing.assert_close(steps.log().mean(), torch.tensor(1e-2).log(), rtol=0.02, atol=0)


def config_with(**changes: Any) -> SimpleNamespace:
    """What `from_config` reads of a Mamba2Config."""
    attributes = {
        "hidden_size": 32,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "time_step_limit": (0.0, float("inf")),
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
    }
    return SimpleNamespace(**attributes | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 256),
        ({"chunk_size": 64}, 64),
        ({"chunk_size": 64, "mamba_chunk_size": 32}, 32),
        ({"chunk_size": 64.0, "mamba_chunk_size": None}, 64),
    ],
    ids=str,
)
def test_chunk_size_of_a_config_is_an_int(changes: dict[str, Any], expected: int) -> None:
    chunk_size = Mamba2.from_config(config_with(**changes)).chunk_size
    assert chunk_size == expected
    assert type(chunk_size) is int


def test_from_config_reads_the_rest() -> None:
    changes = {"time_step_limit": [0, 0.5], "layer_norm_epsilon": 1e-3, "use_bias": True, "use_conv_bias": False}
    layer = Mamba2.from_config(config_with(**changes), dtype=torch.bfloat16)
    assert (layer.dt_min, layer.dt_max, layer.norm.eps, layer.norm.groups) == (0.0, 0.5, 1e-3, 2)
    assert layer.in_proj.bias is not None
    assert layer.conv1d.bias is None
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert Mamba2.from_config(config_with()).dt_max == math.inf
    assert "heads=8" in repr(layer)


def test_a_config_that_is_not_supported() -> None:
    with pytest.raises(ValueError, match="hidden_act: got 'gelu', expected 'silu'"):
        Mamba2.from_config(config_with(hidden_act="gelu"))
    with pytest.raises(ValueError, match="no attribute 'head_dim'; expected a config of Mamba-2, Bamba"):
        Mamba2.from_config(SimpleNamespace(hidden_size=32, hidden_act="silu", time_step_limit=(0, 1)))
    with pytest.raises(ValueError, match="got a SimpleNamespace, whose layers have multipliers; expected a config of"):
        Mamba2.from_config(config_with(ssm_in_multiplier=1.0))
    with pytest.raises(ValueError, match="groups: got 3, expected a divisor of the 4 heads"):
        new_layer("mamba2", "cpu", groups=3)
