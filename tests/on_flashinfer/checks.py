"""What the stand-in for FlashInfer's functions holds their arguments to, and the calls that it got."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)
calls: list[dict[str, Any]] = []


def has_shape(tensor: Tensor, *shape: int, strides: tuple[int | None, ...] | None = None) -> None:
    """Shape, and those strides that are not None."""
    assert tuple(tensor.shape) == shape, (tensor.shape, shape)
    for has, wants in zip(tensor.stride(), strides or (), strict=strides is not None):
        assert wants is None or has == wants, (tensor.stride(), strides)


def aligned(tensor: Tensor, free: int, to: int = 16) -> None:
    """The tensor and what its first `free` strides step to."""
    assert tensor.data_ptr() % to == 0
    assert all(stride * tensor.itemsize % to == 0 for stride in tensor.stride()[:free]), tensor.stride()
