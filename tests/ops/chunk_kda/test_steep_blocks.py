"""Kernels take a key's channels in blocks of 32, and blocks that decay steeply another way: both ways add up."""

from pathlib import Path

import pytest
import torch

from mamba_ops.ops._common.samples import SampleTensors
from mamba_ops.ops.chunk_kda import chunk_kda
from mamba_ops.registry import Backend, Sample
from mamba_ops.testing.judge import front_on
from tests.harness import judge
from tests.test_mutants import Bug, triton_with

pytest.importorskip("triton")

STEEP = (slice(32, 64), slice(64, 80), slice(0))
"""The channels that decay by more than any dtype's SPAN in a chunk, of each head: one block's, or none."""
LAYOUTS = ["all at once", "packed"]


def call(layout: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Sample:
    """Keys of three blocks, the last of them not full; a chunk and a bit, and in the packed call a row before that."""
    make = SampleTensors(device, dtype)
    heads, k_dim, v_dim = len(STEEP), 80, 16
    tokens = (110,) if layout == "packed" else (1, 70)
    g = -0.02 * make.normal(*tokens, heads, k_dim, dtype=torch.float32).abs()
    for head, steep in enumerate(STEEP):
        g[..., head, steep] *= 100
    q, k, v = (make.normal(*tokens, *size) for size in ((1, k_dim), (1, k_dim), (heads, v_dim)))
    rows = {"cu_seqlens": make.indices(0, 40, 110)} if layout == "packed" else {}
    return Sample(layout, (q, k, v, g, make.normal(*tokens, heads).sigmoid()), {"qk_l2norm": True, **rows})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_one_block_is_steep(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    judge(chunk_kda, call(layout, device, dtype), front_on(chunk_kda, "triton"))


BUGS: dict[str, Bug] = {
    "first block taken for any": ("                first += BLOCK\n", "                first += 0\n"),
    "other blocks added to a steep one": ("while remaining & 1 == 0:", "while remaining < 0:"),
    "first block's bit set for any": ("tl.sum(is_steep << tl.arange(0, BLOCKS), axis=0)", "tl.max(is_steep, axis=0)"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str, layout: str, device: torch.device, tmp_path: Path) -> None:
    backend = Backend("mutant", devices=[device.type])
    backend.implements(chunk_kda)(triton_with(BUGS[bug], chunk_kda, tmp_path))
    try:
        with pytest.raises(AssertionError):
            judge(chunk_kda, call(layout, device), front_on(chunk_kda, backend.name))
    finally:
        backend.remove()
