"""The decode step of Kimi Delta Attention in Triton: how the kernel of both delta rules is launched."""

from typing import TYPE_CHECKING

from mamba_ops.ops._triton.delta_rule_update import advance, one_warp
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch

if TYPE_CHECKING:
    from mamba_ops.ops.kda_update.op import Arguments


def kda_update(call: "Arguments") -> None:
    """Advance `ssm_state` in place and write `output`; see `advance`."""
    advance(call, _launches, by_channel=True, lower_bound=call.lower_bound)


@tunable_launch(_kernel="BLOCK num_warps")
def _launches(v_dim: int, k_dim: int, itemsize: int) -> Launches:
    return one_warp(v_dim, k_dim, itemsize)
