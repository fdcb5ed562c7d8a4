"""Random plans and pools: each is what was asked for, or refused in a sentence."""

from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
import torch

from mamba_ops.serving import Plan, StatePool
from mamba_ops.serving.pools import NoFreeSlot
from tests.fuzz.mutations import NUMBERS, Pick
from tests.fuzz.outcomes import REFUSED, RIGHT, Wrong


def plan(pick: Pick) -> str:
    """Make a plan of random requests, with up to two of its numbers changed to anything."""
    requests = pick(4)
    computed: list[Any] = [pick(4) * (1 + pick(3)) for _ in range(requests)]
    new: list[Any] = [1 + pick(3) * pick(3) for _ in range(requests)]
    columns = 1 + pick(3)
    slots: list[Any] = [[i * columns + c for c in range(columns)] for i in range(requests)]
    accepted: list[Any] | None = None if pick(2) else [pick(columns + 1) for _ in range(requests)]
    call: dict[str, Any] = {"num_computed_tokens": computed, "new_tokens": new, "slots": slots, "accepted": accepted}
    call |= {"max_requests": 4, "null_slot": -1}
    if not pick(2):
        ends = [(c, c + n) for c, n in zip(computed, new, strict=True)]
        call["sources"] = [20 + pick(2) if c and not pick(3) else None for c in computed]
        call["keep"] = [{1 + c + pick(e - c): 30 + i} if pick(2) else None for i, (c, e) in enumerate(ends)]
        call |= {"max_requests": 8, "rounds": 2 + pick(2)}
        call["prompt_tokens"] = [pick(1 + c) for c in computed]
    is_right = accepted is None  # and stays so if nothing is changed
    for _ in range(pick(3)):
        is_right = False
        name = [*call][pick(len(call))]
        value, anything = call[name], NUMBERS[pick(len(NUMBERS))]
        if isinstance(value, list) and value and pick(4):
            call[name] = [*value]
            call[name][pick(len(value))] = anything
        else:
            call[name] = [anything, np.array([1, 2]), torch.tensor([1, 2]), [], None][pick(5)]
    shown = ", ".join(f"{n}={v!r}" for n, v in call.items())
    try:
        made = Plan.of(call.pop("num_computed_tokens"), call.pop("new_tokens"), call.pop("slots"), **call)
    except ValueError as error:
        if not (str(error).startswith("Plan: ") and ": got " in str(error) and ", expected " in str(error)):
            raise Wrong(f"Plan.of({shown}) ended in {error!r}") from error
        if is_right:
            raise Wrong(f"Plan.of({shown}), a right call, ended in {error!r}") from error
        return REFUSED
    except Exception as error:
        raise Wrong(f"Plan.of({shown}) ended in {error!r}") from error
    counts, bounds = made.tensors.counts, made.tensors.cu_seqlens
    assert counts is not None
    assert bounds is not None
    decodes, decoding, *rounds = counts.tolist()
    rows = decodes + sum(rounds[::2])
    is_right = (
        sorted({*made.order}) == sorted(made.last_tokens) == list(range(len(made.last_tokens)))
        and all(b.start == a.stop for a, b in pairwise(sorted(made.pieces)) if a.request == b.request)
        and sum(p.stop - p.start for p in made.pieces) == made.tokens == int(bounds[rows])
        and decoding + sum(rounds[1::2]) == made.tokens
        and bool((bounds.diff() >= 0).all())
        and int(bounds[decodes]) == decoding
    )
    if not is_right:
        raise Wrong(f"Plan.of({shown}) made {made}, {made.tensors}")
    return RIGHT


def pool(pick: Pick) -> str:
    """Make a pool, then allocate and free at random, beside a set that knows what is right."""
    templates = {"layer": (torch.zeros(0, 3, 2), torch.zeros(0, 2, dtype=torch.bfloat16))}
    slots = NUMBERS[pick(len(NUMBERS))] if not pick(3) else 1 + pick(5)
    if isinstance(slots, int) and slots > 10_000:
        slots = 7  # not the memory of this machine
    null_slot = NUMBERS[pick(len(NUMBERS))] if not pick(3) else -1
    page_bytes = NUMBERS[pick(len(NUMBERS))] if not pick(4) else 0
    page_bytes = 64 if isinstance(page_bytes, int) and page_bytes > 10_000 else page_bytes
    shown = f"StatePool(slots={slots!r}, null_slot={null_slot!r}, page_bytes={page_bytes!r})"
    try:
        made = StatePool(templates, slots, page_bytes=page_bytes, null_slot=null_slot)
    except ValueError as error:
        if not (str(error).startswith("StatePool: ") and ": got " in str(error)):
            raise Wrong(f"{shown} ended in {error!r}") from error
        return REFUSED
    except Exception as error:
        raise Wrong(f"{shown} ended in {error!r}") from error
    taken: set[int] = set()
    free = set(range(made.slots)) - {made.null_slot}
    for _ in range(pick(12)):
        slot: Any = None
        try:
            if pick(2):
                slot = made.allocate()
                is_right = slot in free - taken
                taken.add(slot)
            else:
                slot = NUMBERS[pick(len(NUMBERS))] if not pick(3) else pick(6)
                made.free(slot)
                is_right = _is_in(slot, taken)
                taken.discard(index(slot))
        except NoFreeSlot:
            is_right = free == taken
        except ValueError as error:
            is_right = str(error).startswith("StatePool: slot: got ") and not _is_in(slot, taken)
        except Exception as error:
            raise Wrong(f"{shown}: free({slot!r}) ended in {error!r}") from error
        if not is_right or made.allocated != taken or made.num_free != len(free - taken):
            raise Wrong(f"{shown}: allocate() or free({slot!r}) left {made.allocated}, expected {taken}")
    return RIGHT


def _is_in(slot: Any, taken: set[int]) -> bool:
    try:
        return index(slot) in taken
    except TypeError:
        return False
