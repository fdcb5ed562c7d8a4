"""The gradients of a depthwise causal convolution, in one launch and one sum.

A program walks over a segment of a sequence with a block of channels: it recomputes what stands before silu from the
inputs, whose last few it carries along, and carries the last few gradients, which are all that the gradient of an input
depends on. Its share of the weights' gradients goes to a row of its own, so that the sum over them has a fixed order.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import cdiv, kernel, offset_ptr, on_device_of, options, row_tokens, within
from mamba_ops.ops._triton.layout import by_channel
from mamba_ops.ops._triton.sums import add_up, clear

if TYPE_CHECKING:
    from mamba_ops.ops.causal_conv1d.training import BackwardArguments

_SEGMENT = 128  # tokens of a program
_UNROLL = 8  # tokens whose loads are under way together
_CHANNELS = 64  # that a warp owns: 4 bytes of bfloat16 a thread


@kernel(first_number="sequences", static="shares_ptr grad_x_ptr grad_initial_ptr")
def _gradients(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,  # None: no bias
    cu_seqlens_ptr,  # None: every sequence has `length` tokens
    initial_ptr,  # this and the next two: (sequences, DIM, WIDTH - 1), or None
    grad_final_ptr,
    grad_initial_ptr,
    grad_x_ptr,
    shares_ptr,  # out: (segments, WIDTH + 1, DIM): of the weights' gradients, and of the bias's
    sequences,  # None without cu_seqlens
    length,  # tokens of every sequence; with cu_seqlens, of all
    grad_row: tl.int64,
    grad_token: tl.int64,
    x_row: tl.int64,
    x_token: tl.int64,
    out_row: tl.int64,  # of grad_x, which is dense
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,  # all tokens start at multiples of 16 bytes
    SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HISTORY: tl.constexpr = WIDTH - 1
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    segment = program // BLOCKS
    channels = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = channels < DIM
    shares_ptr += segment.to(tl.int64) * ((WIDTH + 1) * DIM)

    taps: tl.tuple = ()
    for k in tl.static_range(WIDTH):
        taps += (tl.load(weight_ptr + channels * WIDTH + k, mask=inside, other=0.0).to(tl.float32),)
    bias = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)

    if cu_seqlens_ptr is None:
        segments = tl.maximum(tl.cdiv(length, SEGMENT), 1)
        row = (segment // segments).to(tl.int64)
        begin = segment % segments * SEGMENT
        first = row
        tokens = length
    else:
        # As tiles are numbered in the forward; an empty sequence has a number too.
        row = 0
        above = sequences
        while above - row > 1:
            middle = (row + above) // 2
            if within(tl.load(cu_seqlens_ptr + middle), length) // SEGMENT + middle <= segment:
                row = middle
            else:
                above = middle
        first, tokens = row_tokens(row, cu_seqlens_ptr, length)
        begin = (segment - (first // SEGMENT).to(tl.int32) - row) * SEGMENT
        row = row.to(tl.int64)
    if (begin < 0) | ((begin >= tokens) & (begin > 0)):
        for k in tl.static_range(WIDTH + 1):
            tl.store(shares_ptr + k * DIM + channels, tl.zeros([BLOCK], tl.float32), mask=inside)
        return
    end = tl.minimum(begin + SEGMENT, tokens)
    grad_ptr += first * grad_row
    x_ptr += first * x_row
    grad_x_ptr += first * out_row
    of_row = (row * DIM + channels) * HISTORY

    # The inputs before the segment; gradients of tokens before it matter to none of its inputs.
    window: tl.tuple = ()
    later: tl.tuple = ()
    for k in tl.static_range(HISTORY):
        token = begin + (k - HISTORY)
        known = tl.load(offset_ptr(x_ptr + token * x_token, channels, ALIGNED), mask=inside & (token >= 0), other=0.0)
        known = known.to(tl.float32)
        if initial_ptr is not None:
            known += tl.load(initial_ptr + of_row + k, mask=inside & (begin == 0), other=0.0).to(tl.float32)
        window += (known,)
        later += (tl.zeros([BLOCK], tl.float32),)
    shares: tl.tuple = ()
    for _ in tl.static_range(WIDTH + 1):
        shares += (tl.zeros([BLOCK], tl.float32),)

    for start in range(begin, end + HISTORY, UNROLL):
        inputs: tl.tuple = ()
        grads: tl.tuple = ()
        for u in tl.static_range(UNROLL):
            token = start + u
            valid = inside & (token < tokens) & (token < end + HISTORY)
            inputs += (tl.load(offset_ptr(x_ptr + token * x_token, channels, ALIGNED), mask=valid, other=0.0),)
            grads += (tl.load(offset_ptr(grad_ptr + token * grad_token, channels, ALIGNED), mask=valid, other=0.0),)
        for u in tl.static_range(UNROLL):
            token = start + u
            window += (inputs[u].to(tl.float32),)
            grad = grads[u].to(tl.float32)
            if SILU:
                before = bias
                for k in tl.static_range(WIDTH):
                    before += window[k] * taps[k]
                opened = tl.sigmoid(before)
                grad *= opened * (1.0 + before * (1.0 - opened))
            own = tl.where(token < end, grad, 0.0)
            summed: tl.tuple = ()
            for k in tl.static_range(WIDTH):
                summed += (shares[k] + own * window[k],)
            shares = summed + (shares[WIDTH] + own,)  # noqa: RUF005  Triton has no unpacking
            window = window[1:]

            # The oldest entry of this token's window is done: no later token reads it.
            later += (grad,)
            total = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(WIDTH):
                total += taps[HISTORY - k] * later[k]
            later = later[1:]
            if grad_final_ptr is not None:
                past = token - tokens
                kept = inside & (past >= 0) & (past < HISTORY)
                total += tl.load(grad_final_ptr + of_row + past, mask=kept, other=0.0).to(tl.float32)
            entry = token - HISTORY
            target = offset_ptr(grad_x_ptr + entry.to(tl.int64) * DIM, channels, ALIGNED)
            tl.store(target, total, mask=inside & (entry >= begin) & (entry < end))
            if grad_initial_ptr is not None:
                tl.store(grad_initial_ptr + of_row + token, total, mask=inside & (token < HISTORY))

    for k in tl.static_range(WIDTH + 1):
        tl.store(shares_ptr + k * DIM + channels, shares[k], mask=inside)


def causal_conv1d_backward(call: "BackwardArguments") -> None:
    """Write the gradients; the arguments are those of the op.

    An x or grad_output whose channels are not contiguous is copied first. Where tokens do not start at multiples of 16
    bytes, reads are narrow and slow.
    """
    flat = call.cu_seqlens is not None
    dim, width = call.weight.shape
    sequences = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    if flat:
        clear(call.grad_x)  # tokens that are in no sequence
    if sequences == 0 or dim == 0:
        clear(call.grad_weight)
        clear(call.grad_bias)
        return
    x, grad = by_channel(call.x, flat), by_channel(call.grad_output, flat)
    strides = (grad.stride(0), grad.stride(-2), x.stride(0), x.stride(-2))
    sizes = (grad.itemsize, grad.itemsize, x.itemsize, x.itemsize, call.grad_x.itemsize)
    starts = grad.data_ptr() | x.data_ptr() | call.grad_x.data_ptr()
    for stride, size in zip((*strides, dim), sizes, strict=True):
        starts |= stride * size
    if call.cu_seqlens is None:
        segments = sequences * max(cdiv(x.shape[1], _SEGMENT), 1)
    else:
        segments = x.shape[0] // _SEGMENT + sequences  # at most: how many there are, the device knows
    shares = x.new_empty(segments, width + 1, dim, dtype=torch.float32)
    has_initial = call.initial_states is not None
    initial, final = (None if t is None else t.contiguous() for t in (call.initial_states, call.grad_final_states))
    block = min(256, triton.next_power_of_2(dim))
    with on_device_of(x):
        _gradients[(segments * cdiv(dim, block),)](
            grad,
            x,
            call.weight.contiguous(),
            None if call.bias is None else call.bias.contiguous(),
            None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
            initial,
            final,
            call.grad_initial_states if has_initial else None,
            call.grad_x,
            shares,
            sequences if flat else None,
            x.shape[0] if flat else x.shape[1],
            *strides,
            call.grad_x.stride(0),
            DIM=dim,
            WIDTH=width,
            SILU=call.silu,
            ALIGNED=starts % 16 == 0,
            SEGMENT=_SEGMENT,
            UNROLL=_UNROLL,
            BLOCK=block,
            **options(num_warps=max(block // _CHANNELS, 1)),
        )
    add_up(shares[:, :width], call.grad_weight.t())
    if call.bias is not None:
        add_up(shares[:, width], call.grad_bias)
