"""The kernel that finds systems on Hopper: what it finds is what the portable one does, but for roundings."""

import pytest
import torch

pytest.importorskip("triton")

from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from mamba_ops.ops.chunk_gated_delta_rule.triton import launch
from tests.test_hopper_walk import case_of, needs_hopper, results


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("l2norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_systems_are_those_of_the_portable_kernel(dtype, l2norm, monkeypatch):
    op = chunk_gated_delta_rule
    case = case_of(op, (1000, 64, 3, 0, 129))
    arguments = case.arguments | {name: case.arguments[name].to(dtype) / 12 for name in "qkv"}
    arguments |= {"qk_l2norm": l2norm}
    found = results(op, arguments, case.caches["ssm_state"], case.out.to(dtype))
    monkeypatch.setattr(launch, "is_hopper_solve", lambda *_, **__: False)
    expected = results(op, arguments, case.caches["ssm_state"], case.out.to(dtype))
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).abs().max() < 0.005 * other.float().abs().max()
