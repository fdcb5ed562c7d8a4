"""The checks that layers make of their two caches, before the convolution writes to one of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mamba_ops.registry import check_written, is_plain
from mamba_ops.registry.errors import in_call_of


def require_a_pair(
    layer: str, mixed: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, sizes: Sequence[int]
) -> None:
    """Raise ValueError unless the caches fit together, so that the op after the convolution accepts them too.

    While Dynamo traces it reads only what is known then: nothing of inference tensors, of views that negate their
    memory, and of overlaps but those of an expanded cache. So nothing of it is in the graph of a call with right
    caches. In the graph of a call with wrong ones the op `refuse_caches` stands before the convolution: its ValueError
    reaches the user as it is, and nothing has been written yet.

    Args:
        layer: its name, for messages of eager calls.
        mixed: the input of the convolution.
        conv_state, ssm_state: both caches, or neither.
        sizes: of one slot of ssm_state.
    """
    if torch.compiler.is_dynamo_compiling():
        if not _are_a_pair(conv_state, ssm_state, sizes):
            torch.ops.mamba_ops.refuse_caches(mixed, conv_state, ssm_state, sizes)
        return
    try:
        if not (_are_tensors(conv_state, ssm_state) and _are_a_pair(conv_state, ssm_state, sizes)):
            _refuse(mixed, conv_state, ssm_state, sizes)
        if conv_state is not None and ssm_state is not None and not torch.compiler.is_compiling():
            check_written({"conv_state": conv_state, "ssm_state": ssm_state})
    except ValueError as error:
        raise in_call_of(layer, error) from None


def _are_tensors(conv_state: object, ssm_state: object) -> bool:
    """Whether both are tensors, of one kind: plain ones, or both fake or distributed; or None."""
    given = [cache for cache in (conv_state, ssm_state) if cache is not None]
    return all(isinstance(cache, Tensor) for cache in given) and len({is_plain(cache) for cache in given}) <= 1


def _are_a_pair(conv_state: Tensor | None, ssm_state: Tensor | None, sizes: Sequence[int]) -> bool:
    if conv_state is None or ssm_state is None:
        return conv_state is ssm_state
    return (
        ssm_state.shape == (conv_state.shape[0], *sizes)
        and ssm_state.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and ssm_state.device == conv_state.device
        and not (ssm_state.requires_grad and torch.is_grad_enabled())
        and not any(step == 0 and size > 1 for step, size in zip(ssm_state.stride(), ssm_state.shape, strict=True))
    )


def _refuse(mixed: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, sizes: Sequence[int]) -> None:
    """Raise. `mixed` is declared as mutated, so that the convolution, which reads it, is not moved before this."""

    def shown(cache: Tensor | None) -> str:
        if not isinstance(cache, Tensor):
            return "None" if cache is None else f"a {type(cache).__name__}"
        return f"{tuple(cache.shape)} of {cache.dtype} on {cache.device}"

    raise ValueError(
        f"conv_state, ssm_state: got {shown(conv_state)} and {shown(ssm_state)}, expected neither or a pair: on one "
        f"device, as many slots, ssm_state (slots, {', '.join(map(str, sizes))}) of a float dtype and, in grad mode, "
        "one that requires no grad; not expanded; see empty_caches()"
    )


_library = torch.library.Library("mamba_ops", "FRAGMENT")
_library.define(
    "refuse_caches(Tensor(a!) mixed, Tensor? conv_state, Tensor? ssm_state, SymInt[] sizes) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("refuse_caches", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("mamba_ops::refuse_caches", lambda *args: None, lib=_library)
