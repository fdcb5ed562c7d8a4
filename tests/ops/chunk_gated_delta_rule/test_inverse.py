"""The inverses of chunks' systems, by every way that kernels find them."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from mamba_ops.ops._triton.common import INTERPRETED  # noqa: E402
from mamba_ops.ops._triton.delta_rule import CHUNK, inverse_of  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU rounds the products of one of the ways")


@triton.jit
def _invert(system, inverse, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, CHUNK)
    place = i[:, None] * CHUNK + i[None, :]
    tl.store(inverse + place, inverse_of(tl.load(system + place), CHUNK, PRECISION))


def systems():
    below = torch.randn(CHUNK, CHUNK, generator=torch.Generator().manual_seed(0)).tril(-1)
    yield pytest.param(0.1 * below, 1e-6, id="random")
    yield pytest.param(torch.ones(CHUNK, CHUNK).tril(-1), 1e-6, id="of equal keys")
    yield pytest.param(2 * torch.ones(CHUNK, CHUNK).tril(-1), 1e-6, id="of equal keys that turn around")
    yield pytest.param(torch.zeros(CHUNK, CHUNK), 0.0, id="of nothing")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(("system", "most"), list(systems()))
def test_the_inverse_is_of_what_is_below_the_diagonal(system, most, precision):
    inverse = torch.full_like(system, torch.nan)
    _invert[(1,)](system + torch.ones(CHUNK, CHUNK).triu(), inverse, CHUNK, precision)
    true = torch.linalg.inv(torch.eye(CHUNK, dtype=torch.float64) + system.double())
    assert (inverse.double() - true).norm() <= most * true.norm()
    assert not inverse.triu(1).any()
