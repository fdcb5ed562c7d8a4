"""Calls that the functions of compat.mamba_ssm, .causal_conv1d and .fla take."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mamba_ops.compat import causal_conv1d, fla, mamba_ssm

compat = SimpleNamespace(
    **{n: f for m in (causal_conv1d, fla, mamba_ssm) for n, f in vars(m).items() if not n.startswith("_")}
)
GDN = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
DELTA_RULES = (*GDN, "chunk_kda", "fused_recurrent_kda")


def conv_arguments(device: torch.device, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, length, 12, device=device, dtype=torch.float64).transpose(1, 2)
    return (
        x,
        torch.randn(12, 4, device=device, dtype=torch.float64),
        torch.randn(12, device=device, dtype=torch.float64),
    )


def scan_arguments(device: torch.device, length: int = 21) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64)

    return {
        "x": normal(2, length, 4, 8),
        "dt": normal(2, length, 4),
        "A": -normal(4).exp(),
        "B": normal(2, length, 2, 16),
        "C": normal(2, length, 2, 16),
        "D": normal(4),
        "dt_bias": normal(4),
    }


def gdn_arguments(device: torch.device, length: int = 9) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(2, length, *shape, device=device, dtype=torch.float64)

    return {"q": normal(2, 4), "k": normal(2, 4), "v": normal(4, 6), "g": -normal(4).exp(), "beta": normal(4).sigmoid()}


def delta_rule_arguments(function: str, device: torch.device) -> dict[str, Tensor]:
    """Those of one of `DELTA_RULES`; `chunk_kda` and its kin decay by channel."""
    arguments = gdn_arguments(device)
    if "kda" in function:
        arguments["g"] = -torch.randn(2, 9, 4, 4, device=device, dtype=torch.float64).exp()
    return arguments


def good_arguments(function: str, device: torch.device) -> dict[str, Any]:
    """A call that each function takes."""
    scan = scan_arguments(device)
    if function.startswith("causal"):
        arguments = dict(zip(("x", "weight", "bias"), conv_arguments(device), strict=True))
        return arguments | ({"conv_state": torch.zeros(2, 12, 3, device=device)} if "update" in function else {})
    if function == "mamba_split_conv1d_scan_combined":
        own = {"zxbcdt": torch.zeros(2, 7, 132, device=device), "conv1d_weight": torch.zeros(96, 4, device=device)}
        scan = {name: scan[name] for name in ("A", "D", "dt_bias")} | own
        return {**scan, "conv1d_bias": None, "chunk_size": 16, "headdim": 8, "ngroups": 2}
    if function in DELTA_RULES:
        return delta_rule_arguments(function, device)
    if function == "selective_scan_fn":
        ones = torch.ones(2, 6, 9, device=device)
        return {"u": ones, "delta": ones, "A": -ones[0, :, :4], "B": ones[:, :4], "C": ones[:, :4]}
    if function == "selective_state_update":
        step = {name: scan[name][:, 0] for name in ("x", "dt", "B", "C")}
        step["dt"], A = step["dt"][..., None].expand(2, 4, 8), scan["A"][:, None, None].expand(4, 8, 16)
        return {**step, "A": A, "state": torch.zeros(2, 4, 8, 16, device=device)}
    return {**scan, "chunk_size": 16}
