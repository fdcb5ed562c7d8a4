"""What several Triton kernels and their launchers share."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton import _triton
from mamba_ops.ops._triton.keys import settle
from mamba_ops.ops._triton.tape import observed


def kernel(*, first_number: str | None = None, static: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Make a Triton kernel that is compiled for none of the numbers and addresses that vary from call to call.

    Triton itself compiles a kernel again for a number that is 1 or a multiple of 16, for an address that is a multiple
    of 16, and on AMD for a tensor of at most 2 GiB. Here it does so for the tensors named in `static` only, and for
    every `constexpr`.

    Args:
        first_number: the first parameter that is a number: tensors come before it, constexprs after all numbers. None:
            there are no numbers.
        static: tensors at alike addresses in every call, which Triton may compile for: parameters, and memory that
            the launcher allocates.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.annotation is not tl.constexpr]
        numbers = [] if first_number is None else names[names.index(first_number) :]
        if unknown := set(static.split()) - set(names) | set(static.split()) & set(numbers):
            raise ValueError(f"{function.__name__}: static: got {', '.join(sorted(unknown))}, expected tensors")
        # Of tensors whose size varies this leaves out, beside the alignment, whether one has at most 2 GiB, for which
        # Triton compiles on AMD: a warm-up with small caches would miss the variant of large ones.
        varying = [name for name in names if name not in static.split()]
        return observed(triton.jit(function, do_not_specialize=varying, do_not_specialize_on_alignment=varying))

    return decorate


@triton.jit
def softplus(v):
    # max(v, 0) + log(1 + e), e at most 1. No log: where 1 + e is near 1 a GPU's own is wrong in the fourth digit of the
    # result. Instead e times a polynomial, with at most 2^-24 of log(1 + e) between the two. exp2 is one instruction of
    # a GPU, tl.exp several. Every fused operation is named: any two kernels get the same bits.
    e = tl.exp2(tl.abs(v) * -1.4426950408889634)
    q = tl.fma(e, 0.005232694558799267, -0.02950524352490902)
    q = tl.fma(e, q, 0.07822596281766891)
    q = tl.fma(e, q, -0.13663247227668762)
    q = tl.fma(e, q, 0.19106008112430573)
    q = tl.fma(e, q, -0.2484298199415207)
    q = tl.fma(e, q, 0.3331909775733948)
    q = tl.fma(e, q, -0.4999949336051941)
    q = tl.fma(e, q, 0.9999999403953552)
    return tl.fma(e, q, tl.maximum(v, 0.0))


@triton.jit
def silu(v, BITS: tl.constexpr):
    # v / (1 + exp(-v)), to be stored in so many bits. A GPU has an instruction for exp2, and one for a root's
    # reciprocal, each good to 22 bits, which is enough for 16; tl.exp and a division are several each.
    if BITS > 16:
        return v * tl.sigmoid(v)
    else:
        root = tl.rsqrt(1.0 + tl.exp2(v * -1.4426950408889634))  # log2(e)
        return v * root * root


@triton.jit
def to_be_multiplied(v, PRECISION: tl.constexpr):
    # float32 operands of tl.dot. In tf32 matrix units cut their last bits off, which is up to a whole step of what is
    # left, and always toward zero. Here they are rounded to the nearest instead, by half a step that carries; infinite
    # and too large numbers are infinite then, and NaN stays NaN.
    if PRECISION == "tf32":
        nearest = (v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        v = tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)
    return v


INTERPRETED = not isinstance(softplus, triton.JITFunction)
"""Whether Triton runs kernels on the CPU, in Python."""
if INTERPRETED:
    _triton.mend_interpreter()
else:
    settle()


def operand_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which matrix units multiply tensors: the widest of theirs, float32 at most."""
    widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    # Triton's interpreter multiplies the bits of bfloat16 numbers.
    return torch.float32 if widest == torch.float64 or (widest == torch.bfloat16 and INTERPRETED) else widest


@triton.jit
def within(value, most):
    # A number that was read, such as a bound of a row: kept from 0 to `most`.
    return tl.minimum(tl.maximum(value, 0), most)


@triton.jit
def row_tokens(row, cu_seqlens, tokens):
    # A packed row's first token and number of tokens: none of them is outside the `tokens` that there are.
    first = within(tl.load(cu_seqlens + row), tokens).to(tl.int64)
    end = within(tl.load(cu_seqlens + row + 1), tokens).to(tl.int64)
    return first, tl.maximum(end - first, 0).to(tl.int32)


@triton.jit
def chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS: tl.constexpr):
    # Of the chunk with this number, counted over all batch rows: its row (`rows` if there is no such chunk), the range
    # of its tokens, and whether it is the row's first and last one. A row's chunks begin every CHUNK tokens. With
    # cu_seqlens, `length` is the number of all tokens.
    if cu_seqlens is not None:
        row = 0
        first = 0
        total = 0
        for start in range(0, rows, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            begin = within(tl.load(cu_seqlens + r, r < rows, other=0), length).to(tl.int32)
            count = within(tl.load(cu_seqlens + r + 1, r < rows, other=0), length).to(tl.int32) - begin
            of_row = (tl.maximum(count, 0) + CHUNK - 1) // CHUNK
            end = total + tl.cumsum(of_row, 0)
            earlier = (r < rows) & (end <= chunk)
            row += tl.sum(earlier.to(tl.int32), 0)
            first = tl.maximum(first, tl.max(tl.where(earlier, end, 0), 0))
            total = tl.minimum(total + tl.sum(of_row, 0), 1 << 30)
        begin = within(tl.load(cu_seqlens + row, row < rows, other=0), length).to(tl.int32)
        end = within(tl.load(cu_seqlens + row + 1, row < rows, other=0), length).to(tl.int32)
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
def row_chunks(row, rows, cu_seqlens, length, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    # A row's first chunk and number of chunks, its first token and number of tokens. With cu_seqlens, `length` is the
    # number of all tokens. No row has a chunk beyond those that `rows` rows can have, wrong cu_seqlens included.
    if cu_seqlens is not None:
        first = 0
        for start in range(0, row, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            begin = within(tl.load(cu_seqlens + r, r < row, other=0), length).to(tl.int32)
            count = within(tl.load(cu_seqlens + r + 1, r < row, other=0), length).to(tl.int32) - begin
            first = tl.minimum(first + tl.sum((tl.maximum(count, 0) + CHUNK - 1) // CHUNK, 0), 1 << 30)
        begin, count = row_tokens(row, cu_seqlens, length)
        most = tl.maximum(length // CHUNK + rows - first, 0)
        return first, tl.minimum((count + CHUNK - 1) // CHUNK, most), begin.to(tl.int32), count
    else:
        chunks = (length + CHUNK - 1) // CHUNK
        return row * chunks, chunks, row * length, length


@triton.jit
def is_slot(slot, null_slot, slot_count):
    # Whether a state is read and stored there: neither for padding nor beyond the cache's `slot_count` slots.
    return (slot >= 0) & (slot < slot_count) & (slot != null_slot)


@triton.jit
def slot_or(default, row, slots, slots_stride, null_slot, slot_count):
    # The slot that a table has for a row, -1 for padding. Without a table (stride -1, see `or_placeholder`) `default`.
    has_slots = slots_stride >= 0
    slot = tl.load(slots + row.to(tl.int64) * slots_stride, has_slots, other=0).to(tl.int64)
    slot = tl.where(is_slot(slot, null_slot, slot_count), slot, -1)
    return tl.where(has_slots, slot, default)


@triton.jit
def load_slot(row, slots, slots_stride, null_slot, slot_count):
    # The slot of a row's state, -1 for a padding row. Without slots row i has slot i.
    return slot_or(row.to(tl.int64), row, slots, slots_stride, null_slot, slot_count)


@triton.jit
def final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count):
    # The slot for the state after a row's `count` tokens, and whether to store it there. A row without tokens keeps its
    # state, which is stored where it is to go to another slot.
    target = slot_or(source, row, write_slots, write_stride, null_slot, slot_count)
    return target, (target >= 0) & ((count > 0) | (target != source))


@triton.jit
def load_flag(row, flags, flags_stride):
    # Whether a row's flag is set; without flags (stride -1) none is.
    return tl.load(flags + row.to(tl.int64) * flags_stride, flags_stride >= 0, other=0) != 0


@triton.jit
def offset_ptr(pointer, offset, ALIGNED: tl.constexpr):
    pointer += offset
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def channel_ptrs(pointer, channels, stride):
    # Pointers to channels. Stride None: they are contiguous, and the first one is at a multiple of 16 bytes.
    if stride is None:
        return offset_ptr(pointer, channels, True)
    else:
        return pointer + channels.to(tl.int64) * stride


@triton.jit
def tile_ptrs(pointer, i, i_stride, j, ALIGNED: tl.constexpr):
    # Pointers to entries j of rows i. ALIGNED: rows start at multiples of 16 bytes.
    pointers = pointer + i.to(tl.int64)[:, None] * i_stride + j[None, :]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


def slots_of(cache: Tensor | None) -> int:
    """Return the `slot_count` that a kernel gets: how many slots the cache has; without one any slot does no harm."""
    return 2**31 - 1 if cache is None else cache.shape[0]


def or_placeholder(tensor: Tensor | None, like: Tensor, dtype: tl.dtype) -> tuple[Any, int]:
    """Return what a kernel gets for a tensor that callers may leave out: it, and the stride of its first dimension.

    None would be another variant of the kernel, to compile and to load. Instead it gets the address of `like`, as if of
    numbers of the usual `dtype`, and the stride -1, which tells it to read nothing there.
    """
    return (triton.reinterpret(like, dtype), -1) if tensor is None else (tensor, tensor.stride(0))


def options(**launch: Any) -> dict[str, Any]:
    """Return the options of a launch: products are fused with sums, which Triton does not do unasked from 3.10 on."""
    return {**launch, "enable_fp_fusion": True}


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient, rounded up; `triton.cdiv` is meant for kernels and takes microseconds."""
    return -(-numerator // denominator)


_NO_SWITCH = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a launch goes to the tensor's device; with one device there is nothing to switch."""
    if tensor.get_device() < 0 or not _has_several(tensor.device.type):
        return _NO_SWITCH
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(tensor.device).device(tensor.device)
    return context


@functools.cache
def _has_several(device_type: str) -> bool:
    return bool(torch.get_device_module(device_type).device_count() > 1)
