"""Groups of channels over the root of their mean square, with a residual and a gate: one launch, one pass.

A program has a block of rows, each whole, in registers: long rows one by one, short ones several together. A row here
is a group of channels of one token, so that no two programs share one.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import cdiv, kernel, on_device_of, silu
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_channel, write_back

if TYPE_CHECKING:
    from mamba_ops.ops.rms_norm.op import Arguments


@triton.jit
def _entries(pointer, row_starts, channels, ALIGNED: tl.constexpr):
    # Pointers to the channels of rows.
    pointers = pointer + row_starts[:, None] + channels[None, :]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def _opened(gate, BITS: tl.constexpr, SIGMOID: tl.constexpr):
    # The gate's activation; `silu` says why not always exactly.
    if SIGMOID:
        if BITS > 16:
            return tl.sigmoid(gate)
        else:
            root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))  # log2(e)
            return root * root
    else:
        return silu(gate, BITS)


@triton.jit
def _normalise(
    x_ptr,
    gate_ptr,
    residual_ptr,
    total_ptr,
    weight_ptr,
    output_ptr,
    rows,
    inner,
    weight_inner,
    x_outer,
    x_inner,
    gate_outer,
    gate_inner,
    residual_outer,
    residual_inner,
    total_outer,
    total_inner,
    output_outer,
    output_inner,
    eps,
    SIZE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channels = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (channels < SIZE)[None, :]
    outer = (row // inner).to(tl.int64)
    part = (row % inner).to(tl.int64)
    BITS: tl.constexpr = output_ptr.dtype.element_ty.primitive_bitwidth

    # All that is read is asked for before anything waits for it.
    h = tl.load(_entries(x_ptr, outer * x_outer + part * x_inner, channels, ALIGNED), there, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(_entries(gate_ptr, outer * gate_outer + part * gate_inner, channels, ALIGNED), there, other=0.0)
    if residual_ptr is not None:
        starts = outer * residual_outer + part * residual_inner
        residual = tl.load(_entries(residual_ptr, starts, channels, ALIGNED), there, other=0.0)
    if weight_ptr is not None:
        weight = tl.load(_entries(weight_ptr, part * weight_inner, channels, ALIGNED), there, other=0.0)

    h = h.to(tl.float32)
    if residual_ptr is not None:
        h += residual.to(tl.float32)
    if total_ptr is not None:
        tl.store(_entries(total_ptr, outer * total_outer + part * total_inner, channels, ALIGNED), h, there)
    if gate_ptr is not None:
        if not NORM_FIRST:
            h *= _opened(gate.to(tl.float32), BITS, SIGMOID)
    mean = tl.sum(h * h, axis=1) / SIZE
    h *= (1.0 / tl.sqrt(mean + eps))[:, None]
    if weight_ptr is not None:
        h *= weight.to(tl.float32)
    if gate_ptr is not None:
        if NORM_FIRST:
            h *= _opened(gate.to(tl.float32), BITS, SIGMOID)
    tl.store(_entries(output_ptr, outer * output_outer + part * output_inner, channels, ALIGNED), h, there)


@kernel(first_number="rows")
def _kernel(
    x_ptr,
    gate_ptr,  # None: there is none, like the next three
    residual_ptr,
    total_ptr,
    weight_ptr,
    output_ptr,
    rows,  # groups of channels of all tokens
    inner,  # row i is the part i % inner of the entry i // inner: a group of its channels, or a head
    aligned,  # 0 or 1: every row of every tensor, and of the weight, starts at a multiple of 16 bytes
    weight_inner: tl.int64,
    x_outer: tl.int64,
    x_inner: tl.int64,
    gate_outer: tl.int64,
    gate_inner: tl.int64,
    residual_outer: tl.int64,
    residual_inner: tl.int64,
    total_outer: tl.int64,
    total_inner: tl.int64,
    output_outer: tl.int64,
    output_inner: tl.int64,
    eps,
    SIZE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if aligned != 0:  # accesses of 16 bytes; one kernel for both, so that a warm-up misses neither
        _normalise(
            x_ptr, gate_ptr, residual_ptr, total_ptr, weight_ptr, output_ptr, rows, inner, weight_inner,
            x_outer, x_inner, gate_outer, gate_inner, residual_outer, residual_inner, total_outer, total_inner,
            output_outer, output_inner, eps, SIZE, NORM_FIRST, SIGMOID, BLOCK_ROWS, BLOCK, True,
        )  # fmt: skip
    else:
        _normalise(
            x_ptr, gate_ptr, residual_ptr, total_ptr, weight_ptr, output_ptr, rows, inner, weight_inner,
            x_outer, x_inner, gate_outer, gate_inner, residual_outer, residual_inner, total_outer, total_inner,
            output_outer, output_inner, eps, SIZE, NORM_FIRST, SIGMOID, BLOCK_ROWS, BLOCK, False,
        )  # fmt: skip


def rms_norm(call: "Arguments") -> None:
    """Write `output`, and `total` where there is one; the arguments are those of the op.

    Fast where channels are contiguous and every token's start at a multiple of 16 bytes; else accesses are narrow. A
    tensor whose channels are not contiguous is copied first, or written through a copy, and so are all where tokens lie
    at more than two distances (one, with several groups). A weight that is not contiguous is copied, too.
    """
    if call.x.numel() == 0:
        return
    size = call.x.shape[-1] // call.groups
    given = (call.x, call.gate, call.residual, call.total, call.output)
    tensors = [t if t is None or t.stride(-1) == 1 else _by_channel(t) for t in given]
    if (levels := _levels(tensors, call.groups)) is None:
        tensors = [None if t is None else t.contiguous() for t in tensors]
        levels = _levels(tensors, call.groups)
        assert levels is not None  # contiguous tensors have one
    (outer, inner), strides = levels
    x, gate, residual, total, written = tensors
    weight = None if call.weight is None else call.weight.contiguous()
    weight_inner = size if call.groups > 1 else 0

    starts = 0 if weight is None else weight.data_ptr() | weight_inner * weight.element_size()
    for t, (by_outer, by_inner) in zip(tensors, strides, strict=True):
        if t is not None:
            starts |= t.data_ptr() | (by_outer | by_inner) * t.element_size()
    launch = _launches(call.x.get_device(), size)["_kernel"]
    with on_device_of(call.x):
        _kernel[(cdiv(outer * inner, launch["BLOCK_ROWS"]),)](
            x,
            gate,
            residual,
            total,
            weight,
            written,
            outer * inner,
            inner,
            int(starts % 16 == 0),
            weight_inner,
            *(stride for of_tensor in strides for stride in of_tensor),
            call.eps,
            size,
            call.norm_before_gate,
            call.sigmoid_gate,
            **launch,
        )
    for t, asked in ((total, call.total), (written, call.output)):
        if t is not None and asked is not None and t.data_ptr() != asked.data_ptr():
            _copy_back(t, asked)


def _by_channel(tensor: Tensor) -> Tensor:
    """The same with its channels contiguous: a copy, in tiles where its tokens lie together."""
    return by_channel(tensor, tensor.dim() == 2) if tensor.dim() in (2, 3) else tensor.contiguous()


def _copy_back(written: Tensor, output: Tensor) -> None:
    """Copy what was written to the output, as it was written to a copy of it."""
    if output.dim() in (2, 3):
        write_back(written, output, output.dim() == 2)
    else:
        output.copy_(written)


Strides = list[tuple[int, int]]


def _levels(tensors: list[Tensor | None], groups: int) -> tuple[tuple[int, int], Strides] | None:
    """Return two numbers of rows, one within the other, and each tensor's strides by them; None if it takes more."""
    size = next(t.shape for t in tensors if t is not None)
    present = [t for t in tensors if t is not None]
    counts: list[int] = []
    strides: list[list[int]] = []  # by level, of each tensor that there is
    for axis, count in enumerate(size[:-1]):
        if count == 1:
            continue
        here = [t.stride(axis) for t in present]
        if counts and all(before == now * count for before, now in zip(strides[-1], here, strict=True)):
            counts[-1] *= count
            strides[-1] = here
        else:
            counts.append(count)
            strides.append(here)
    if groups > 1:
        counts.append(groups)
        strides.append([size[-1] // groups] * len(present))
        if len(counts) == 1:
            counts, strides = [1, *counts], [[0] * len(present), *strides]
    while len(counts) < 2:
        counts.append(1)
        strides.append([0] * len(present))
    if len(counts) > 2:
        return None
    of_present = iter(zip(*strides, strict=True))
    return (counts[0], counts[1]), [(0, 0) if t is None else next(of_present) for t in tensors]


@tunable_launch(_kernel="BLOCK_ROWS num_warps")
def _launches(size: int) -> Launches:
    """Sixteen channels a thread, twice 16 bytes of 16-bit numbers, and more of the longest rows; short rows together.

    Half as many a thread took 34.4 us for 30.8 on an H200, of 4096 rows of 4096 channels with a gate.
    """
    block = max(triton.next_power_of_2(size), 16)
    rows = max(1024 // block, 1)
    return {"_kernel": {"BLOCK_ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 1), 16)}}
