"""State pools: where caches are in memory, and which slots are in use. The forward context."""

import pytest
import torch
from torch import Tensor

from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2, ShortConv
from mamba_ops.serving import ForwardContext, NoFreeSlot, StatePool, current_context, forward_context

LAYERS = {
    "mamba": Mamba(16, d_inner=24, dstate=8, dt_rank=3),
    "mamba2": Mamba2(16, heads=4, head_dim=8, dstate=8, groups=2),
    "short_conv": ShortConv(16),
    "gdn": GatedDeltaNet(16, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4),
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
