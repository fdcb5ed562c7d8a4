"""Where a call's tensors lie in memory: what an op writes overlaps neither itself nor another argument.

Two kernels read and write elements in different orders, so a call whose tensors overlap has no one result.
"""

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from mamba_ops.registry import _torch, kinds
from mamba_ops.registry.errors import bad_argument, shown


def check(tensors: Mapping[str, Tensor], mutated: Collection[str], out_may_be: str | None = None) -> None:
    """Raise the ValueError about a call's memory, if there is one.

    Args:
        tensors: the call's, by parameter name.
        mutated: names of those that the op writes.
        out_may_be: the input that `output` may be, in the very same place and layout.
    """
    for name in mutated:
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.is_neg():
            raise negated(shown(name))
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise bad_argument(
                shown(name),
                got="a tensor made in inference mode",
                expected="an ordinary one, as torch updates the former in inference mode alone",
                hint="make it outside torch.inference_mode(), or call the op inside",
            )
        if tensor.numel() and overlaps_itself(tensor):
            got = f"shape {tuple(tensor.shape)} with strides {tuple(tensor.stride())}"
            expected = "a tensor whose elements each have a place of their own"
            raise bad_argument(shown(name), got=got, expected=expected, hint="the op writes to it; clone it first")
    _check_pairs(tensors, mutated, out_may_be)


def check_written(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None) -> None:
    """Raise the ValueError about tensors that will be written later, if they are none that could be.

    Args:
        tensors: by parameter name.
        kept: tensors that must stay as they are until then and after, as a backward reads them.
    """
    kinds.check(tensors)
    for name, tensor in tensors.items():
        if _torch.is_wrapped(tensor):
            raise bad_argument(name, got=kinds.UNDER_A_TRANSFORM, expected="a plain one", hint="it is written to")
        if tensor.requires_grad and torch.is_grad_enabled():
            got, expected = "a tensor that requires grad while grad mode is on", "one that does not"
            raise bad_argument(name, got=got, expected=expected, hint="it is written to; detach it")
    check({**(kept or {}), **tensors}, tensors.keys())


def are_apart(tensors: Iterable[Tensor]) -> bool:
    """Whether each tensor has memory of its own, which is quicker to see than what else `check` looks at."""
    places = [_place(t) if t.layout is torch.strided else 0 for t in tensors]
    return 0 not in places and len(places) == len(set(places))


def negated(name: str) -> ValueError:
    """Refuse to write to a view that negates what is read from it."""
    return bad_argument(
        name,
        got="a view that negates its memory (is_neg())",
        expected="a plain tensor",
        hint="the op writes to it; pass tensor.resolve_neg()",
    )


def _check_pairs(tensors: Mapping[str, Tensor], mutated: Collection[str], out_may_be: str | None) -> None:
    storages: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and (place := _place(tensor)):
            storages.setdefault(place, []).append(name)
    if len(storages) == len(tensors):
        return
    for names in storages.values():
        for name in names:
            if name not in mutated:
                continue
            for other in names:
                one, two = tensors[name], tensors[other]
                if other == name or not may_overlap(one, two):
                    continue
                allowed = name == "output" and other == out_may_be
                if not (allowed and _are_the_same(one, two)):
                    same = f", or the very same tensor as {other}" if allowed else ""
                    raise bad_argument(
                        shown(name),
                        got=f"a tensor that shares memory with {shown(other)}",
                        expected=f"one in other memory{same}",
                        hint="clone one of them first",
                    )


def _place(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 for one that has none, such as a meta or a fake tensor."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


def _are_the_same(one: Tensor, two: Tensor) -> bool:
    return (one.data_ptr(), one.dtype, one.shape, one.stride()) == (two.data_ptr(), two.dtype, two.shape, two.stride())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may have one place.

    They have not where every stride steps over all that the smaller strides reach, as in all views of a dense tensor.
    """
    return _overlap(tuple(tensor.shape), tensor.stride())


@lru_cache(maxsize=4096)
def _overlap(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def may_overlap(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors may have an element in one place.

    They have not where their ranges of addresses are apart, be it modulo a stride that both step by: so the columns of
    one buffer are told apart, and the caches that lie in the same pages.
    """
    periods = {0} | {s * t.itemsize for t in (one, two) for s, n in _steps(t) if n > 1}
    return all(_meet(one, two, period) for period in periods)


def _meet(one: Tensor, two: Tensor, period: int) -> bool:
    """Whether two ranges of addresses meet, modulo `period` where that is not 0."""
    distance = two.data_ptr() - one.data_ptr()
    extents = [
        t.itemsize + sum(s * t.itemsize * (n - 1) for s, n in _steps(t) if not period or s * t.itemsize % period)
        for t in (one, two)
    ]
    if period:
        distance %= period
        return distance < extents[0] or period - distance < extents[1]
    return -extents[1] < distance < extents[0]


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """The stride and the size of each dimension."""
    return list(zip(tensor.stride(), tensor.shape, strict=True))
