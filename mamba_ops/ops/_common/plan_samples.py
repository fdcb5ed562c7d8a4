"""The plans that the samples of mixing ops are made with."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.sequences import NO_PLAN, NULL_SLOT, PlanTensors

SAMPLE_SLOTS = 9


class SamplePlan(NamedTuple):
    """A plan to sample a mixing op with, over caches of `SAMPLE_SLOTS` slots."""

    name: str
    tokens: int
    plan: PlanTensors
    null_slot: int


def sample_plans(device: torch.device) -> Iterator[SamplePlan]:
    """Yield plans of every kind: mixed, of one kind, speculative, with padding rows or tokens, empty, none."""

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
    yield SamplePlan("base", 25, plan([1, 1], [5, 17, 1], slots), NULL_SLOT)
    yield SamplePlan("decodes", 5, plan([1] * 5, [], slots), NULL_SLOT)
    yield SamplePlan("prefills", 20, plan([], [3, 0, 17], slots, most=3), NULL_SLOT)
    yield SamplePlan("padding rows", 12, plan([1, 1, 1], [4, 5], slots), 8)
    yield SamplePlan("padded", 31, plan([1], [6], slots.unsqueeze(1), most=4), 0)
    yield SamplePlan("speculative", 14, plan([3, 2], [4, 5], table, accepted=[2, 1]), 0)
    yield SamplePlan("no rows", 6, plan([], [], slots), NULL_SLOT)
    yield SamplePlan("no plan", 6, NO_PLAN, NULL_SLOT)
