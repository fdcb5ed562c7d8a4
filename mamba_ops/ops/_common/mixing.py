"""What the mixing ops share: checks of a plan and of caches, and a batch's decodes and prefills.

A mixing op is one layer's convolution and recurrence on a batch in which some rows decode and others read a prompt. It
is composed of the ops for either. Decodes come first, in rows and in tokens.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any, NamedTuple

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
from mamba_ops.ops._common.narrow import Wide, check_state, widened
from mamba_ops.ops._common.sequences import DecodeArgs, PlanTensors, SequenceArgs
from mamba_ops.registry import Op, bad_argument
from mamba_ops.registry.decomposition import is_decomposing
from mamba_ops.registry.errors import in_call_of


class Rows(NamedTuple):
    """The decodes, or the prefills, of a batch.

    Attributes:
        tokens: where their tokens are among those of the batch.
        arguments: what is passed about them to the ops of their kind.
        num_computed_tokens: how many tokens of each row came before these; None for decodes.
        check_only: whether ops are only asked if they take the call.
    """

    tokens: slice
    arguments: SequenceArgs | DecodeArgs
    num_computed_tokens: Tensor | None = None
    check_only: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Return their part of a tensor of all tokens; where that is all of it, no view has to be made."""
        return tensor if self.tokens == slice(0, tensor.shape[0]) else tensor[self.tokens]

    def bind(self, op: Op[...]) -> Callable[..., object]:
        """Return the op for these rows."""
        call: Callable[..., object] = op.check_supported if self.check_only else op.call_undispatched
        return self.arguments.bind(call)

    def widened(self, call: Any, x: Tensor) -> tuple["Rows", Wide]:
        """Return these prefills and their states, as ops over sequences `x` take them; then those are to be kept."""
        assert isinstance(self.arguments, SequenceArgs)  # for mypy: those of prefills are
        wide = widened(call.ssm_state, call.state_scale, self.arguments, x)
        wide = wide._replace(ends=None) if self.check_only else wide
        return self._replace(arguments=wide.rows), wide

    def convolve(
        self,
        op: Op[...],
        call: Any,
        mixed: Tensor,
        out: Tensor | None = None,
        *,
        window: str = "conv_state",
        silu: bool = True,
    ) -> Tensor:
        """Convolve their part of `mixed` with a cache of a mixing op's call and its weights, and return the result.

        Without `out` the result has memory of its own, also where ops are only asked: the next op is asked about it,
        because a slice of a projection has other strides and another alignment.
        """
        x = self.of(mixed)
        out = x.new_empty(x.shape) if out is None else self.of(out)
        weight, bias = (getattr(call, name) for name in _parameters_of(window))
        self.bind(op)(x, weight=weight, bias=bias, conv_state=getattr(call, window), silu=silu, out=out)
        return out


class Batch(NamedTuple):
    """A plan's rows.

    Attributes:
        decodes: those that decode; None where there are none.
        prefills: the others, round by round: those of one round read what earlier ones have stored.
        tokens: how many of the batch's tokens rows have; they come first.
        owned: (tokens,): which of the tokens rows have, where their number is not known on the host.
    """

    decodes: Rows | None
    prefills: tuple[Rows, ...]
    tokens: int
    owned: Tensor | None = None

    def check_only(self) -> "Batch":
        """Return this batch with rows for which ops are only asked if they take the call.

        Where backends are asked for by name, a mixing op goes through its ops with it first: so a call that will be
        refused is refused before anything is written.
        """
        decodes = self.decodes and self.decodes._replace(check_only=True)
        return self._replace(decodes=decodes, prefills=tuple(r._replace(check_only=True) for r in self.prefills))

    def kinds(self, decode: Op[...], prefill: Op[...]) -> Iterator[tuple[Rows, Op[...]]]:
        """Yield the decodes, if there are any, and each round of prefills, with the op of their kind."""
        if self.decodes is not None:
            yield self.decodes, decode
        for rows in self.prefills:
            yield rows, prefill

    def clear_rest(self, output: Tensor) -> None:
        """Set to zero the output for tokens that no row has."""
        if self.owned is not None:
            output.masked_fill_(~self.owned.view(-1, *[1] * (output.dim() - 1)), 0)
        elif self.tokens < output.shape[0]:
            output[self.tokens :].zero_()


def _parameters_of(window: str) -> tuple[str, str]:
    """Return the names of the weight and the bias of the convolution whose last inputs are in the cache `window`."""
    return window.replace("conv_state", "conv_weight"), window.replace("conv_state", "conv_bias")


def by_head(packed: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
    """Split the last axis into parts, each with so many heads (or groups) of such a size."""
    parts = packed.split_with_sizes([heads * size for heads, size in sizes], dim=-1)
    return [part.view(*packed.shape[:-1], *size) for part, size in zip(parts, sizes, strict=True)]


# -- checks -----------------------------------------------------------------------------------------------------------


def check_plan_and_caches(
    call: Any,
    device: torch.device,
    windows: Mapping[str, int],
    states: Mapping[str, tuple[int, ...]],
    *,
    of: str = "projected",
) -> None:
    """Raise the ValueError about the plan and the caches of a layer.

    Args:
        call: of a mixing op.
        device: where all tensors but the counts must be.
        windows: the channels of each convolution, by the name of its cache; "conv_state" is the cache of a convolution
            with "conv_weight" and "conv_bias", and so with any prefix.
        states: sizes of one slot of the other caches, by name.
        of: the argument that is on that device.
    """
    plan = PlanTensors.of(call)
    _check_plan(device, plan, of)
    slots, hint = None, f"{'both' if len(windows) + len(states) == 2 else 'all'} caches have as many slots"
    for name, dim in windows.items():
        weight, bias = _parameters_of(name)
        width = _check_taps(weight, getattr(call, weight), bias, getattr(call, bias), dim)
        cache = getattr(call, name)
        tensor_rank(name, cache, {3: "(slots, dim, state_len)"})
        first, _, state_len = cache.shape
        if slots is None:
            shape_is(name, cache, (first, dim, state_len))
            slots = _check_slots(plan, name, first)
        else:
            shape_is(name, cache, (slots, dim, state_len), hint=hint)
        if state_len < width - 1:
            raise bad_argument(name, got=f"state_len {state_len}", expected=f"at least {width - 1}")
    for name, sizes in states.items():
        cache = getattr(call, name)
        if slots is None:
            slots = _check_slots(plan, name, cache.shape[0] if cache.dim() else 0)
        shape_is(name, cache, (slots, *sizes), hint=hint if len(windows) + len(states) > 1 else "")
        if name == "ssm_state" and hasattr(call, "state_scale"):
            check_state(cache, call.state_scale, f"(slots, {'heads, ' * (len(sizes) > 2)}dim)")


def _check_taps(name: str, weight: Tensor, bias_name: str, bias: Tensor | None, dim: int) -> int:
    """Return the width of a convolution of `dim` channels, or raise the ValueError about its weight and its bias."""
    tensor_rank(name, weight, {2: "(dim, width)"})
    width = weight.shape[1]
    shape_is(name, weight, (dim, width))
    if not 2 <= width <= 8:
        raise bad_argument(name, got=f"width {width}", expected="a width of 2 to 8")
    shape_is(bias_name, bias, (dim,))
    return width


def _check_slots(plan: PlanTensors, name: str, slots: int) -> int:
    """Return how many slots the first cache has, or raise ValueError where a plan's rows cannot have any."""
    if plan.counts is not None and slots == 0:
        raise bad_argument(name, got="0 slots", expected="1 at least", hint="a plan's rows have their states there")
    return slots


def _check_plan(device: torch.device, plan: PlanTensors, of: str) -> None:
    """Raise the ValueError about a plan's shapes and dtypes; it may be left out as a whole."""
    needed = plan._asdict()
    optional = {name: needed.pop(name) for name in ("num_accepted_tokens", "write_slots")}
    if plan.counts is None:
        for name, tensor in {**needed, **optional}.items():
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
    tensor_rank("counts", plan.counts, {1: "(2 + 2 * rounds,)"})
    if (size := plan.counts.shape[0]) < 4 or size % 2:
        expected = "4, and 2 more for each further round of prefills"
        hint = "decodes, their tokens, prefills, their tokens"
        raise bad_argument("counts", got=f"{size} numbers", expected=expected, hint=hint)
    assert plan.cu_seqlens is not None  # for mypy; the loop above refuses None
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
    slot_table("write_slots", plan.write_slots, rows=rows)
    one_device(device, of, **{n: t for n, t in plan._asdict().items() if n != "counts"})


def require_window(op: str, call: Any, *windows: str) -> None:
    """Raise ValueError, in a call of `op`, where a window is too short for the tokens that speculation may discard.

    That is how the composed ops keep it: one long window in the slot of column 0. A vendor may keep one in every slot.
    """
    if call.num_accepted_tokens is not None and call.slots is not None:
        more = 0 if call.slots.dim() == 1 else call.slots.shape[1] - 1
        for name in windows or ("conv_state",):
            weight = getattr(call, _parameters_of(name)[0])
            got, needed = getattr(call, name).shape[2], weight.shape[1] - 1 + more
            if got < needed:
                hint = f"a speculative decode goes back by up to {more} tokens"
                error = bad_argument(name, got=f"state_len {got}", expected=f"at least {needed}", hint=hint)
                raise in_call_of(op, error)


# -- a plan's rows ----------------------------------------------------------------------------------------------------


def batch_of(op: str, call: Any, tokens: int) -> Batch:
    """Read a plan's counts, on the host, and take the decodes' and the prefills' part of every tensor.

    In an exported program that is decomposed nothing can be read: there all rows are prefills, which compute the same.

    All layers of a step have one plan, so the latest batch is kept for as long as its plan lives.

    Raises:
        ValueError: in a call of `op`, the counts are not those of `tokens` tokens in as many rows as the plan can have.
    """
    plan, null_slot = PlanTensors.of(call), call.null_slot
    if plan.counts is None or plan.slots is None or plan.cu_seqlens is None:
        return Batch(None, (), 0)
    if is_decomposing():
        return _all_as_prefills(op, plan, tokens, null_slot)
    global _latest
    counts, others, latest = plan.counts.tolist(), plan[1:], _latest
    key = tokens, null_slot, counts, [None if t is None else t.data_ptr() for t in others], _version(plan, counts)
    if (
        latest is not None
        and latest.counts() is plan.counts
        and latest.key == key
        and all(map(is_, latest.others, others))
    ):
        return latest.batch
    batch = _batch_of(op, plan, counts, tokens, null_slot)
    _latest = _Latest(weakref.ref(plan.counts, _forget), key, others, batch)
    return batch


def _version(plan: PlanTensors, counts: list[int]) -> object:
    """Return what differs once the plan was written in place, where a batch holds numbers computed from it.

    Those are the ends of later rounds; all else are parts of the plan's tensors. One of inference mode does not say
    whether it was written.
    """
    ends = plan.prefill_cu_seqlens
    if len(counts) <= 4 or ends is None:
        return None
    return object() if ends.is_inference() else ends._version


def _all_as_prefills(op: str, plan: PlanTensors, tokens: int, null_slot: int) -> Batch:
    counts, slots, ends, initial = plan.counts, plan.slots, plan.cu_seqlens, plan.has_initial_state
    assert counts is not None and slots is not None and ends is not None and initial is not None  # noqa: PT018
    if plan.num_accepted_tokens is not None:
        expected = "None in an exported program that is decomposed"
        hint = "how many tokens a decode has would be read on the host; keep the op, or decode one token a row"
        raise in_call_of(op, bad_argument("num_accepted_tokens", got="a tensor", expected=expected, hint=hint))
    if counts.shape[0] > 4:
        hint = "how many rounds there are would be read on the host; keep the op, or keep no states inside prompts"
        got, expected = f"{counts.shape[0]} numbers", "4 in an exported program that is decomposed"
        raise in_call_of(op, bad_argument("counts", got=got, expected=expected, hint=hint))
    device, rows = slots.device, ends.shape[0] - 1
    goes_on = initial | (torch.arange(rows, device=device) < counts[0].to(device))
    first = slots[:rows] if slots.dim() == 1 else slots[:rows, 0]
    targets = None
    if (table := plan.write_slots) is not None:
        targets = table[:rows] if table.dim() == 1 else table[:rows, 0]
        targets = torch.where(torch.arange(rows, device=device) < counts[0].to(device), first, targets)
    arguments = SequenceArgs(first, ends, goes_on, null_slot, targets)
    owned = torch.arange(tokens, device=device) < ends[-1]
    return Batch(None, (Rows(slice(0, tokens), arguments),), tokens, owned)


class _Latest(NamedTuple):
    """A batch, and what it was made from: a plan's counts, numbers and addresses, and the plan's other tensors."""

    counts: "weakref.ref[Tensor]"
    key: tuple[Any, ...]
    others: tuple[Tensor | None, ...]
    batch: Batch


_latest: _Latest | None = None


def _forget(counts: "weakref.ref[Tensor]") -> None:
    """Drop a plan's tensors when its counts are gone."""
    global _latest
    if _latest is not None and _latest.counts is counts:
        _latest = None


def _batch_of(op: str, plan: PlanTensors, counts: list[int], tokens: int, null_slot: int) -> Batch:
    def wrong(got: str, expected: str, hint: str = "the plan is another batch's") -> ValueError:
        return in_call_of(op, bad_argument("counts", got=got, expected=expected, hint=hint))

    assert plan.slots is not None  # for mypy; the caller looked
    assert plan.cu_seqlens is not None
    decodes, decode_tokens, *sizes = counts
    rounds = list(zip(sizes[::2], sizes[1::2], strict=True))
    prefills, prefill_tokens = map(sum, zip(*rounds, strict=True))
    rows, total = decodes + prefills, decode_tokens + prefill_tokens
    most = plan.cu_seqlens.shape[0] - 1
    if min(counts) < 0 or rows > most:
        raise wrong(f"{decodes} decodes and {prefills} prefills", f"at most {most} rows", "build a plan with more rows")
    if total > tokens:
        raise wrong(f"{total} tokens", f"at most {tokens}")
    if plan.num_accepted_tokens is None and decode_tokens != decodes:
        hint = "decodes of several tokens need num_accepted_tokens"
        raise wrong(f"{decode_tokens} tokens of {decodes} decodes", "one each", hint)
    for what, requests, its_tokens in (("decodes", decodes, decode_tokens), *(("prefills", *r) for r in rounds)):
        if its_tokens and not requests:
            raise wrong(f"{its_tokens} tokens of 0 {what}", "0 tokens")

    decoding: Rows | None = None
    first = plan.slots if plan.slots.dim() == 1 else plan.slots[:, 0]
    if decodes and decode_tokens:
        arguments = DecodeArgs(first[:decodes], null_slot=null_slot)
        if plan.num_accepted_tokens is not None:
            accepted = plan.num_accepted_tokens[:decodes]
            arguments = DecodeArgs(plan.slots[:decodes], plan.cu_seqlens[: decodes + 1], accepted, null_slot)
        decoding = Rows(slice(0, decode_tokens), arguments)
    ends, initial, computed = plan.prefill_cu_seqlens, plan.has_initial_state, plan.num_computed_tokens
    assert ends is not None and initial is not None and computed is not None  # noqa: PT018 # for mypy
    targets = plan.write_slots
    if targets is not None and targets.dim() == 2:
        targets = targets[:, 0]
    reading, before, read = [], 0, 0  # prefills and their tokens of the rounds before
    for prefills, prefill_tokens in rounds:
        if prefills and (prefill_tokens or targets is not None):
            here, own = slice(decodes + before, decodes + before + prefills), ends[before : before + prefills + 1]
            written = None if targets is None else targets[here]
            sequences = SequenceArgs(first[here], own - read if read else own, initial[here], null_slot, written)
            tokens_here = slice(decode_tokens + read, decode_tokens + read + prefill_tokens)
            reading.append(Rows(tokens_here, sequences, computed[here]))
        before, read = before + prefills, read + prefill_tokens
    return Batch(decoding, tuple(reading), total)
