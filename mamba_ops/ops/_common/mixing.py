"""What the mixing ops share: the tensors of a plan, and which rows of a batch they say are decodes and prefills.

A mixing op is one layer's convolution and recurrence on a batch in which some rows decode and others read a prompt. It
is composed of the ops for either. Decodes come first, in rows and in tokens.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import (
    index_tensor,
    one_device,
    packed_rows,
    shape_is,
    short,
    slot_table,
    tensor_rank,
)
from mamba_ops.registry import Op, bad_argument, has_explicit_backend
from mamba_ops.registry.errors import in_call_of


class PlanTensors(NamedTuple):
    """A batch as the mixing ops are told of it, in the order of their arguments. R is the most rows that it can have.

    Attributes:
        counts: int64 (4,), on the host: decodes, their tokens, prefills, their tokens.
        cu_seqlens: int32 or int64 (R + 1,): the tokens of row i; rows beyond the last are empty.
        prefill_cu_seqlens: the same for the prefills alone, counted from the first prefill's first token.
        slots: int32 or int64 (R,) or (R, columns): where the rows' states are; in columns 1 on those after the second
            and later tokens of speculative decodes.
        has_initial_state: bool (R,): whether a row goes on from the state in its slot.
        num_computed_tokens: int32 or int64 (R,): how many tokens of a row came before these.
        num_accepted_tokens: int32 or int64 (R,): of a speculative decode's latest tokens, how many were kept. None:
            every decode is one token.
    """

    counts: Tensor | None
    cu_seqlens: Tensor | None
    prefill_cu_seqlens: Tensor | None
    slots: Tensor | None
    has_initial_state: Tensor | None
    num_computed_tokens: Tensor | None
    num_accepted_tokens: Tensor | None

    @classmethod
    def of(cls, call: Any) -> "PlanTensors":
        """Return the plan among the arguments of a mixing op's call."""
        return cls(*(getattr(call, name) for name in cls._fields))


NO_PLAN = PlanTensors(None, None, None, None, None, None, None)
"""For a run that only allocates: outputs are zero, caches stay as they are."""


Call = Callable[..., Any]
"""`Op.call_undispatched` or `Op.check_supported`. A name: annotations of inner functions are evaluated in each call."""


class HasPlan(Protocol):
    """What layers are given a plan as, such as a `mamba_ops.serving.Plan`."""

    @property
    def tensors(self) -> PlanTensors:
        """The tensors of the plan."""

    @property
    def null_slot(self) -> int:
        """The slot that means nobody."""


class Rows(NamedTuple):
    """The decodes, or the prefills, of a batch: which tokens they are, and what the ops want to know of their rows."""

    tokens: slice
    options: dict[str, Any]

    def of(self, tensor: Tensor) -> Tensor:
        """Return their part of a tensor of all tokens; where that is all of it, no view has to be made."""
        return tensor if self.tokens == slice(0, tensor.shape[0]) else tensor[self.tokens]


class Batch(NamedTuple):
    """A plan's rows; None where there are none of a kind."""

    decodes: Rows | None
    prefills: Rows | None
    num_computed_tokens: Tensor | None
    tokens: int

    def clear_rest(self, output: Tensor) -> None:
        """Set to zero what stands for tokens that no row has."""
        if self.tokens < output.shape[0]:
            output[self.tokens :].zero_()


def by_head(packed: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
    """Take the last axis apart: of each part, how many heads (or groups) it has, and how large they are."""
    parts = packed.split_with_sizes([heads * size for heads, size in sizes], dim=-1)
    return [part.view(*packed.shape[:-1], *size) for part, size in zip(parts, sizes, strict=True)]


def check_plan(device: torch.device, plan: PlanTensors) -> None:
    """Raise the ValueError about a plan's shapes and dtypes; a plan that is not there is right."""
    needed = plan._asdict()
    accepted = needed.pop("num_accepted_tokens")
    if plan.counts is None:
        for name, tensor in {**needed, "num_accepted_tokens": accepted}.items():
            if tensor is not None:
                raise bad_argument(name, got="a tensor without counts", expected="a whole plan, or none")
        return
    for name, tensor in needed.items():
        if tensor is None:
            raise bad_argument(name, got="None with counts", expected="a whole plan, or none")
    if plan.counts.device.type != "cpu":
        hint = "they are read on the host, and must not be waited for"
        raise bad_argument("counts", got=str(plan.counts.device), expected="cpu", hint=hint)
    if plan.counts.dtype != torch.int64:
        raise bad_argument("counts", got=short(plan.counts.dtype), expected="int64")
    shape_is("counts", plan.counts, (4,), hint="decodes, their tokens, prefills, their tokens")
    assert plan.cu_seqlens is not None  # for mypy; the loop above saw to it
    packed_rows(plan.cu_seqlens)
    rows = plan.cu_seqlens.shape[0] - 1
    hint = "all tensors of a plan have its most rows"
    for name in ("prefill_cu_seqlens", "num_computed_tokens", "num_accepted_tokens"):
        if (tensor := getattr(plan, name)) is not None:
            index_tensor(name, tensor)
            shape_is(name, tensor, (rows + (name == "prefill_cu_seqlens"),), hint=hint)
    shape_is("has_initial_state", plan.has_initial_state, (rows,), hint=hint)
    if plan.has_initial_state is not None and plan.has_initial_state.dtype != torch.bool:
        got = short(plan.has_initial_state.dtype)
        raise bad_argument("has_initial_state", got=got, expected="bool", hint="convert it first")
    slot_table("slots", plan.slots, rows=rows)
    one_device(device, "projected", **{n: t for n, t in plan._asdict().items() if n != "counts"})


def check_caches(
    plan: PlanTensors,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dim: int,
    state: tuple[int, ...],
) -> None:
    """Raise the ValueError about two caches of a layer that convolves `dim` channels and has states like `state`."""
    tensor_rank("conv_weight", conv_weight, {2: "(dim, width)"})
    width = conv_weight.shape[1]
    shape_is("conv_weight", conv_weight, (dim, width))
    if not 2 <= width <= 8:
        raise bad_argument("conv_weight", got=f"width {width}", expected="a width of 2 to 8")
    shape_is("conv_bias", conv_bias, (dim,))
    tensor_rank("conv_state", conv_state, {3: "(slots, dim, state_len)"})
    slots, _, state_len = conv_state.shape
    shape_is("conv_state", conv_state, (slots, dim, state_len))
    if plan.counts is not None and slots == 0:
        raise bad_argument(
            "conv_state", got="0 slots", expected="1 at least", hint="a plan's rows have their states there"
        )
    if state_len < width - 1:
        raise bad_argument("conv_state", got=f"state_len {state_len}", expected=f"at least {width - 1}")
    shape_is("ssm_state", ssm_state, (slots, *state), hint="both caches have as many slots")


def batch_of(op: str, plan: PlanTensors, tokens: int, null_slot: int) -> Batch:
    """Read a plan's counts, on the host, and take the decodes' and the prefills' part of every tensor.

    All layers of a step have one plan, so what was taken of the latest one is kept for as long as it lives.

    Raises:
        ValueError: in a call of `op`, the counts are not those of `tokens` tokens in as many rows as the plan can have.
    """
    if plan.counts is None or plan.slots is None or plan.cu_seqlens is None:
        return Batch(None, None, None, 0)
    global _latest
    counts, others, latest = plan.counts.tolist(), plan[1:], _latest
    of = tokens, null_slot, counts, [None if t is None else t.data_ptr() for t in others]
    if (
        latest is not None
        and latest.counts() is plan.counts
        and latest.of == of
        and all(map(is_, latest.others, others))
    ):
        return latest.batch
    batch = _batch_of(op, plan, counts, tokens, null_slot)
    _latest = _Made(weakref.ref(plan.counts, _forget), of, others, batch)
    return batch


class _Made(NamedTuple):
    """A batch, and what it was made of: a plan's counts, other numbers and where its tensors are, and these."""

    counts: "weakref.ref[Tensor]"
    of: tuple[Any, ...]
    others: tuple[Tensor | None, ...]
    batch: Batch


_latest: _Made | None = None


def _forget(counts: "weakref.ref[Tensor]") -> None:
    """Let go of a plan's tensors when its counts are gone."""
    global _latest
    if _latest is not None and _latest.counts is counts:
        _latest = None


def _batch_of(op: str, plan: PlanTensors, counts: list[int], tokens: int, null_slot: int) -> Batch:
    def wrong(got: str, expected: str, hint: str = "the plan is another batch's") -> ValueError:
        return in_call_of(op, bad_argument("counts", got=got, expected=expected, hint=hint))

    assert plan.slots is not None  # for mypy; the caller saw to it
    assert plan.cu_seqlens is not None
    decodes, decode_tokens, prefills, prefill_tokens = counts
    rows, total = decodes + prefills, decode_tokens + prefill_tokens
    most = plan.cu_seqlens.shape[0] - 1
    if min(counts) < 0 or rows > most:
        raise wrong(f"{decodes} decodes and {prefills} prefills", f"at most {most} rows", "build a plan with more rows")
    if total > tokens:
        raise wrong(f"{total} tokens", f"at most {tokens}")
    if plan.num_accepted_tokens is None and decode_tokens != decodes:
        hint = "decodes of several tokens need num_accepted_tokens"
        raise wrong(f"{decode_tokens} tokens of {decodes} decodes", "one each", hint)

    decoding, reading = None, None
    computed = None
    first = plan.slots if plan.slots.dim() == 1 else plan.slots[:, 0]
    if decodes and decode_tokens:
        options: dict[str, Any] = {"slots": first[:decodes], "null_slot": null_slot}
        if plan.num_accepted_tokens is not None:
            options["slots"] = plan.slots[:decodes]
            options["cu_seqlens"] = plan.cu_seqlens[: decodes + 1]
            options["num_accepted_tokens"] = plan.num_accepted_tokens[:decodes]
        decoding = Rows(slice(0, decode_tokens), options)
    if prefills and prefill_tokens and plan.prefill_cu_seqlens is not None and plan.has_initial_state is not None:
        options = {
            "slots": first[decodes:rows],
            "cu_seqlens": plan.prefill_cu_seqlens[: prefills + 1],
            "has_initial_state": plan.has_initial_state[decodes:rows],
            "null_slot": null_slot,
        }
        reading = Rows(slice(decode_tokens, total), options)
        computed = None if plan.num_computed_tokens is None else plan.num_computed_tokens[decodes:rows]
    return Batch(decoding, reading, computed, total)


def each_kind(
    batch: Batch,
    step: Call,
    steps: tuple[Op[...], Op[...]],
    read: Call,
    reads: tuple[Op[...], Op[...]],
) -> None:
    """Call `step` for the decodes and `read` for the prefills, each with its rows and its two ops.

    Where backends are asked for by name, both are called with `Op.check_supported` of these first, so that a call that
    will be refused is refused before anything is written.
    """
    if has_explicit_backend(*steps, *reads):
        if batch.decodes is not None:
            step(batch.decodes, *(op.check_supported for op in steps))
        if batch.prefills is not None:
            read(batch.prefills, *(op.check_supported for op in reads))
    if batch.decodes is not None:
        step(batch.decodes, *(op.call_undispatched for op in steps))
    if batch.prefills is not None:
        read(batch.prefills, *(op.call_undispatched for op in reads))


def like_convolved(mixed: Tensor) -> Tensor:
    """Return a tensor that lies in memory as the convolution's result will, to ask the next op about.

    A slice of a projection, whose rows are wider, would say something else of strides and alignment.
    """
    return torch.empty_like(mixed, memory_format=torch.contiguous_format)


def require_window(op: str, plan: PlanTensors, conv_state: Tensor, conv_weight: Tensor) -> None:
    """Raise ValueError, in a call of `op`, where conv_state does not hold all that a speculative decode may go back to.

    That is how the composed ops keep it: one long window in the slot of column 0. A vendor may keep one in every slot.
    """
    if plan.num_accepted_tokens is not None and plan.slots is not None:
        more = 0 if plan.slots.dim() == 1 else plan.slots.shape[1] - 1
        got, needed = conv_state.shape[2], conv_weight.shape[1] - 1 + more
        if got < needed:
            hint = f"a speculative decode goes back by up to {more} tokens"
            raise in_call_of(
                op, bad_argument("conv_state", got=f"state_len {got}", expected=f"at least {needed}", hint=hint)
            )


class SamplePlan(NamedTuple):
    """A plan to sample a mixing op with, over caches of `SAMPLE_SLOTS` slots."""

    name: str
    tokens: int
    plan: PlanTensors
    null_slot: int


SAMPLE_SLOTS = 9


def sample_plans(device: torch.device) -> Iterator[SamplePlan]:
    """Yield plans of every kind: mixed, of one kind, speculative, padded, with rows that are nobody, empty, none."""

    def plan(
        decodes: Sequence[int], prefills: Sequence[int], slots: Tensor, *, most: int = 7, accepted: Sequence[int] = ()
    ) -> PlanTensors:
        lengths, idle = [*decodes, *prefills], most - len(decodes) - len(prefills)

        def on(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def ends(lengths: Sequence[int]) -> Tensor:
            return on([0, *accumulate(lengths), *[sum(lengths)] * (most - len(lengths))])

        return PlanTensors(
            torch.tensor([len(decodes), sum(decodes), len(prefills), sum(prefills)]),
            ends(lengths),
            ends(prefills),
            slots.to(device),
            on([1] * len(decodes) + [i % 2 for i in range(len(prefills))] + [0] * idle, torch.bool),
            on([9] * len(decodes) + [5 * (i % 2) for i in range(len(prefills))] + [0] * idle),
            on([*accepted, *[1] * (most - len(accepted))]) if accepted else None,
        )

    slots = torch.tensor([3, 8, 1, 4, 6, -1, -1], dtype=torch.int32)
    table = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 0, 0], [8, 0, 0], *[[0, 0, 0]] * 3], dtype=torch.int64)
    yield SamplePlan("base", 25, plan([1, 1], [5, 17, 1], slots), -1)
    yield SamplePlan("decodes", 5, plan([1] * 5, [], slots), -1)
    yield SamplePlan("prefills", 20, plan([], [3, 0, 17], slots, most=3), -1)
    yield SamplePlan("some are nobody", 12, plan([1, 1, 1], [4, 5], slots), 8)
    yield SamplePlan("padded", 31, plan([1], [6], slots.unsqueeze(1), most=4), 0)
    yield SamplePlan("speculative", 14, plan([3, 2], [4, 5], table, accepted=[2, 1]), 0)
    yield SamplePlan("nobody at all", 6, plan([], [], slots), -1)
    yield SamplePlan("no plan", 6, NO_PLAN, -1)
