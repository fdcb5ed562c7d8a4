"""Random plans and pools: each is what was asked for, or refused in a sentence."""

from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
import torch

from mamba_ops.layers.caches import ConvAndState
from mamba_ops.serving import Plan, PrefixCache, StatePool
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


class _Layer:
    """A layer by its caches alone: a convolution of width 4, and a state."""

    def empty_caches(self, slots: int, *, columns: int = 1) -> ConvAndState:
        return ConvAndState(torch.zeros(slots, 2, 2 + columns), torch.zeros(slots, 3))


def copy(pick: Pick) -> str:
    """Copy states between slots of a pool: what is copied is right, or nothing is written."""
    columns, null_slot = 1 + pick(3), pick(2) - 1
    made = StatePool.of({"layer": _Layer()}, 6, columns=columns, null_slot=null_slot)
    window, state = made.caches["layer"]
    for cache in (window, state):
        cache.copy_(torch.arange(cache.numel()).view(cache.shape))
    before = window.clone(), state.clone()
    source: Any = [pick(7) for _ in range(1 + pick(columns + 1))] if pick(3) else pick(7)
    target: Any = pick(7)
    accepted: Any = 1 + pick(columns + 1)
    changed = pick(8)
    if changed < 3:
        anything = NUMBERS[pick(len(NUMBERS))]
        source, target, accepted = (anything if i == changed else v for i, v in enumerate((source, target, accepted)))
    elif isinstance(source, list) and changed == 3:
        source = (np.array, torch.tensor)[pick(2)](source)
    shown = f"copy({source!r}, {target!r}, accepted={accepted!r}) of {columns} columns, null_slot {null_slot}"
    try:
        made.copy(source, target, accepted=accepted)
    except ValueError as error:
        if not (str(error).startswith("StatePool.copy: ") and ": got " in str(error) and ", expected " in str(error)):
            raise Wrong(f"{shown} ended in {error!r}") from error
        if not all(map(torch.equal, (window, state), before)):
            raise Wrong(f"{shown} ended in {error!r}, and wrote") from error
        return REFUSED
    except Exception as error:
        raise Wrong(f"{shown} ended in {error!r}") from error
    slots = [index(source)] if np.ndim(source) == 0 else [*map(index, source)]
    to, back = index(target), index(accepted) - 1
    is_right = back < min(columns, len(slots)) and to not in slots and null_slot not in (to, *slots)
    if is_right:
        before[0][to, :, : 2 + columns - back] = before[0][slots[0], :, back:].clone()
        before[1][to] = before[1][slots[back]].clone()
    if not (is_right and all(map(torch.equal, (window, state), before))):
        raise Wrong(f"{shown} left {window.tolist()}, {state.tolist()}")
    return RIGHT


def prefixes(pick: Pick) -> str:
    """Find, keep, allocate and evict at random: what is found was kept, no slot is two things, and none is lost."""
    made = StatePool({}, 6)
    cache, mine = PrefixCache(made, 2), set[int]()
    texts, pending, used = dict[int, tuple[int, ...]](), dict[int, tuple[int, ...]](), set[int]()
    end = RIGHT
    for _ in range(1 + pick(16)):
        tokens = [pick(2) for _ in range(pick(9))]
        what = pick(6)
        try:
            if what == 0:
                stop, slot = cache.find(tokens)
                is_right = (slot is None) == (stop == 0) and (slot is None or texts.get(slot) == tuple(tokens[:stop]))
                used |= {slot} - {None}
            elif what == 1:
                computed, stop, most = (pick(len(tokens) + 2) for _ in range(3))
                kept = cache.keep(tokens, computed, stop, most=most - 1)
                is_right = all(computed < s <= stop <= len(tokens) and s % 2 == 0 for s in kept) and len(kept) < most
                pending |= {slot: tuple(tokens[:s]) for s, slot in kept.items()}
            elif what == 2:
                mine.add(cache.allocate())
                is_right = True
            elif what == 3 and mine:
                made.free(mine.pop())
                is_right = True
            else:
                (cache.commit, cache.discard)[what % 2]()
                texts |= pending if what % 2 == 0 else {}
                pending, used = {}, set()
                is_right = True
        except NoFreeSlot:
            is_right = made.num_free == 0 and cache.slots <= used | pending.keys()
        except ValueError as error:
            is_right, end = str(error).startswith("PrefixCache: ") and ": got " in str(error), REFUSED
        texts = {slot: text for slot, text in texts.items() if slot in cache.slots}
        if not (is_right and used | pending.keys() <= cache.slots == made.allocated - mine and not cache.slots & mine):
            raise Wrong(f"a prefix cache has {cache.slots} of {made.allocated}, {mine} are requests'; {what}, {tokens}")
    return end
