"""What several Triton kernels and their launchers share."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def by_token(tensor: Tensor, flat: bool) -> Tensor:
    """An activation as (tokens, ...), dense within a token: itself, a view of it or else a copy."""
    return dense(tensor if flat else tensor.flatten(0, 1))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context in which a launch goes to the tensor's device; on the CPU, interpreted, there is but one."""
    if tensor.get_device() < 0:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(tensor.device).device(tensor.device)
    return context
