"""Exported programs: what stands for the ops where they are not there."""

from collections.abc import Callable
from typing import Any

import torch

from mamba_ops import registry


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the table that turns an exported program into ops of ATen alone.

    It is `torch.export.default_decompositions()` with every op of this package, each decomposed through its reference,
    its plain torch kernel. The program then needs no Python and not this package, has the lengths that it was exported
    for, and takes the reference's time; backends cannot be swapped under it.

        program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("length", max=4096)},))
        plain = program.run_decompositions(mamba_ops.export.decompositions())

    Raises (from `run_decompositions`):
        ValueError: an op is called in a way that its reference reads lengths for: `causal_conv1d_update`,
            `selective_state_update`, `gated_delta_rule_update` and `kda_update` with `cu_seqlens`, mixing ops with
            `num_accepted_tokens`, the backward of `chunk_gated_delta_rule` and `chunk_kda` with lengths that vary.
    """
    return {**torch.export.default_decompositions(), **registry.decompositions()}
