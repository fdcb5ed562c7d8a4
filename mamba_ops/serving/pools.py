"""The caches of a model's layers, with a slot for each request that an engine runs at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

from mamba_ops.ops._common.sequences import NULL_SLOT
from mamba_ops.registry import is_plain
from mamba_ops.serving.pieces import is_number

_ALIGNMENT = 128  # bytes: kernels load 16 at a time, devices fetch whole cache lines


class NoFreeSlot(RuntimeError):
    """All slots of a pool are allocated."""


class StatePool:
    """Caches, and which of their slots are allocated.

    A layer's caches are views of pages, one page a slot: the states of a slot follow each other, each aligned, then
    padding up to the page's size. So the stride between a cache's slots is more than the size of one. Addresses never
    change, and the caches are marked so for torch.compile.

    A slot keeps its contents when it is freed. The next request does not read them, because its first tokens have no
    initial state in their `Plan`.

    Attributes:
        caches: by layer, its caches: `layer(hidden, *pool.caches["layers.0"], plan=plan)`. A layer's NamedTuple of
            caches is one here, too.
        slots: how many there are.
        null_slot: the slot of padding rows, never allocated; negative if none is reserved.
    """

    caches: dict[str, tuple[Any, ...]]

    def __init__(
        self,
        templates: Mapping[str, Sequence[Tensor]],
        slots: int,
        *,
        page_bytes: int = 0,
        null_slot: int = NULL_SLOT,
    ) -> None:
        """Allocate pages of zeros.

        Args:
            templates: by layer, its caches with any number of slots, such as `layer.empty_caches(0)`. The pool's caches
                have the same shapes, dtypes, devices and order of axes in memory.
            slots: how many requests may run at a time, and one more if `null_slot` is reserved.
            page_bytes: the least size of a page, for engines that use one page size for all layers.
            null_slot: a slot to reserve, such as block 0.
        """
        for name, number in (("slots", slots), ("page_bytes", page_bytes), ("null_slot", null_slot)):
            if not isinstance(number, int) or isinstance(number, bool) or (name == "page_bytes" and number < 0):
                raise ValueError(f"StatePool: {name}: got {number!r}, expected a whole number")
        if slots < 1 or null_slot >= slots:
            raise ValueError(f"StatePool: slots: got {slots} with null_slot {null_slot}, expected more than that")
        _check_mapping("templates", templates, "its caches, as layer.empty_caches(0)", _is_template)
        self.slots, self.null_slot = slots, null_slot
        self._columns = slots  # as many as any request can have, where layers do not say
        self.caches = {name: _pages(states, slots, page_bytes) for name, states in templates.items()}
        self._free = [slot for slot in reversed(range(slots)) if slot != null_slot]
        self._allocated: set[int] = set()

    @classmethod
    def of(
        cls,
        layers: Mapping[str, Any],
        slots: int,
        *,
        page_bytes: int = 0,
        null_slot: int = NULL_SLOT,
        **options: Any,
    ) -> "StatePool":
        """Return a pool for some layers.

        Args:
            layers: by name, modules with a method `empty_caches(slots)`, as the layers in `mamba_ops.layers` have it.
            slots, page_bytes, null_slot: as above.
            options: `dtype`, `state_dtype` and `columns`, for `empty_caches`.
        """
        _check_mapping("layers", layers, "a layer with empty_caches()", lambda layer: hasattr(layer, "empty_caches"))
        templates = {name: layer.empty_caches(0, **options) for name, layer in layers.items()}
        pool = cls(templates, slots, page_bytes=page_bytes, null_slot=null_slot)
        pool._columns = options.get("columns", 1)
        return pool

    @property
    def num_free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    @property
    def allocated(self) -> frozenset[int]:
        """The slots that are in use."""
        return frozenset(self._allocated)

    def allocate(self) -> int:
        """Return a slot for a new request.

        Raises:
            NoFreeSlot: there is none; the request has to wait.
        """
        if not self._free:
            raise NoFreeSlot(f"StatePool: all {len(self._allocated)} slots are in use; free one, or let requests wait")
        slot = self._free.pop()
        self._allocated.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Make a slot available again; nothing is cleared.

        Raises:
            ValueError: it is not allocated.
        """
        try:
            number = index(slot)
        except TypeError:
            number = -1
        if number not in self._allocated:
            allocated = ", ".join(map(str, sorted(self._allocated))) or "none"
            raise ValueError(
                f"StatePool: slot: got {slot}, expected one that is allocated ({allocated}); was it freed twice?"
            )
        self._allocated.remove(number)
        self._free.append(number)

    def copy(self, source: int | Sequence[int], target: int, *, accepted: int = 1) -> None:
        """Copy a request's states to another slot, for a request that goes on as this one, or to keep them.

        Args:
            source: the request's slot; where it speculates, all its slots, as for plans.
            target: the slot to copy to. The request there goes on with `accepted` 1.
            accepted: how many tokens of the request's latest decode were kept: after the last of these the states are.

        Raises:
            ValueError: before anything is written: a slot that the pool does not have or that is the null slot, one
                slot twice, a number that `source` has no slot for, windows that cannot be told from states, or that are
                too short for so many tokens.
        """
        slots = [self._slot("source", slot) for slot in ([source] if is_number(source) else _listed(source))]
        to = self._slot("target", target)
        if len({*slots, to}) <= len(slots):
            raise _wrong_copy("target", f"{slots} to {to}", "slots that differ")
        if not is_number(accepted) or not 1 <= index(accepted) <= len(slots):
            raise _wrong_copy("accepted", repr(accepted), f"1 to the {len(slots)} slots of source")
        back = index(accepted) - 1
        for name, caches in self.caches.items():
            if back and not hasattr(caches, "_fields"):
                expected = "a NamedTuple of caches, where windows are called conv_state"
                raise _wrong_copy("accepted", f"{accepted} with a tuple for {name!r}", expected)
            windows = [cache.shape[-1] for field, cache in _named(caches) if field.endswith("conv_state")]
            most = min([*windows, self._columns])
            if windows and back >= most:
                expected = f"at most {most}; make the pool with as many columns as a decode has tokens"
                raise _wrong_copy("accepted", f"{accepted} for the windows of {name!r}", expected)
        for caches in self.caches.values():
            for name, cache in _named(caches):
                if name.endswith("conv_state"):  # one window for all tokens, in the first slot
                    cache[to, :, : cache.shape[-1] - back] = cache[slots[0], :, back:]
                else:
                    cache[to] = cache[slots[back]]

    def _slot(self, name: str, slot: Any) -> int:
        """Return a slot of the pool that a state can be in; raise the ValueError of `copy` about another one."""
        if not is_number(slot) or not 0 <= index(slot) < self.slots or index(slot) == self.null_slot:
            raise _wrong_copy(name, repr(slot), f"a slot of the pool, 0 to {self.slots - 1}, and not the null slot")
        return index(slot)


def _named(caches: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's caches with their names, which are empty in a plain tuple."""
    return zip(getattr(caches, "_fields", [""] * len(caches)), caches, strict=True)


def _listed(source: Any) -> list[Any]:
    try:
        return list(source)
    except TypeError:
        raise _wrong_copy("source", repr(source), "a slot, or all slots of a request") from None


def _wrong_copy(name: str, got: str, expected: str) -> ValueError:
    return ValueError(f"StatePool.copy: {name}: got {got}, expected {expected}")


def _check_mapping(name: str, given: Any, expected: str, is_right: Callable[[Any], bool]) -> None:
    """Raise the ValueError about what is no mapping, or the first of its values that is not what is expected."""
    if not isinstance(given, Mapping):
        raise ValueError(f"StatePool: {name}: got a {type(given).__name__}, expected a mapping of names to {expected}")
    for layer, value in given.items():
        if not is_right(value):
            raise ValueError(f"StatePool: {name}: got a {type(value).__name__} for {layer!r}, expected {expected}")


def _is_template(states: Any) -> bool:
    """Whether these are caches: tensors with slots as their first axis."""
    return isinstance(states, Sequence) and all(isinstance(t, Tensor) and t.dim() for t in states)


def _pages(states: Sequence[Tensor], slots: int, page_bytes: int) -> tuple[Any, ...]:
    """Return one layer's caches, as views of its pages; a NamedTuple for one."""
    starts, end = [], 0
    for state in states:
        starts.append(end)
        end += -(-state[:1].new_empty(1, *state.shape[1:]).nbytes // _ALIGNMENT) * _ALIGNMENT
    page = -(-max(end, page_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
    caches = []
    if states:
        pages = torch.zeros(slots, page, dtype=torch.uint8, device=states[0].device)
    for state, start in zip(states, starts, strict=True):
        size = state.element_size()
        typed = _same_memory(pages).view(state.dtype)
        strides = (page // size, *_dense_strides(state))
        cache = typed.as_strided((slots, *state.shape[1:]), strides, start // size)
        torch._dynamo.mark_static_address(cache, guard=False)
        caches.append(cache)
    named: Callable[[list[Tensor]], tuple[Tensor, ...]] = getattr(type(states), "_make", tuple)
    return named(caches)


def _same_memory(pages: Tensor) -> Tensor:
    """Return pages as a tensor with a storage of its own, at the same address.

    torch.compile takes inputs that share a storage for aliases of each other, and refuses a graph that writes to them
    if their dtypes were given by views. Caches of one page have no element in common.
    """
    if not is_plain(pages) or pages.device.type == "meta":
        return pages  # there is no memory
    try:
        return dlpack.from_dlpack(pages)
    except (RuntimeError, BufferError, ValueError):  # a device that DLPack does not know
        return pages


def _dense_strides(state: Tensor) -> list[int]:
    """Return the strides of a slot without gaps; its axes have the template's order in memory."""
    axes = sorted(range(1, state.dim()), key=lambda axis: (state.stride(axis), -axis))
    strides, step = [0] * state.dim(), 1
    for axis in axes:
        strides[axis] = step
        step *= state.shape[axis]
    return strides[1:]
