"""Tensors in the layouts that kernels read: dense within a token, or within an entry of their first dimension.

A channel-major activation (tokens contiguous, as in mamba_ssm's layers) is copied in tiles, which reads and writes
whole cache lines: torch's own copy of it takes several times as long.
"""

import torch
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import cdiv, kernel, on_device_of, options

NARROW = 16  # channels, at most: such a tensor is small, and torch's own copy takes the host less time
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # dtypes that are copied as: fewer variants than dtypes


@kernel(first_number="tokens")
def _transpose(
    source,  # tokens contiguous
    target,  # channels contiguous
    tokens,  # of a row
    channels,
    source_row: tl.int64,
    source_channel: tl.int64,
    target_row: tl.int64,
    target_token: tl.int64,
    aligned,  # 0 or 1: every token's channels, and every channel's tokens, start at multiples of 16 bytes
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    across = tl.cdiv(channels, BLOCK)
    blocks = tl.cdiv(tokens, BLOCK) * across
    row = (program // blocks).to(tl.int64)
    token = program % blocks // across * BLOCK
    channel = program % across * BLOCK
    source += row * source_row + token + channel.to(tl.int64) * source_channel
    target += row * target_row + token.to(tl.int64) * target_token + channel
    i = tl.arange(0, BLOCK)[:, None]  # tokens
    j = tl.arange(0, BLOCK)[None, :]  # channels
    of_source = source + i + j.to(tl.int64) * source_channel
    to_target = target + i.to(tl.int64) * target_token + j
    if (aligned != 0) & (token + BLOCK <= tokens) & (channel + BLOCK <= channels):
        # No mask: then a thread reads and writes 16 bytes in one access.
        tl.store(tl.multiple_of(to_target, (1, 16)), tl.load(tl.multiple_of(of_source, (16, 1))))
    else:
        there = (token + i < tokens) & (channel + j < channels)
        tl.store(to_target, tl.load(of_source, there), there)


def is_dense(tensor: Tensor) -> bool:
    """Whether everything but the first dimension is laid out as in a contiguous tensor."""
    if tensor.is_contiguous():
        return True
    shape, stride, dense = tensor.shape, tensor.stride(), 1
    for axis in range(len(shape) - 1, 0, -1):
        if stride[axis] != dense and shape[axis] != 1:
            return False
        dense *= shape[axis]
    return True


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where it is dense within an entry of its first dimension, else a copy."""
    return tensor if is_dense(tensor) else tensor.contiguous()


def as_float32(operand: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """What kernels multiply in a dtype: in float32 where that is the dtype, whatever it was before, else as it is.

    A kernel that converts a factor of a float32 product keeps all of it in registers, and spills kilobytes of it.
    """
    return [tensor.float() for tensor in tensors] if operand == torch.float32 else list(tensors)


def by_channel(tensor: Tensor, flat: bool) -> Tensor:
    """An activation `(tokens, ...)` if flat, else `(rows, tokens, ...)`: itself where its last dimension is contiguous,
    else a copy.
    """
    if tensor.stride(-1) == 1:
        return tensor
    if (lying := _by_tokens(tensor, flat)) is None:
        return tensor.contiguous()
    copy = tensor.new_empty(tensor.shape)
    _copy(lying, copy.view(lying.shape))
    return copy


def by_token(tensor: Tensor, flat: bool) -> Tensor:
    """The same as `(tokens, ...)`, dense within a token: itself, a view of it or else a copy."""
    tensor = by_channel(tensor, flat)
    return dense(tensor if flat else tensor.flatten(0, 1))


def write_back(written: Tensor, output: Tensor, flat: bool) -> None:
    """Copy what was written to the output, if it was written to a copy of it."""
    if written.data_ptr() == output.data_ptr():
        return
    written = written.view(output.shape)
    if (lying := _by_tokens(output, flat)) is None:
        output.copy_(written)
    else:
        _copy(written.view(lying.shape).transpose(1, 2), lying.transpose(1, 2))


def _by_tokens(tensor: Tensor, flat: bool) -> Tensor | None:
    """An activation as `(rows, tokens, channels)` if its tokens lie together, its many channels at one distance."""
    rows, tokens = (1, tensor.shape[0]) if flat else tensor.shape[:2]
    if tensor.stride(0 if flat else 1) != 1 or tokens == 1 or tensor.numel() <= rows * tokens * NARROW:
        return None
    try:
        return tensor.view(rows, tokens, -1)
    except RuntimeError:  # channels at several distances
        return None


def _copy(source: Tensor, target: Tensor) -> None:
    rows, tokens, channels = source.shape
    bits = _BITS[source.itemsize]
    source, target = source.view(bits), target.view(bits)
    starts = source.data_ptr() | target.data_ptr()
    for stride in (source.stride(0), source.stride(2), target.stride(0), target.stride(1)):
        starts |= stride * source.itemsize
    block = 64
    with on_device_of(source):
        _transpose[(rows * cdiv(tokens, block) * cdiv(channels, block),)](
            source,
            target,
            tokens,
            channels,
            source.stride(0),
            source.stride(2),
            target.stride(0),
            target.stride(1),
            int(starts % 16 == 0),
            BLOCK=block,
            **options(num_warps=4),
        )
