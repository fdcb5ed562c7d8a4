"""Sums over what programs found of the same gradient, always in the same order, and zeros.

torch would do both, in more launches: a sum and a copy into another dtype. And a call that consists of launches alone
can be repeated without its launcher (see `prepared`).
"""

import torch
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import cdiv, kernel, on_device_of, options

_TILE = 2048  # numbers that a program holds


@kernel(first_number="count")
def _add_up(
    parts,
    total,
    count,  # parts
    part_stride,
    columns,
    size,  # of a part; as many columns as fit, row by row
    row_stride,  # of `total`
    column_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < size
    found = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < count)[:, None] & inside[None, :]
        found += tl.load(parts + part.to(tl.int64)[:, None] * part_stride + entry[None, :], there, other=0.0)
    place = (entry // columns).to(tl.int64) * row_stride + (entry % columns) * column_stride
    tl.store(total + place, tl.sum(found, 0), inside)


@kernel(first_number="count")
def _clear(target, count: tl.int64, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.zeros([BLOCK], tl.int32), i < count)


def add_up(parts: Tensor, total: Tensor, *, many: bool = True) -> None:
    """Store the sums of float32 `parts (count, ...)`, each of them dense, in `total`, which has the shape of one.

    `many` makes it fast for many parts, or for few; it is not told by their number, as each is a variant of the kernel.
    """
    count, size = parts.shape[0], total.numel()
    if total.is_contiguous():
        columns, row_stride, column_stride = max(size, 1), 0, 1
    elif total.dim() == 2:
        columns, (row_stride, column_stride) = total.shape[1], total.stride()
    else:
        total.copy_(parts.sum(0))
        return
    if size == 0:
        return
    together = 32 if many else 1
    block = _TILE // together
    with on_device_of(parts):
        _add_up[(cdiv(size, block),)](
            *(parts, total, count, parts.stride(0), columns, size, row_stride, column_stride),
            PARTS=together,
            BLOCK=block,
            **options(num_warps=4),
        )


def clear(tensor: Tensor) -> None:
    """Fill a tensor with zeros."""
    if not tensor.is_contiguous() or tensor.itemsize > 4:
        tensor.zero_()
    elif tensor.numel():
        bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])
        with on_device_of(tensor):
            _clear[(cdiv(bits.numel(), 2 * _TILE),)](bits, bits.numel(), BLOCK=2 * _TILE, **options(num_warps=4))
