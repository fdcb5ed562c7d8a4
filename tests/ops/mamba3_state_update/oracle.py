"""A decode step of Mamba-3: the oracle of its scan, of rows of one token that all go on."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.mamba3_chunk_scan.oracle import mamba3_chunk_scan


def mamba3_state_update(
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    *tokens: Tensor,
    z: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return (output, angle_state, ssm_state, k_state, v_state), all new; nothing is rounded on the way."""
    caches = {"angle_state": angle_state, "ssm_state": ssm_state, "k_state": k_state, "v_state": v_state}
    output, *states = mamba3_chunk_scan(
        *(tensor.unsqueeze(1) for tensor in tokens),
        1,
        **caches,
        **options,
        z=None if z is None else z.unsqueeze(1),
        out=None if out is None else out.unsqueeze(1),
        has_initial_state=torch.ones(tokens[0].shape[0], dtype=torch.bool),
        dtype=dtype,
    )
    return (output.squeeze(1), *states)
