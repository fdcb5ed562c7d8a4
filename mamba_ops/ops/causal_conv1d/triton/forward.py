"""A depthwise causal convolution over whole sequences, in one launch that asks the host about no length.

A program owns a tile: a few tokens of one sequence by a block of channels. It loads all of them, and those just before,
and then computes.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import (
    cdiv,
    channel_ptrs,
    kernel,
    load_flag,
    load_slot,
    offset_ptr,
    on_device_of,
    or_placeholder,
    slots_of,
)
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_channel, dense, write_back
from mamba_ops.ops._triton.limits import limits_of
from mamba_ops.ops.causal_conv1d.triton.runs import _runs
from mamba_ops.ops.causal_conv1d.triton.tiles import convolved, keep, load_bias, load_taps, tile_of

if TYPE_CHECKING:
    from mamba_ops.ops.causal_conv1d.op import Arguments

MORE_VARIANTS = {"_kernel": (3, "channels of the cache contiguous or not, where tokens are aligned")}
_CHANNELS = 128  # that a warp owns: 8 bytes of bfloat16 a thread


@kernel(first_number="sequences")
def _kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None: no bias
    cu_seqlens_ptr,  # None: every sequence has `length` tokens
    state_ptr,  # this and the next two: see `or_placeholder`
    slots_ptr,
    write_slots_ptr,
    initial_ptr,
    output_ptr,
    sequences,  # None without cu_seqlens
    length,  # with cu_seqlens that of all sequences together
    null_slot: tl.int64,
    slot_count: tl.int64,
    slots_stride: tl.int64,
    write_stride,
    initial_stride: tl.int64,
    x_row: tl.int64,
    x_token: tl.int64,
    state_slot: tl.int64,
    state_column: tl.int64,
    state_channel,  # None: 1, and all columns start at multiples of 16 bytes
    output_row: tl.int64,
    output_token: tl.int64,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,  # all tokens of x and the output start at multiples of 16 bytes
    BLOCK_T: tl.constexpr,  # tokens whose loads are under way together
    BLOCK: tl.constexpr,
):
    HISTORY: tl.constexpr = WIDTH - 1
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channels = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = (channels < DIM) | (DIM % BLOCK == 0)

    # First what waits for no index.
    taps = load_taps(weight_ptr, channels, inside, WIDTH)
    bias = load_bias(bias_ptr, channels, inside)

    row, first, tokens, tile = tile_of(program // BLOCKS, cu_seqlens_ptr, sequences, length, BLOCK_T)
    begin = tile * BLOCK_T
    # A sequence without tokens has a tile, too: its past may go to another slot.
    if (begin < 0) | (begin >= tl.maximum(tokens, 1)):
        return
    left = tokens - begin
    x_ptr += first * x_row
    output_ptr += first * output_row + begin * output_token

    carried = load_flag(row, initial_ptr, initial_stride)
    slot = load_slot(row, slots_ptr, slots_stride, null_slot, slot_count)
    if slot < 0:
        for t in range(BLOCK_T):
            tl.store(offset_ptr(output_ptr + t * output_token, channels, ALIGNED), 0.0, mask=inside & (t < left))
        return

    looks_back = (tile == 0) & (state_slot >= 0) & carried
    of_token = offset_ptr(x_ptr + (begin - HISTORY) * x_token, channels, ALIGNED)
    # Most tiles need no mask and no cache; apart from the others, they need fewer registers, too.
    if (tile > 0) & (left >= BLOCK_T):
        inputs = _load(of_token, x_token, inside, 0, HISTORY + BLOCK_T, HISTORY + BLOCK_T, ALIGNED)
        _store_outputs(inputs, taps, bias, output_ptr, output_token, channels, inside, BLOCK_T, SILU, ALIGNED)
    else:
        inputs = _load(of_token, x_token, inside, HISTORY - begin, HISTORY + left, HISTORY + BLOCK_T, ALIGNED)
        joined: tl.tuple = ()
        for k in tl.static_range(HISTORY):
            # Of both, the cache and x, one is zero.
            column = channel_ptrs(state_ptr + slot * state_slot + k * state_column, channels, state_channel)
            past = tl.load(column, mask=inside & looks_back, other=0.0).to(tl.float32)
            joined += (past + inputs[k].to(tl.float32),)
        joined += inputs[HISTORY:]
        _store_outputs(joined, taps, bias, output_ptr, output_token, channels, inside, left, SILU, ALIGNED)

    if tile == 0:
        keep(
            row,
            slot,
            tokens,
            looks_back,
            x_ptr,
            x_token,
            None if ALIGNED else 1,
            state_ptr,
            write_slots_ptr,
            write_stride,
            null_slot,
            slot_count,
            state_slot,
            state_column,
            state_channel,
            channels,
            inside,
            HISTORY,
        )


@triton.jit
def _load(pointer, stride, inside, first, end, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    # COUNT tokens from the pointer on, zero before the `first` and from the `end` on.
    loaded: tl.tuple = ()
    for t in tl.static_range(COUNT):
        # The last ones are read again, by the program of the next tile.
        mask = inside & (t >= first) & (t < end)
        loaded += (tl.load(pointer, mask=mask, other=0.0, eviction_policy="evict_last"),)
        pointer = offset_ptr(pointer, stride, ALIGNED)
    return loaded


@triton.jit
def _store_outputs(
    window, taps, bias, pointer, stride, channels, inside, count, SILU: tl.constexpr, ALIGNED: tl.constexpr
):
    # Store the first `count` outputs of a tile, from its inputs and those before them.
    WIDTH: tl.constexpr = len(taps)
    pointer = offset_ptr(pointer, channels, ALIGNED)
    for t in tl.static_range(len(window) + 1 - WIDTH):
        output = convolved(window[t : t + WIDTH], taps, bias, pointer.dtype.element_ty.primitive_bitwidth, SILU)
        tl.store(pointer, output, mask=inside & (t < count))
        pointer = offset_ptr(pointer, stride, ALIGNED)


def causal_conv1d(call: "Arguments") -> None:
    """Write `output` and the final `conv_state` in place; the arguments are those of the op.

    x and output may each have their channels or their tokens contiguous; any other x is copied first, as are parameters
    and cu_seqlens, and any other output is written through a copy. Where tokens (or, with contiguous tokens, channels)
    do not start at multiples of 16 bytes, accesses are narrow and slow. conv_state may have any layout.
    """
    flat = call.cu_seqlens is not None
    sequences = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    if sequences == 0 or (call.x.numel() == 0 and call.write_slots is None):
        return
    dim, width = call.weight.shape
    x, written = (t if t.stride(-2) == 1 else by_channel(t, flat) for t in (call.x, call.output))
    by_runs = x.stride(-1) != 1 or written.stride(-1) != 1
    is_aligned = all(_is_aligned(t, flat) for t in (x, written))
    state_slot, state_channel, state_column = (-1, 1, 0) if call.conv_state is None else call.conv_state.stride()

    slots, slots_stride = or_placeholder(call.slots, x, tl.int32)
    write_slots, write_stride = or_placeholder(
        None if call.write_slots is None else dense(call.write_slots), x, tl.int32
    )
    has_initial_state, initial_stride = or_placeholder(call.has_initial_state, x, tl.int1)

    launch = _launches(x.get_device(), dim, width, x.itemsize)["_runs" if by_runs else "_kernel"]
    if is_aligned and x.itemsize == 2 and width in (2, 4):  # others would spill: whole words, and taps in one, need few
        most = 80 if written.stride(-1) == 1 else 96 if flat else 112
        launch = launch | limits_of(x.get_device()).registers(most)
    if call.cu_seqlens is None:
        tiles = sequences * max(cdiv(x.shape[1], launch["BLOCK_T"]), 1)
    else:
        tiles = x.shape[0] // launch["BLOCK_T"] + sequences  # at most: how many there are, the device knows
    with on_device_of(x):
        (_runs if by_runs else _kernel)[(tiles * cdiv(dim, launch["BLOCK"]),)](
            x,
            _parameter(call.weight),
            None if call.bias is None else _parameter(call.bias),
            None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
            x if call.conv_state is None else call.conv_state,
            slots,
            write_slots,
            has_initial_state,
            written,
            None if call.cu_seqlens is None else sequences,
            x.shape[1] if call.cu_seqlens is None else x.shape[0],
            call.null_slot,
            slots_of(call.conv_state),
            slots_stride,
            write_stride,
            initial_stride,
            x.stride(0),
            *(_strides(x) if by_runs else (x.stride(-2),)),
            state_slot,
            state_column,
            state_channel if by_runs or not is_aligned or not _has_aligned_columns(call.conv_state) else None,
            written.stride(0),
            *(_strides(written) if by_runs else (written.stride(-2),)),
            dim,
            width,
            call.silu,
            is_aligned,
            **launch,
        )
    write_back(written, call.output, flat)


def _parameter(tensor: Tensor) -> Tensor:
    """A parameter, contiguous and at a multiple of 16 bytes, as several of its numbers are read in one access."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _strides(tensor: Tensor) -> tuple[int | None, int | None]:
    """Return the strides of an activation's tokens and channels, None for those that are contiguous."""
    token, channel = tensor.stride()[-2:]
    return (token, None) if channel == 1 else (None, channel)


def _is_aligned(tensor: Tensor, flat: bool) -> bool:
    """Whether an activation's tokens, or its channels where they are not contiguous, start at multiples of 16 bytes."""
    token, channel = tensor.stride()[-2:]
    starts = token if channel == 1 else channel
    if not flat:
        starts |= tensor.stride(0)
    return (tensor.data_ptr() | starts * tensor.element_size()) % 16 == 0


def _has_aligned_columns(conv_state: Tensor | None) -> bool:
    """Whether its channels are contiguous, and each column starts at a multiple of 16 bytes; true without a cache."""
    if conv_state is None:
        return True
    slot, channel, column = conv_state.stride()
    return channel == 1 and (conv_state.data_ptr() | (slot | column) * conv_state.element_size()) % 16 == 0


@tunable_launch(_kernel="BLOCK num_warps", _runs="BLOCK num_warps")
def _launches(dim: int, width: int, itemsize: int) -> Launches:
    """A tile has no fewer tokens than a window looks back."""
    padded = triton.next_power_of_2(dim)
    block, block_of_runs = min(padded, 256), min(padded, 32)
    return {
        "_kernel": {"BLOCK_T": 16, "BLOCK": block, "num_warps": max(block // _CHANNELS, 1)},
        "_runs": {"BLOCK_T": 64, "BLOCK": block_of_runs, "num_warps": max(block_of_runs * itemsize // 32, 1)},
    }
