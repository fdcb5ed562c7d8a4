"""Arguments of the imitated functions that have no effect here, or that the ops take in another form."""

import torch
from torch import Tensor

from mamba_ops.registry import check_written
from mamba_ops.registry.errors import in_call_of

States = tuple[Tensor, Tensor]
"""An output and the last states."""

# Keyword arguments of a model that reach these functions too, and do not concern them: they ask for more outputs, are
# for the loss, or choose among torch fallbacks.
_OF_THE_MODEL = (
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "use_associative_scan",
    "use_cache",
    "use_mambapy",
)


def refuse(function: str, **arguments: object) -> None:
    """Raise if one of the arguments is set."""
    for name, got in arguments.items():
        if got is not None and got is not False and name not in _OF_THE_MODEL:
            packed = name in ("cu_seqlens", "seq_idx")
            hint = "; the layers in mamba_ops.layers keep packed sequences apart, with cu_seqlens" if packed else ""
            raise ValueError(
                f"{function}: {name}: got a {type(got).__name__}, expected none: it has no effect here{hint}"
            )


def written(function: str, **tensors: Tensor | None) -> None:
    """Raise about a tensor that the function writes after the op has run, if it is none that could be written."""
    try:
        check_written({name: tensor for name, tensor in tensors.items() if tensor is not None})
    except ValueError as error:
        raise in_call_of(function, error) from None


def is_silu(function: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{function}: activation: got {activation!r}, expected None, 'silu' or 'swish'")
    return activation is not None


def all_have(initial_states: Tensor | None) -> Tensor | None:
    """Return an op's `has_initial_state`: true for every sequence, or None without initial states."""
    return None if initial_states is None else initial_states.new_ones(initial_states.shape[0], dtype=torch.bool)


def per_head(tensor: Tensor, axes: int) -> Tensor:
    """Return a tensor without its last axes if they are expanded (stride 0): a kernel then reads one number a head."""
    if any(tensor.stride(-1 - axis) for axis in range(axes)):
        return tensor
    return tensor.flatten(-axes)[..., 0]
