"""What Triton kernels are given of activations in any layout, and how an output of any layout gets what they wrote."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mamba_ops.ops._triton import layout
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
ITSELF, COPIED, IN_TILES = "itself", "copied", "copied in tiles"


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=DEVICE).to(dtype).view(shape)


LAYOUTS = {  # an activation in each, whether it is flat, and what becomes of it
    "as it should be": (lambda: numbers(70, 5), True, ITSELF),
    "heads": (lambda: numbers(70, 5, 3), True, ITSELF),
    "rows": (lambda: numbers(2, 35, 5), False, ITSELF),
    "a slice of a projection": (lambda: numbers(2, 35, 9)[..., 3:8], False, ITSELF),
    "no token": (lambda: numbers(20, 0).t(), True, ITSELF),
    "channel-major": (lambda: numbers(67, 130).t(), True, IN_TILES),
    "channel-major, 16 bits": (lambda: numbers(67, 30, dtype=torch.bfloat16).t(), True, IN_TILES),
    "channel-major heads": (lambda: numbers(3, 24, 130).permute(2, 0, 1), True, IN_TILES),
    "channel-major rows": (lambda: numbers(3, 67, 65).transpose(1, 2), False, IN_TILES),
    "channel-major, rows inside": (lambda: numbers(67, 3, 65).permute(1, 2, 0), False, IN_TILES),
    "a part of channel-major rows": (lambda: numbers(3, 29, 90)[:, 2:, 5:70].transpose(1, 2), False, IN_TILES),
    "channel-major, whole tiles": (lambda: numbers(3, 64, 136).transpose(1, 2), False, IN_TILES),
    "channel-major, whole tiles of 16 bits": (lambda: numbers(200, 136, dtype=torch.bfloat16).t(), True, IN_TILES),
    "channel-major, whole tiles from anywhere": (lambda: numbers(64, 140)[:, 3:131].t(), True, IN_TILES),
    "few channels": (lambda: numbers(16, 130).t(), True, COPIED),
    "heads at other distances than channels": (lambda: numbers(3, 30, 64)[:, :24].permute(2, 0, 1), True, COPIED),
    "heads inside channels": (lambda: numbers(24, 3, 64).permute(2, 1, 0), True, COPIED),
    "every other channel": (lambda: numbers(64, 20)[:, ::2], True, COPIED),
    "one token, channel-major": (lambda: numbers(20, 2).t()[:1], True, COPIED),
    "rows apart": (lambda: numbers(4, 30, 5)[::2, :9], False, COPIED),
}


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that were copied in tiles."""
    seen: list[torch.Size] = []
    copy = layout._copy

    def noted(source: Tensor, target: Tensor) -> None:
        seen.append(source.shape)
        copy(source, target)

    monkeypatch.setattr(layout, "_copy", noted)
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_are_given_tokens_that_are_dense(name: str, tiles: list[torch.Size]) -> None:
    make, flat, becomes = LAYOUTS[name]
    tensor = make()
    found = layout.by_token(tensor, flat)
    assert torch.equal(found, tensor if flat else tensor.flatten(0, 1))
    assert layout.is_dense(found)
    assert (found.data_ptr() == tensor.data_ptr()) == (becomes == ITSELF)
    assert bool(tiles) == (becomes == IN_TILES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_get_what_was_written_and_keep_the_rest(name: str, tiles: list[torch.Size]) -> None:
    make, flat, becomes = LAYOUTS[name]
    output = make()
    memory = torch.empty(0, dtype=output.dtype, device=DEVICE).set_(output.untyped_storage())
    expected = memory.clone()
    tokens = expected.as_strided(output.shape, output.stride(), output.storage_offset())
    (tokens[1::2] if flat else tokens[:, 1::2]).neg_()

    written = layout.by_token(output, flat)
    own = written.view(output.shape)
    (own[1::2] if flat else own[:, 1::2]).neg_()
    layout.write_back(written, output, flat)
    assert torch.equal(memory, expected)
    assert len(tiles) == 2 * (becomes == IN_TILES)


@pytest.mark.parametrize("flat", [True, False])
def test_channels_alone_are_brought_together(flat: bool) -> None:
    rows = numbers(4, 30, 5)[::2, :9]
    assert layout.by_channel(rows, False) is rows
    apart = numbers(7, 66).t() if flat else numbers(2, 7, 66).transpose(1, 2)
    found = layout.by_channel(apart, flat)
    assert found.is_contiguous()
    assert torch.equal(found, apart)
