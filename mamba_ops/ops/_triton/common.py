"""What several Triton kernels and their launchers share."""

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # Triton reads it as it decorates, so it does not change


@triton.jit
def softplus(v):
    # max(v, 0) + log(1 + e), e at most 1. No log: where 1 + e is near 1 a GPU's own is wrong in the fourth digit of the
    # result. Instead log(1 + e) = 2 atanh(r), r = e / (2 + e), whose series in r * r ends in time, as r is at most 1/3.
    e = tl.exp(-tl.abs(v))
    r = e / (2.0 + e)
    q = r * r
    series = 1.0 / 15 + q * (1.0 / 17)
    series = 1.0 / 11 + q * (1.0 / 13 + q * series)
    series = 1.0 / 7 + q * (1.0 / 9 + q * series)
    series = 1.0 / 3 + q * (1.0 / 5 + q * series)
    return tl.maximum(v, 0.0) + 2.0 * (r + r * q * series)


@triton.jit
def chunk_at(chunk, cu_seqlens, rows, length, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    # Of the chunk with this number, counted through all rows: its row (`rows` if there is no such chunk), its tokens
    # from low to high, and whether it is the row's first and its last one. Chunks end at multiples of CHUNK from a
    # row's first token.
    if cu_seqlens is not None:
        row = 0
        first = 0
        total = 0
        for start in range(0, rows, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            begin = tl.load(cu_seqlens + r, r < rows, other=0).to(tl.int32)
            count = tl.load(cu_seqlens + r + 1, r < rows, other=0).to(tl.int32) - begin
            of_row = (tl.maximum(count, 0) + CHUNK - 1) // CHUNK
            end = total + tl.cumsum(of_row, 0)
            earlier = (r < rows) & (end <= chunk)
            row += tl.sum(earlier.to(tl.int32), 0)
            first = tl.maximum(first, tl.max(tl.where(earlier, end, 0), 0))
            total += tl.sum(of_row, 0)
        begin = tl.load(cu_seqlens + row, row < rows, other=0).to(tl.int32)
        end = tl.load(cu_seqlens + row + 1, row < rows, other=0).to(tl.int32)
        low = begin + (chunk - first) * CHUNK
        return row, low, tl.minimum(low + CHUNK, end), chunk == first, low + CHUNK >= end
    else:
        per_row = (length + CHUNK - 1) // CHUNK
        row = chunk // per_row
        low = chunk % per_row * CHUNK
        is_first = low == 0
        is_last = low + CHUNK >= length
        high = tl.minimum(low + CHUNK, length)
        return row, row * length + low, row * length + high, is_first, is_last


@triton.jit
def chunks_of(row, cu_seqlens, length, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    # The number of a row's first chunk, how many it has, its first token, and how many of those.
    if cu_seqlens is not None:
        first = 0
        for start in range(0, row, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            begin = tl.load(cu_seqlens + r, r < row, other=0).to(tl.int32)
            count = tl.load(cu_seqlens + r + 1, r < row, other=0).to(tl.int32) - begin
            first += tl.sum((tl.maximum(count, 0) + CHUNK - 1) // CHUNK, 0)
        begin = tl.load(cu_seqlens + row).to(tl.int32)
        count = tl.load(cu_seqlens + row + 1).to(tl.int32) - begin
        return first, (count + CHUNK - 1) // CHUNK, begin, count
    else:
        chunks = (length + CHUNK - 1) // CHUNK
        return row * chunks, chunks, row * length, length


@triton.jit
def slot_of(row, slots, slots_stride, null_slot):
    # Where the state of a row is, -1 if the row is nobody's. Stride -1, see `optional`: row i has state i.
    row = row.to(tl.int64)
    given = slots_stride >= 0
    slot = tl.load(slots + row * slots_stride, given, other=0).to(tl.int64)
    nobody = given & ((slot < 0) | (slot == null_slot))
    return tl.where(nobody, -1, tl.where(given, slot, row))


@triton.jit
def last_slot(row, source, count, write_slots, write_stride, null_slot):
    # Where the last state of a row of `count` tokens goes, and whether it does; without tokens it moves if it has to.
    target = source
    moves = count > 0
    if write_slots is not None:
        target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
        moves = (moves | (target != source)) & (target >= 0) & (target != null_slot)
    return target, moves


@triton.jit
def is_set(row, flags, flags_stride):
    # Whether a row's flag is set; stride -1: nobody's is.
    return tl.load(flags + row.to(tl.int64) * flags_stride, flags_stride >= 0, other=0) != 0


@triton.jit
def advanced(pointer, offset, ALIGNED: tl.constexpr):
    pointer += offset
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def along(pointer, channels, stride):
    # pointers to some channels; stride None: they are neighbours, and the first one is at a multiple of 16 bytes
    if stride is None:
        return advanced(pointer, channels, True)
    else:
        return pointer + channels.to(tl.int64) * stride


@triton.jit
def tile(pointer, i, i_stride, j, ALIGNED: tl.constexpr):
    # pointers to the entries j of rows i; where ALIGNED, rows start at multiples of 16 bytes
    pointers = pointer + i.to(tl.int64)[:, None] * i_stride + j[None, :]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


def optional(tensor: Tensor | None, like: Tensor, dtype: tl.dtype) -> tuple[Any, int]:
    """What a kernel is given for a tensor that callers may leave out: it, and the stride of its first dimension.

    None would be another variant of the kernel, to compile and to load. Instead there is then the address of `like`,
    which is never read, as that of numbers of `dtype`, the usual one: the stride -1 says so.
    """
    return (triton.reinterpret(like, dtype), -1) if tensor is None else (tensor, tensor.stride(0))


def cdiv(numerator: int, denominator: int) -> int:
    """How many blocks cover so many; `triton.cdiv` is meant for kernels and takes microseconds."""
    return -(-numerator // denominator)


_HERE = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context in which a launch goes to the tensor's device; where there is but one, that is any."""
    if tensor.get_device() < 0 or not _several(tensor.device.type):
        return _HERE
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(tensor.device).device(tensor.device)
    return context


@functools.cache
def _several(device_type: str) -> bool:
    return bool(torch.get_device_module(device_type).device_count() > 1)
