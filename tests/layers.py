"""Every kind of layer, small, for the tests that hold for all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.layers import GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, Mamba3, ShortConv
from tests.ops.common.layers import (
    GatedDeltaNetOracle,
    KimiDeltaAttentionOracle,
    LayerOracle,
    Mamba2Oracle,
    Mamba3Oracle,
    MambaOracle,
    ShortConvOracle,
)

HIDDEN = 24


class Kind(NamedTuple):
    layer: Any
    sizes: dict[str, Any]
    variants: Sequence[dict[str, Any]]  # what may be otherwise
    oracle: type[LayerOracle]
    prefill: Sequence[str]  # the ops that it is made of
    decode: Sequence[str]
    stages: int  # at which a result is rounded


KINDS = {
    "mamba": Kind(
        Mamba,
        {"d_inner": 32, "dstate": 8, "dt_rank": 5},
        [
            {},
            {"norms": "weightless", "d_conv": 2},
            {"norms": "weighted", "eps": 1e-2, "bias": True, "conv_bias": False},
            {"d_inner": None, "dt_rank": None},
        ],
        MambaOracle,
        ["causal_conv1d", "selective_scan"],
        ["causal_conv1d_update", "selective_state_update"],
        stages=6,
    ),
    "mamba2": Kind(
        Mamba2,
        {"heads": 4, "head_dim": 8, "dstate": 16, "groups": 2, "chunk_size": 16},
        [
            {},
            {"groups": 1, "d_conv": 2},
            {"bias": True, "conv_bias": False},
            {"dt_min": 0.02, "dt_max": 0.05},
            {"dt_min": 0.02},
            {"chunk_size": 256},
        ],
        Mamba2Oracle,
        ["causal_conv1d", "mamba_chunk_scan"],
        ["causal_conv1d_update", "selective_state_update"],
        stages=6,
    ),
    "gdn": Kind(
        GatedDeltaNet,
        # with a small eps the norm makes the rounding of an output near zero as large as the output
        {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 12, "eps": 1e-2},
        [{}, {"interleaved": False}, {"num_k_heads": 4, "d_conv": 2, "eps": 1e-1}],
        GatedDeltaNetOracle,
        ["causal_conv1d", "chunk_gated_delta_rule"],
        ["causal_conv1d_update", "gated_delta_rule_update"],
        stages=8,
    ),
    "mamba3": Kind(
        Mamba3,
        {"heads": 4, "head_dim": 8, "dstate": 12, "groups": 2, "chunk_size": 16},
        [
            {},
            {"groups": 4, "rope_fraction": 1},
            {"groups": 1, "out_norm": True},
            {"chunk_size": 64},
            {"is_mimo": True, "mimo_rank": 3},
            {"is_mimo": True, "mimo_rank": 2, "out_norm": True, "rope_fraction": 1},
        ],
        Mamba3Oracle,
        ["mamba3_chunk_scan"],
        ["mamba3_state_update"],
        stages=8,
    ),
    "short_conv": Kind(
        ShortConv,
        {},
        [{}, {"d_conv": 4, "bias": True}],
        ShortConvOracle,
        ["causal_conv1d"],
        ["causal_conv1d_update"],
        stages=5,
    ),
    "kda": Kind(
        KimiDeltaAttention,
        {"num_heads": 2, "head_dim": 8, "eps": 1e-2},
        [
            {},
            {"lower_bound": -5.0, "flat_rates": True},
            {"low_rank": False, "num_heads": 3, "d_conv": 2, "eps": 1e-1},
        ],
        KimiDeltaAttentionOracle,
        ["causal_conv1d", "chunk_kda"],
        ["causal_conv1d_update", "kda_update"],
        stages=8,
    ),
}


def new_layer(name: str, device: torch.device | str, **changes: Any) -> Any:
    kind = KINDS[name]
    layer = kind.layer(HIDDEN, **{**kind.sizes, **changes}, device=device)
    set_weights(layer, name)
    return layer


@torch.no_grad()
def set_weights(module: torch.nn.Module, name: str) -> None:
    """Let every weight of a layer of that kind matter, where it would begin with ones or forget all."""
    for parameter_name, parameter in module.named_parameters():
        if parameter_name == "D" or parameter_name.startswith("mimo_"):
            parameter.normal_()
        elif parameter_name.endswith("A_log") and name in ("gdn", "kda"):
            # As initialised, most heads forget all in one token: their memory would not be tested, and sums of such
            # decays over a chunk have no digits left for the difference between two tokens.
            parameter.uniform_(-3, 0)
        elif parameter_name.endswith("dt_bias") and name == "kda":  # Transformers' own modules leave it as it was
            parameter.normal_()
        elif "norm" in parameter_name:
            parameter.uniform_(0.5, 1.5)


def oracles(oracle: type[LayerOracle], layer: Any, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For a batch: truth and float32 result of the output, and of each cache by its name."""
    by_dtype = []
    for dtype in (torch.float64, torch.float32):
        rows = [oracle(layer, dtype) for _ in hidden]
        output = torch.stack([row.read(h) for row, h in zip(rows, hidden, strict=True)])
        kept = [row.caches() for row in rows]
        by_dtype.append({"output": output, **{name: torch.stack([k[name] for k in kept]) for name in kept[0]}})
    truth, low = by_dtype
    return {name: (truth[name], low[name]) for name in truth}
