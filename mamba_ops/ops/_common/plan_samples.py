"""The plans that the samples of mixing ops are made with."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.sequences import NO_PLAN, NULL_SLOT, PlanTensors
from mamba_ops.registry import Sample

SAMPLE_SLOTS = 9
_NARROW = ("base", "padded", "speculative", "write slots")
"""Plans to sample a mixing op with that has a narrow state; none in which a row reads what another has stored."""
NARROW_ERRORS: tuple[tuple[str, str, Callable[[Tensor], Any], str], ...] = (
    ("base, int16 state", "state_scale", lambda s: None, r"got none for a state of int16, expected float32 \(slots, "),
    ("base, int16 state", "state_scale", lambda s: s[1:], r"got shape \(8, "),
    (
        "base, int16 state",
        "ssm_state",
        lambda s: s.float(),
        "got float32, expected int16 or float8_e4m3fn; state_",
    ),
)
"""Rows of `error_table` about the sample "base" with narrow states."""


def with_narrow_state(sample: Sample, state: int) -> Iterator[Sample]:
    """Yield a sample of a plan and, of some plans, the same with its state, argument number `state`, in int16."""
    yield sample
    if sample.name in _NARROW:
        states = sample.args[state]
        narrow, scale = (states * 9000).to(torch.int16), states[..., 0].abs().float() * 1e-4
        arguments = (*sample.args[:state], narrow, *sample.args[state + 1 :])
        yield Sample(f"{sample.name}, int16 state", arguments, {**sample.kwargs, "state_scale": scale})


class SamplePlan(NamedTuple):
    """A plan to sample a mixing op with, over caches of `SAMPLE_SLOTS` slots."""

    name: str
    tokens: int
    plan: PlanTensors
    null_slot: int


def sample_plans(device: torch.device) -> Iterator[SamplePlan]:
    """Yield plans of every kind: mixed, of one kind, speculative, in rounds, with padding, empty, none."""

    def plan(
        decodes: Sequence[int],
        prefills: Sequence[int],
        slots: Tensor,
        *,
        most: int = 7,
        accepted: Sequence[int] = (),
        rounds: Sequence[int] = (),
        write_slots: Tensor | None = None,
        initial: Sequence[int] = (),
    ) -> PlanTensors:
        """Make one; with `rounds` prefills are in several of so many rows, and `initial` says which have a state."""
        lengths, idle = [*decodes, *prefills], most - len(decodes) - len(prefills)
        goes_on = initial or [i % 2 for i in range(len(prefills))]
        ends_of_rounds = [0, *accumulate(rounds or [len(prefills)])]
        sizes = [prefills[a:b] for a, b in pairwise(ends_of_rounds)]

        def on(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def ends(lengths: Sequence[int]) -> Tensor:
            return on([0, *accumulate(lengths), *[sum(lengths)] * (most - len(lengths))])

        return PlanTensors(
            torch.tensor([len(decodes), sum(decodes), *(n for part in sizes for n in (len(part), sum(part)))]),
            ends(lengths),
            ends(prefills),
            slots.to(device),
            on([1] * len(decodes) + [*goes_on] + [0] * idle, torch.bool),
            on([9] * len(decodes) + [5 * i for i in goes_on] + [0] * idle),
            on([*accepted, *[1] * (most - len(accepted))]) if accepted else None,
            None if write_slots is None else write_slots.to(device),
        )

    slots = torch.tensor([3, 8, 1, 4, 6, -1, -1], dtype=torch.int32)
    table = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 0, 0], [8, 0, 0], *[[0, 0, 0]] * 3], dtype=torch.int64)
    yield SamplePlan("base", 25, plan([1, 1], [5, 17, 1], slots), NULL_SLOT)
    yield SamplePlan("decodes", 5, plan([1] * 5, [], slots), NULL_SLOT)
    yield SamplePlan("prefills", 20, plan([], [3, 0, 17], slots, most=3), NULL_SLOT)
    yield SamplePlan("padding rows", 12, plan([1, 1, 1], [4, 5], slots), 8)
    yield SamplePlan("padded", 31, plan([1], [6], slots.unsqueeze(1), most=4), 0)
    yield SamplePlan("speculative", 14, plan([3, 2], [4, 5], table, accepted=[2, 1]), 0)
    elsewhere = torch.tensor([-1, -1, 0, 7, -1, -1, -1], dtype=torch.int32)
    yield SamplePlan("write slots", 20, plan([1], [3, 0, 12], slots, write_slots=elsewhere), 6)
    source, target = (torch.tensor(n, dtype=torch.int64) for n in ([[3], [8], [1], [2], [4], [0]], [3, 2, 4, 0, 6, 7]))
    pieces: dict[str, Any] = {"rounds": [2, 2, 1], "initial": [1, 0, 1, 1, 1], "write_slots": target, "most": 6}
    yield SamplePlan("rounds", 21, plan([1], [6, 5, 2, 6, 0], source, **pieces), NULL_SLOT)
    yield SamplePlan("no rows", 6, plan([], [], slots), NULL_SLOT)
    yield SamplePlan("no plan", 6, NO_PLAN, NULL_SLOT)
