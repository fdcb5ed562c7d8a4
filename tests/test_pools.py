"""State pools: where caches are in memory, and which slots are in use. The forward context."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mamba_ops.layers import GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, Mamba3, ShortConv
from mamba_ops.serving import ForwardContext, NoFreeSlot, Plan, StatePool, current_context, forward_context

LAYERS = {
    "mamba": Mamba(16, d_inner=24, dstate=8, dt_rank=3),
    "mamba2": Mamba2(16, heads=4, head_dim=8, dstate=8, groups=2),
    "short_conv": ShortConv(16),
    "gdn": GatedDeltaNet(16, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4),
    "kda": KimiDeltaAttention(16, num_heads=2, head_dim=8),
    "mamba3": Mamba3(16, heads=2, head_dim=8, dstate=8),
}


@pytest.mark.parametrize("page_bytes", [0, 5000])
def test_pages_hold_what_the_layers_have(page_bytes: int) -> None:
    pool = StatePool.of(LAYERS, 5, page_bytes=page_bytes, dtype=torch.bfloat16)
    for name, layer in LAYERS.items():
        caches = pool.caches[name]
        for mine, theirs in zip(caches, layer.empty_caches(5, dtype=torch.bfloat16), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()[1:]) == (theirs.shape, theirs.dtype, theirs.stride()[1:])
            assert not mine.any()
            assert mine.data_ptr() % 64 == 0  # as much as a CPU allocator gives
            page = mine.stride(0) * mine.element_size()
            assert page % 128 == 0
            assert page >= max(page_bytes, sum(c[0].nbytes for c in caches))
        assert len({cache.untyped_storage().data_ptr() for cache in caches}) == 1


def test_no_two_numbers_share_a_place() -> None:
    pool = StatePool.of(LAYERS, 4)
    for caches in pool.caches.values():
        for i, cache in enumerate(caches):
            for slot in range(4):
                cache[slot] = 10 * i + slot
        for i, cache in enumerate(caches):
            assert [cache[slot].unique().tolist() for slot in range(4)] == [[10 * i + slot] for slot in range(4)]


def test_a_layer_runs_on_its_pages_as_on_caches_of_its_own() -> None:
    layer = LAYERS["mamba2"]
    hidden, slots = torch.randn(2, 9, 16), torch.tensor([2, 0])
    pooled, own = StatePool.of(LAYERS, 3).caches["mamba2"], layer.empty_caches(3)
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, *pooled, slots=slots), layer(hidden, *own, slots=slots))
    torch.testing.assert_close(pooled, own)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_takes_caches_of_one_page(name: str, mode: Any) -> None:
    """They are written to, and share memory without an element in common, whatever their dtypes."""
    torch.compiler.reset()
    layer = LAYERS[name]
    compiled = torch.compile(
        lambda hidden, plan, *caches: layer(hidden, *caches, plan=plan),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with mode():
        own, pooled = (StatePool.of({name: layer}, 3).caches[name] for _ in range(2))
        for computed, new, slots in (([0], [5], [1]), ([5, 0], [1, 9], [1, 2])):
            hidden, plan = torch.randn(sum(new), 16), Plan.of(computed, new, slots, max_requests=4)
            torch.testing.assert_close(compiled(hidden, plan, *pooled), layer(hidden, *own, plan=plan))
        torch.testing.assert_close(pooled, own)


def test_other_caches_are_given_by_template() -> None:
    templates = {"attention": [torch.empty(0, 6, 2, 4)], "none": [], "empty": [torch.empty(0, 0, 3)]}
    caches = StatePool(templates, 3).caches
    assert caches["attention"][0].shape == (3, 6, 2, 4)
    assert caches["none"] == ()
    assert caches["empty"][0].shape == (3, 0, 3)


def test_slots_are_allocated_and_freed() -> None:
    pool = StatePool({}, 4, null_slot=1)
    assert [pool.allocate() for _ in range(3)] == [0, 2, 3]
    assert (pool.num_free, pool.allocated) == (0, {0, 2, 3})
    with pytest.raises(NoFreeSlot, match="all 3 slots are in use; free one, or let requests wait"):
        pool.allocate()
    pool.free(2)
    assert (pool.num_free, pool.allocated) == (1, {0, 3})
    for slot in (2, 1, 7):
        with pytest.raises(ValueError, match=rf"slot: got {slot}, expected one that is allocated \(0, 3\); was it"):
            pool.free(slot)
    assert pool.allocate() == 2


@pytest.mark.parametrize(("slots", "null_slot"), [(0, -1), (2, 2)])
def test_a_pool_has_slots(slots: int, null_slot: int) -> None:
    with pytest.raises(ValueError, match=f"slots: got {slots} with null_slot {null_slot}"):
        StatePool({}, slots, null_slot=null_slot)


def test_the_context_is_that_of_the_innermost_block() -> None:
    with pytest.raises(RuntimeError, match=r"no forward context: run the model inside `with mamba_ops\.serving"):
        current_context()
    caches: dict[str, list[Tensor]] = {}
    outer, inner = ForwardContext(LAYERS, caches), ForwardContext({}, caches)
    with forward_context(outer):
        with forward_context(inner):
            assert current_context() is inner
        assert current_context() is outer


def numbered_pool(columns: int = 3) -> StatePool:
    """Every number of a slot is another one."""
    pool = StatePool.of(LAYERS, 6, columns=columns, null_slot=0)
    for caches in pool.caches.values():
        for cache in caches:
            cache.copy_(torch.arange(cache.numel(), dtype=torch.float32).view(cache.shape))
    return pool


def test_states_are_copied_to_one_slot() -> None:
    pool, before = numbered_pool(), numbered_pool()
    pool.copy(2, 4)
    for name, caches in pool.caches.items():
        for cache, old in zip(caches, before.caches[name], strict=True):
            assert torch.equal(cache[4], old[2])
            assert torch.equal(cache[[0, 1, 2, 3, 5]], old[[0, 1, 2, 3, 5]])


def test_a_speculating_request_is_copied_as_of_its_accepted_tokens() -> None:
    """The window is in the first slot, further on; the state is in the slot of the last accepted token."""
    pool, before = numbered_pool(), numbered_pool()
    pool.copy([2, 5, 1], 4, accepted=2)
    for name, caches in pool.caches.items():
        for field, cache, old in zip(caches._fields, caches, before.caches[name], strict=True):
            if field == "conv_state":
                assert torch.equal(cache[4, :, :-1], old[2, :, 1:])
            else:
                assert torch.equal(cache[4], old[5])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((6, 1), {}, "source: got 6, expected a slot of the pool, 0 to 5, and not the null slot"),
        ((1, -1), {}, "target: got -1, expected a slot of the pool"),
        ((1, 0), {}, "target: got 0, expected a slot of the pool"),
        ((1, 2.0), {}, "target: got 2.0, expected a slot of the pool"),
        (([1, 2], 2), {}, r"target: got \[1, 2\] to 2, expected slots that differ"),
        (([], 2), {}, "accepted: got 1, expected 1 to the 0 slots of source"),
        (([1, 2], 3), {"accepted": 3}, "accepted: got 3, expected 1 to the 2 slots of source"),
        (([1, 2], 3), {"accepted": 0}, "accepted: got 0, expected 1 to the 2 slots of source"),
        ((torch.tensor([1.0]), 3), {}, r"source: got tensor\(1.\), expected a slot of the pool"),
        ((1, 3), {"accepted": torch.tensor(1.0)}, r"accepted: got tensor\(1.\), expected 1 to the 1 slots"),
        ((None, 3), {}, "source: got None, expected a slot, or all slots of a request"),
        ((1, torch.tensor([2])), {}, r"target: got tensor\(\[2\]\), expected a slot of the pool"),
        (
            ([1, 2, 3, 4], 5),
            {"accepted": 4},
            "accepted: got 4 for the windows of '.*', expected at most 3; make the po",
        ),
    ],
    ids=str,
)
def test_wrong_copies_are_refused(arguments: Any, options: Any, message: str) -> None:
    pool, before = numbered_pool(), numbered_pool()
    with pytest.raises(ValueError, match=rf"^StatePool.copy: {message}"):
        pool.copy(*arguments, **options)
    for name, caches in pool.caches.items():
        assert all(map(torch.equal, caches, before.caches[name]))


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_slots_of_other_libraries_are_slots(kind: Any) -> None:
    pool, right = numbered_pool(), numbered_pool()
    pool.copy(kind([2, 5]), np.int64(4), accepted=2)
    pool.copy(torch.tensor(2), True)  # which as an index would be every slot
    right.copy([2, 5], 4, accepted=2)
    right.copy(2, 1)
    for name, caches in pool.caches.items():
        assert all(map(torch.equal, caches, right.caches[name]))


def test_unnamed_windows_cannot_be_rolled_back() -> None:
    pool = StatePool({"a": [torch.zeros(0, 3, 4)]}, 4)
    pool.copy([1, 2], 3)
    with pytest.raises(ValueError, match="got 2 with a tuple for 'a', expected a NamedTuple of caches, where windows"):
        pool.copy([1, 2], 3, accepted=2)
