"""Advance a depthwise causal convolution by one or a few tokens a row, in one launch.

One program owns a row and a block of channels for all tokens of that row: it reads the window once, keeps it in
registers while it walks over the tokens, and writes the cache back itself, so no two programs touch the same state.
"""

from typing import TYPE_CHECKING

import triton.language as tl

from mamba_ops.ops._triton.common import (
    cdiv,
    channel_ptrs,
    kernel,
    load_slot,
    on_device_of,
    or_placeholder,
    row_tokens,
    slots_of,
)
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch

if TYPE_CHECKING:
    from mamba_ops.ops.causal_conv1d_update.op import Arguments


@kernel(first_number="length")
def _kernel(
    x_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,  # None: no bias
    slots_ptr,  # see `or_placeholder`
    cu_seqlens_ptr,  # None: every row has `length` tokens
    accepted_ptr,  # None: windows start at column 0
    output_ptr,
    length,  # None: one token a row; with cu_seqlens that of all rows together
    null_slot: tl.int64,
    slot_count: tl.int64,
    slots_stride: tl.int64,
    x_row: tl.int64,
    x_token: tl.int64,
    x_channel,  # None, and the other two with it: see channel_ptrs
    state_slot: tl.int64,
    state_column: tl.int64,
    state_channel,
    output_row: tl.int64,
    output_token: tl.int64,
    output_channel,
    DIM: tl.constexpr,
    STATE_LEN: tl.constexpr,
    WIDTH: tl.constexpr,
    NEWEST_LAST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HISTORY: tl.constexpr = STATE_LEN if NEWEST_LAST else WIDTH - 1
    OLDER: tl.constexpr = HISTORY + 1 - WIDTH  # columns that only move
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < DIM

    # First what waits for no index.
    taps: tl.tuple = ()
    for k in tl.static_range(WIDTH):
        taps += (tl.load(weight_ptr + channels * WIDTH + k, mask=inside).to(tl.float32),)
    bias = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=inside).to(tl.float32)

    first = row
    tokens = 1 if length is None else length
    if cu_seqlens_ptr is not None:
        first, tokens = row_tokens(row, cu_seqlens_ptr, length)
        if tokens <= 0:
            return
    x_ptr += first * x_row
    output_ptr += first * output_row

    slot = load_slot(row, slots_ptr, slots_stride, null_slot, slot_count)
    if slot < 0:
        for _ in range(tokens):
            tl.store(channel_ptrs(output_ptr, channels, output_channel), 0.0, mask=inside)
            output_ptr += output_token
        return
    state_ptr += slot * state_slot
    source_ptr = state_ptr
    if accepted_ptr is not None:
        oldest = tl.load(accepted_ptr + row).to(tl.int64) - 1
        source_ptr += tl.minimum(tl.maximum(oldest, 0), STATE_LEN - HISTORY) * state_column

    window: tl.tuple = ()
    for _ in tl.static_range(HISTORY):
        window += (tl.load(channel_ptrs(source_ptr, channels, state_channel), mask=inside).to(tl.float32),)
        source_ptr += state_column

    # The thread that stores a column need not be the one that loaded it: the whole window first.
    tl.debug_barrier()
    if accepted_ptr is not None:
        for k in tl.static_range(1, HISTORY):
            tl.store(channel_ptrs(state_ptr, channels, state_channel), window[k], mask=inside)
            state_ptr += state_column

    column = HISTORY - 1
    for _ in range(tokens):
        newest = tl.load(channel_ptrs(x_ptr, channels, x_channel), mask=inside).to(tl.float32)
        window += (newest,)
        acc = bias
        for k in tl.static_range(WIDTH):
            acc += window[OLDER + k] * taps[k]
        if SILU:
            acc *= tl.sigmoid(acc)
        tl.store(channel_ptrs(output_ptr, channels, output_channel), acc, mask=inside)
        if accepted_ptr is not None:
            tl.store(channel_ptrs(state_ptr, channels, state_channel), newest, mask=inside & (column < STATE_LEN))
            state_ptr += state_column
            column += 1
        window = window[1:]
        x_ptr += x_token
        output_ptr += output_token

    if accepted_ptr is None:
        for k in tl.static_range(HISTORY):
            tl.store(channel_ptrs(state_ptr, channels, state_channel), window[k], mask=inside)
            state_ptr += state_column


def causal_conv1d_update(call: "Arguments") -> None:
    """Write `output` and advance `conv_state` in place; the arguments are those of the op.

    Fast where the channels of `x`, `conv_state` and `output` are contiguous and start at multiples of 16 bytes; any
    other strides take a slower variant. The other arguments but `slots` are copied first if they are not contiguous.
    """
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    if rows == 0 or call.x.numel() == 0:
        return
    dim, width = call.weight.shape
    x_row, x_token, x_channel = call.x.stride(0), call.x.stride(-2), call.x.stride(-1)
    state_slot, state_channel, state_column = call.conv_state.stride()
    output_row, output_token, output_channel = call.output.stride(0), call.output.stride(-2), call.output.stride(-1)
    starts = (
        (call.x.data_ptr() | call.conv_state.data_ptr() | call.output.data_ptr())
        | (x_row | x_token) * call.x.element_size()
        | (state_slot | state_column) * call.conv_state.element_size()
        | (output_row | output_token) * call.output.element_size()
    )
    aligned = x_channel == state_channel == output_channel == 1 and starts % 16 == 0
    slots, slots_stride = or_placeholder(call.slots, call.x, tl.int32)
    launch = _launches(call.x.get_device(), dim, width)["_kernel"]
    with on_device_of(call.x):
        _kernel[rows, cdiv(dim, launch["BLOCK"])](
            call.x,
            call.conv_state,
            call.weight.contiguous(),
            None if call.bias is None else call.bias.contiguous(),
            slots,
            None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
            None if call.num_accepted_tokens is None else call.num_accepted_tokens.contiguous(),
            call.output,
            call.x.shape[1] if call.x.dim() == 3 else None if call.cu_seqlens is None else call.x.shape[0],
            call.null_slot,
            slots_of(call.conv_state),
            slots_stride,
            x_row,
            x_token,
            None if aligned else x_channel,
            state_slot,
            state_column,
            None if aligned else state_channel,
            output_row,
            output_token,
            None if aligned else output_channel,
            dim,
            call.conv_state.shape[2],
            width,
            call.newest_last,
            call.silu,
            **launch,
        )


@tunable_launch(_kernel="BLOCK num_warps")
def _launches(dim: int, width: int) -> Launches:
    """Two channels a thread."""
    return {"_kernel": {"BLOCK": 256, "num_warps": 4}}
