"""Ops and layers on several ranks are what they are on one."""

import pytest

from tests.distributed import bodies
from tests.distributed.ranks import run_on, single_mesh

pytestmark = pytest.mark.timeout(900)  # where many processes share a core


def test_mutating_ops_refuse_in_a_process() -> None:
    with single_mesh():
        bodies.mutating_ops_refuse(0, False)


@pytest.mark.slow
def test_mutating_ops_refuse() -> None:
    run_on(2, bodies.mutating_ops_refuse, True)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("ranks", "two_axes"), [(2, False), (4, False), (4, True)], ids=["2", "4", "2x2"])
def test_ops(ranks: int, two_axes: bool, compiled: bool) -> None:
    run_on(ranks, bodies.ops_are_the_whole, compiled, two_axes)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_packed_ops(ranks: int) -> None:
    run_on(ranks, bodies.packed_ops_are_the_whole)


@pytest.mark.slow
def test_uneven_heads() -> None:
    run_on(4, bodies.uneven_heads_are_right)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_layers(ranks: int, compiled: bool) -> None:
    run_on(ranks, bodies.layers_are_the_whole, list(bodies.LAYERS), compiled)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_decays_under_fsdp(compiled: bool) -> None:
    run_on(2, bodies.decays_stay_in_float32, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_heads_and_shards(compiled: bool) -> None:
    run_on(4, bodies.heads_and_shards, compiled)
