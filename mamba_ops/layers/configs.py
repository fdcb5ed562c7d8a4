"""What the configs of Transformers say of layers: what is missing there, and Mamba-2's sizes, by family."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIZES: dict[str, dict[str, str]] = {  # by the attribute that names the heads: our names, and the config's
    "mamba_num_heads": {  # Nemotron-H
        "head_dim": "mamba_head_dim",
        "dstate": "ssm_state_size",
        "groups": "n_groups",
        "d_conv": "conv_kernel",
        "eps": "layer_norm_epsilon",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "chunk_size": "chunk_size",
        "activation": "mamba_hidden_act",
        "dt_min": "time_step_min",
    },
    "mamba_n_heads": {  # Bamba, GraniteMoeHybrid
        "head_dim": "mamba_d_head",
        "dstate": "mamba_d_state",
        "groups": "mamba_n_groups",
        "d_conv": "mamba_d_conv",
        "eps": "rms_norm_eps",
        "bias": "mamba_proj_bias",
        "conv_bias": "mamba_conv_bias",
        "chunk_size": "mamba_chunk_size",
        "activation": "hidden_act",
        "limits": "time_step_limit",
    },
    "n_mamba_heads": {  # Zamba2, whose activation, bias of the convolution and eps are no choice
        "head_dim": "mamba_headdim",
        "dstate": "mamba_d_state",
        "groups": "mamba_ngroups",
        "d_conv": "mamba_d_conv",
        "bias": "add_bias_linear",
        "chunk_size": "chunk_size",
        "dt_min": "time_step_min",
    },
    "num_heads": {  # Mamba-2
        "head_dim": "head_dim",
        "dstate": "state_size",
        "groups": "n_groups",
        "d_conv": "conv_kernel",
        "eps": "layer_norm_epsilon",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "activation": "hidden_act",
        "limits": "time_step_limit",
    },
}
_WITH_MULTIPLIERS = "ssm_in_multiplier"  # Falcon-H1's


@contextmanager
def reading_config(layer: str, expected: str) -> Iterator[None]:
    """Within the block, an attribute that a config lacks is a ValueError which says what configs a layer takes."""
    try:
        yield
    except AttributeError as error:
        raise ValueError(f"{layer}.from_config: config: {error}; expected {expected}") from None


def mamba2_sizes(config: Any, *, with_multipliers: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the activation of a config's Mamba-2 layers, and the arguments of the layer.

    Args:
        config: of a family below.
        with_multipliers: whether the layer may have multipliers, which are none of these arguments.

    Raises:
        ValueError: the config is of no family that is known, or lacks an attribute of it.
    """
    expected = "a config of Mamba-2, Bamba, GraniteMoeHybrid, Nemotron-H or Zamba2 in Transformers"
    if hasattr(config, _WITH_MULTIPLIERS) and not with_multipliers:
        name = type(config).__name__
        raise ValueError(
            f"Mamba2.from_config: config: got a {name}, whose layers have multipliers; expected {expected}"
        )
    heads = next((heads for heads in _SIZES if hasattr(config, heads)), "num_heads")
    with reading_config("Mamba2", expected):
        found = {ours: getattr(config, theirs) for ours, theirs in _SIZES[heads].items()}
        found |= {"hidden_size": config.hidden_size, "heads": getattr(config, heads)}
    if (limits := found.pop("limits", None)) is not None:
        found["dt_min"], found["dt_max"] = limits
    found |= {"dt_min": float(found["dt_min"]), "dt_max": float(found.get("dt_max", math.inf))}
    for name in ("chunk_size", "mamba_chunk_size"):
        if (chunk_size := getattr(config, name, None)) is not None:
            found["chunk_size"] = int(chunk_size)
    return found.pop("activation", "silu"), found
