"""How ops are told which tokens belong to which sequence, and where the sequences' states are.

Users pass these arguments to ops as flat keywords. Layers and mixing ops hand them on as one value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")

NULL_SLOT = -1
"""The default of `null_slot`: the slot of padding rows. Negative slots always are padding, so no slot is set aside."""


class SequenceArgs(NamedTuple):
    """The arguments of `causal_conv1d` and of the scans, which read whole sequences, about their batch rows."""

    slots: Tensor | None = None
    cu_seqlens: Tensor | None = None
    has_initial_state: Tensor | None = None
    null_slot: int = NULL_SLOT
    write_slots: Tensor | None = None

    def bind(self, op: Callable[..., T]) -> Callable[..., T]:
        """Return the op with these arguments."""
        return partial(op, **self._asdict())


class DecodeArgs(NamedTuple):
    """The arguments of `causal_conv1d_update` and of the ops that advance states, about their batch rows."""

    slots: Tensor | None = None
    cu_seqlens: Tensor | None = None
    num_accepted_tokens: Tensor | None = None
    null_slot: int = NULL_SLOT

    def bind(self, op: Callable[..., T]) -> Callable[..., T]:
        """Return the op with these arguments."""
        return partial(op, **self._asdict())


class PlanTensors(NamedTuple):
    """A batch of decodes and prefills, as the mixing ops take it. R is the most rows that a batch can have.

    Attributes:
        counts: int64 (2 + 2 * rounds,), on the host: decodes, their tokens, then of each round its prefills and their
            tokens. Rounds run one after the other, so a row may go on from what one of an earlier round has stored.
        cu_seqlens: int32 or int64 (R + 1,): the tokens of row i; rows beyond the last are empty.
        prefill_cu_seqlens: the same for the prefills alone, counted from the first prefill's first token.
        slots: int32 or int64 (R,) or (R, columns): where the rows' states are; columns from 1 on are those of the
            second and later tokens of speculative decodes.
        has_initial_state: bool (R,): whether a row continues from the state in its slot.
        num_computed_tokens: int32 or int64 (R,): how many tokens of a row came before these.
        num_accepted_tokens: int32 or int64 (R,): how many of a speculative decode's latest tokens were kept. None:
            every decode is one token.
        write_slots: int32 or int64 (R,) or (R, columns): where prefills leave their last states, in column 0; a null
            slot stores none, and of a row without tokens the initial state is copied there. Those of decodes are not
            read. None: where they came from.
    """

    counts: Tensor | None
    cu_seqlens: Tensor | None
    prefill_cu_seqlens: Tensor | None
    slots: Tensor | None
    has_initial_state: Tensor | None
    num_computed_tokens: Tensor | None
    num_accepted_tokens: Tensor | None
    write_slots: Tensor | None = None

    @classmethod
    def of(cls, call: Any) -> "PlanTensors":
        """Return the plan among the arguments of a mixing op's call."""
        return cls(*(getattr(call, name) for name in cls._fields))

    def bind(self, op: Callable[..., T]) -> Callable[..., T]:
        """Return the mixing op with this plan."""
        return partial(op, **self._asdict())


NO_PLAN = PlanTensors(None, None, None, None, None, None, None)
"""For a run that only allocates: outputs are zero, caches stay as they are."""


class HasPlan(Protocol):
    """What layers take as a plan, such as a `mamba_ops.serving.Plan`."""

    @property
    def tensors(self) -> PlanTensors:
        """The tensors of the plan."""

    @property
    def null_slot(self) -> int:
        """The slot of padding rows, beside the negative ones."""
