"""The caches of a layer: what they are, and the checks that it makes of them before the first of them is written to."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mamba_ops.ops._common.narrow import MOST
from mamba_ops.registry import check_written, is_plain
from mamba_ops.registry.errors import in_call_of


class Cache(NamedTuple):
    """What a cache holds of one sequence.

    Attributes:
        sizes: of a slot; of the last inputs of a convolution, `(channels, width - 1)`.
        is_window: whether it is the last inputs of a convolution.
        of_inputs: whether it is of other inputs. Else it is a state, which sums over a sequence.
        dtypes: that it may have.
    """

    sizes: tuple[int, ...]
    is_window: bool = False
    of_inputs: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Caches(Protocol):
    """The caches of a layer: a NamedTuple of tensors, each with slots as its first axis."""

    def _asdict(self) -> dict[str, Any]:
        """Return the caches by name."""


class ConvAndState(NamedTuple):
    """The caches of a layer with one convolution and one recurrence.

    Attributes:
        conv_state: `(slots, channels, width - 1)`, the last inputs of the convolution.
        ssm_state: `(slots, ...)`, the state of the recurrence.
    """

    conv_state: Tensor
    ssm_state: Tensor

    @property
    def state_scale(self) -> Tensor | None:
        """There are no scales."""
        return None


class ConvAndNarrowState(NamedTuple):
    """The caches of such a layer whose states are in few bits.

    Attributes:
        conv_state: `(slots, channels, width - 1)`, the last inputs of the convolution.
        ssm_state: `(slots, ...)`, the state of the recurrence, int16 or float8_e4m3fn.
        state_scale: float32, what the numbers of each row of the state, its last axis, are multiplied by.
    """

    conv_state: Tensor
    ssm_state: Tensor
    state_scale: Tensor


def scale_of(caches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the third of a layer's caches, where there is one, as the argument of `mix`."""
    return {"state_scale": caches[2]} if len(caches) == 3 else {}


def narrow_kinds(kinds: Sequence[Cache]) -> tuple[Cache, ...]:
    """Return what the caches of a layer are if its state, the last of them, is in few bits."""
    *others, state = kinds
    scale = Cache(state.sizes[:-1], dtypes=(torch.float32,))
    return (*others, state._replace(dtypes=tuple(MOST)), scale)


def require_caches(layer: str, mixed: Tensor, caches: Caches, kinds: Sequence[Cache]) -> None:
    """Raise ValueError unless a layer's caches fit the first of them, so that ops after the first one accept them too.

    The first op looks at its own cache. While Dynamo traces, what is known then alone is read: nothing of inference
    tensors, of views that negate their memory, and of overlaps but those of an expanded cache. So nothing of it is in
    the graph of a call with right caches. In the graph of a call with wrong ones the op `refuse_caches` stands before
    the first op: its ValueError reaches the user as it is, and nothing has been written yet.

    Args:
        layer: its name, for messages of eager calls.
        mixed: the input of the first op.
        caches: all of them, or Nones.
        kinds: what each of them is.
    """
    named = caches._asdict()
    if "state_scale" in named:
        kinds = narrow_kinds(kinds)
    if torch.compiler.is_dynamo_compiling():
        if not _fit_together(list(named.values()), kinds):
            torch.ops.mamba_ops.refuse_caches(mixed, list(named.values()), ",".join(named), *_flat(kinds))
        return
    given = {name: cache for name, cache in named.items() if cache is not None}
    try:
        if not (_are_tensors(given.values()) and _fit_together(list(named.values()), kinds)):
            _refuse(mixed, list(named.values()), ",".join(named), *_flat(kinds))
        if given and not torch.compiler.is_compiling():
            check_written(given)
    except ValueError as error:
        raise in_call_of(layer, error) from None


def _are_tensors(caches: Any) -> bool:
    """Whether all are tensors, of one kind: plain ones, or all fake or distributed."""
    return all(isinstance(cache, Tensor) for cache in caches) and len({is_plain(cache) for cache in caches}) <= 1


def _fit_together(caches: Sequence[Tensor | None], kinds: Sequence[Cache]) -> bool:
    first, *others = caches
    if first is None or any(other is None for other in others):
        return all(cache is None for cache in caches)
    return all(_fits(other, first, kind) for other, kind in zip(others, kinds[1:], strict=True))


def _fits(cache: Any, first: Tensor, kind: Cache) -> bool:
    sizes = kind.sizes
    if kind.is_window and cache.dim() == 3 and cache.shape[2] >= sizes[1]:  # a longer one is for speculation
        sizes = (sizes[0], cache.shape[2])
    return (
        cache.shape == (*first.shape[:1], *sizes)
        and cache.dtype in kind.dtypes
        and cache.device == first.device
        and not (cache.requires_grad and torch.is_grad_enabled())
        and not any(step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape, strict=True))
    )


def _flat(kinds: Sequence[Cache]) -> tuple[list[int], list[int], list[bool]]:
    """Return what the caches are, as lists of numbers: an op takes no others."""
    sizes = [size for kind in kinds for size in kind.sizes]
    return sizes, [len(kind.sizes) for kind in kinds], [kind.is_window for kind in kinds]


def _refuse(
    mixed: Tensor,
    caches: Sequence[Any],
    names: str,
    sizes: Sequence[int],
    ranks: Sequence[int],
    are_windows: Sequence[bool],
) -> None:
    """Raise. `mixed` is declared as mutated, so that the first op, which reads it, is not moved before this."""

    def shown(cache: Any) -> str:
        if not isinstance(cache, Tensor):
            return "None" if cache is None else f"a {type(cache).__name__}"
        return f"{tuple(cache.shape)} of {cache.dtype} on {cache.device}"

    def expected(name: str, end: int, rank: int, is_window: bool) -> str:
        *shape, last = map(str, sizes[end - rank : end])
        return f"{name} (slots, {', '.join([*shape, f'at least {last}' if is_window else last])})"

    kinds = zip(names.split(","), accumulate(ranks), ranks, are_windows, strict=True)
    others = [expected(*kind) for kind in kinds][1:]
    got, pair = [shown(cache) for cache in caches], len(caches) == 2
    dtype = "int16 or float8_e4m3fn, with scales of float32" if "state_scale" in names else "a float dtype"
    raise ValueError(
        f"{names.replace(',', ', ')}: got {', '.join(got[:-1])} and {got[-1]}, expected "
        f"{'neither or a pair' if pair else 'none or all of them'}: on one device, as many slots, {', '.join(others)} "
        f"of {dtype} and, in grad mode, {'one that requires' if pair else 'ones that require'} no grad; not "
        "expanded; see empty_caches()"
    )


_library = torch.library.Library("mamba_ops", "FRAGMENT")
_library.define(
    "refuse_caches(Tensor(a!) mixed, Tensor?[] caches, str names, SymInt[] sizes, int[] ranks, bool[] are_windows) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("refuse_caches", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("mamba_ops::refuse_caches", lambda *args: None, lib=_library)
