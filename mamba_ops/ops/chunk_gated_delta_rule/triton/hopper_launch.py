"""How the kernel that finds systems on Hopper is launched, and which calls it takes."""

from typing import Any

from torch import Tensor

from mamba_ops.ops._triton.gluon import is_wide, runs_on_hopper

MODULE = "mamba_ops.ops.chunk_gated_delta_rule.triton.hopper_systems"


def is_hopper_solve(*tensors: Tensor, aligned: bool) -> bool:
    """Return whether `_invert` takes q, k, v and the output."""
    return is_wide(*tensors, aligned=aligned) and runs_on_hopper(tensors[0].get_device(), MODULE)


def launch_invert(
    systems: int, tensors: tuple[Any, ...], numbers: tuple[Any, ...], k_heads: int, v_heads: int, l2norm: bool
) -> None:
    """Launch `_invert` with as many registers as let four programs run side by side."""
    from mamba_ops.ops.chunk_gated_delta_rule.triton.hopper_systems import _invert

    sizes = {"K_HEADS": k_heads, "V_HEADS": v_heads, "L2NORM": l2norm}
    _invert[(systems,)](*tensors, *numbers, **sizes, num_warps=4, maxnreg=128)
