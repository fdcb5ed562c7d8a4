"""The caches of a model's layers, with a slot for each request that an engine runs at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_ops.serving.plan import NOBODY

_ALIGNMENT = 128  # bytes; vendors' kernels load 16 at a time, devices fetch whole lines


class NoFreeSlot(RuntimeError):
    """All slots of a pool are taken."""


class StatePool:
    """Caches, and which of their slots are taken.

    A layer's caches lie in pages, one a slot: the states of a slot follow each other, each aligned, and then comes
    padding up to the page's size. So a cache's slots are further apart than they are long. Their addresses never
    change, and torch.compile is told so.

    What a request leaves in its slot stays there when the slot is given back. The next request reads none of it,
    because its first tokens have no initial state in their `Plan`.

    Attributes:
        caches: by layer, what its call takes: `layer(hidden, *pool.caches["layers.0"], plan=plan)`.
        slots: how many there are.
        null_slot: the slot that means nobody, never taken; negative if none is set aside.
    """

    caches: dict[str, tuple[Tensor, ...]]

    def __init__(
        self,
        templates: Mapping[str, Sequence[Tensor]],
        slots: int,
        *,
        page_bytes: int = 0,
        null_slot: int = NOBODY,
    ) -> None:
        """Allocate pages of zeros.

        Args:
            templates: by layer, its caches with any number of slots, such as `layer.empty_caches(0)`: shapes, dtypes,
                devices and the order of axes in memory are theirs.
            slots: how many requests may run at a time, with the null slot if one is set aside.
            page_bytes: size of a page at least, for engines whose layers share pages of one size.
            null_slot: a slot to set aside, as engines do that reserve block 0.
        """
        if slots < 1 or null_slot >= slots:
            raise ValueError(f"StatePool: slots: got {slots} with null_slot {null_slot}, expected more than that")
        self.slots, self.null_slot = slots, null_slot
        self.caches = {name: _pages(tuple(states), slots, page_bytes) for name, states in templates.items()}
        self._free = [slot for slot in reversed(range(slots)) if slot != null_slot]
        self._taken: set[int] = set()

    @classmethod
    def of(
        cls,
        layers: Mapping[str, Any],
        slots: int,
        *,
        page_bytes: int = 0,
        null_slot: int = NOBODY,
        **dtypes: torch.dtype,
    ) -> "StatePool":
        """Make the pool of some layers.

        Args:
            layers: by name, whatever has `empty_caches(slots)`, as the layers in `mamba_ops.layers` do.
            slots, page_bytes, null_slot: as above.
            dtypes: `dtype` and `state_dtype`, for `empty_caches`.
        """
        templates = {name: layer.empty_caches(0, **dtypes) for name, layer in layers.items()}
        return cls(templates, slots, page_bytes=page_bytes, null_slot=null_slot)

    @property
    def num_free(self) -> int:
        """How many slots are to be had."""
        return len(self._free)

    @property
    def allocated(self) -> frozenset[int]:
        """The slots that somebody has."""
        return frozenset(self._taken)

    def allocate(self) -> int:
        """Return a slot for a new request.

        Raises:
            NoFreeSlot: there is none; the request has to wait.
        """
        if not self._free:
            raise NoFreeSlot(f"StatePool: all {len(self._taken)} slots are taken; give one back, or let requests wait")
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Let others have a slot; nothing is cleared.

        Raises:
            ValueError: nobody has it.
        """
        if slot not in self._taken:
            taken = ", ".join(map(str, sorted(self._taken))) or "none"
            raise ValueError(
                f"StatePool: slot: got {slot}, expected one that is taken ({taken}); was it given back twice?"
            )
        self._taken.remove(slot)
        self._free.append(slot)


def _pages(states: tuple[Tensor, ...], slots: int, page_bytes: int) -> tuple[Tensor, ...]:
    """Return one layer's caches, as views of its pages."""
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
        typed = pages.view(state.dtype)
        strides = (page // size, *_dense_strides(state))
        cache = typed.as_strided((slots, *state.shape[1:]), strides, start // size)
        torch._dynamo.mark_static_address(cache, guard=False)
        caches.append(cache)
    return tuple(caches)


def _dense_strides(state: Tensor) -> list[int]:
    """Return the strides of a slot without gaps whose axes lie in memory in the order in which the template's do."""
    axes = sorted(range(1, state.dim()), key=lambda axis: (state.stride(axis), -axis))
    strides, step = [0] * state.dim(), 1
    for axis in axes:
        strides[axis] = step
        step *= state.shape[axis]
    return strides[1:]
