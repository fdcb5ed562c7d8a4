"""Checkpoint maps, both ways and in one process; and what tensor parallelism refuses."""

import pytest
import torch
from torch import nn

from mamba_ops.distributed import checkpoint_map, fully_shard, tensor_parallel
from mamba_ops.layers import Mamba, Mamba2
from mamba_ops.serving import Plan
from tests.distributed.bodies import LAYERS, new_layer
from tests.distributed.ranks import single_mesh


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_that_was_split_is_merged(name: str, ranks: int) -> None:
    layer = new_layer(name)
    whole = layer.state_dict()
    found = checkpoint_map(layer, ranks)
    parts = [found.split(whole, rank) for rank in range(ranks)]
    merged = found.merge(parts)
    assert merged.keys() == whole.keys()
    for parameter, tensor in whole.items():
        assert torch.equal(merged[parameter], tensor), parameter
    shared = [n for n in whole if parts[0][n].shape == whole[n].shape]
    assert ranks == 1 or all("norm" in n or "out_proj.bias" in n for n in shared), shared
    with pytest.raises(ValueError, match=rf"got {ranks + 1} state dicts, expected {ranks}"):
        found.merge([*parts, parts[0]])


def test_what_cannot_be_divided_is_refused() -> None:
    layer = Mamba2(8, heads=6, head_dim=4, dstate=4, groups=3)
    with pytest.raises(ValueError, match="got 6 heads on 4 ranks, expected a multiple of the ranks"):
        checkpoint_map(layer, 4)
    with pytest.raises(ValueError, match="got 3 groups on 2 ranks, expected a multiple of the ranks, or a divisor"):
        checkpoint_map(layer, 2)
    with pytest.raises(TypeError, match=r"got a Linear, expected a mamba_ops\.layers"):
        checkpoint_map(nn.Linear(2, 2), 2)
    with pytest.raises(TypeError, match=r"got a Linear, expected a mamba_ops\.layers"):
        fully_shard(nn.Linear(2, 2))


def test_a_split_layer_is_not_split_again_and_takes_no_plan_where_it_cannot() -> None:
    with single_mesh() as mesh:
        layer = tensor_parallel(Mamba(8, d_inner=8, dstate=4), mesh)
        with pytest.raises(ValueError, match="got one that is split already"):
            tensor_parallel(layer, mesh)
        with pytest.raises(ValueError, match="channels are split over ranks"):
            layer(torch.zeros(2, 8), *layer.empty_caches(2), plan=Plan.of([0, 0], [1, 1], [0, 1]))
