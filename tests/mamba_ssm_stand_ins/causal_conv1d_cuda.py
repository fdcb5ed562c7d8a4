"""A stand-in for causal_conv1d's extension module `causal_conv1d_cuda`, on CPU tensors.

It is not causal_conv1d's kernel: it has the signatures of two of its functions, holds the arguments to what the sources
of 1.6.1 ask of them, and computes in a loop of its own.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert x.dtype in FLOATS
    assert weight.dtype in FLOATS
    assert x.dim() == 3
    assert weight.shape[0] == x.shape[1]
    assert 2 <= weight.shape[1] <= 4
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == (x.shape[1],) and bias.stride(0) == 1)


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """One output of every channel from the last inputs (dim, width)."""
    y = (window.float() * weight.float()).sum(1)
    y = y if bias is None else y + bias.float()
    return y / (1 + torch.exp(-y)) if silu else y


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    out: Tensor,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> None:
    _check(x, weight, bias)
    batch, dim, length = x.shape
    history = weight.shape[1] - 1
    assert seq_idx is None
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    for tensor in (x, out):  # the kernel for channels side by side, which alone knows states
        assert tensor.stride(1) == 1
        assert tensor.stride(2) > 1
        assert tensor.stride(2) % 8 == tensor.stride(0) % 8 == tensor.data_ptr() % 16 == 0
    assert dim % 8 == 0
    for states in (initial_states, final_states_out):
        assert states is None or (states.dtype == x.dtype and states.shape == (batch, dim, history))
        assert states is None or states.stride(1) == 1
    for row in range(batch):
        past = x.new_zeros(dim, history) if initial_states is None else initial_states[row]
        inputs = torch.cat([past, x[row]], dim=1)
        for t in range(length):
            out[row, :, t] = _convolve(inputs[:, t : t + history + 1], weight, bias, silu_activation)
        if final_states_out is not None:
            final_states_out[row] = inputs[:, length:]


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    _check(x, weight, bias)
    batch, dim, length = x.shape
    history, kept = weight.shape[1] - 1, conv_state.shape[2]
    assert cache_seqlens is None
    assert out.dtype == conv_state.dtype == x.dtype
    assert out.shape == x.shape
    assert conv_state.shape[1] == dim
    assert kept >= history
    if conv_state_indices is None:
        assert conv_state.shape[0] == batch
    else:
        assert conv_state_indices.dtype == torch.int32
        assert conv_state_indices.shape == (batch,)
        assert conv_state_indices.stride(0) == 1
    for row in range(batch):
        slot = row if conv_state_indices is None else int(conv_state_indices[row])
        if slot < 0:
            out[row] = 0
            continue
        inputs = torch.cat([conv_state[slot], x[row]], dim=1)  # the window is at the end of what is kept
        for t in range(length):
            first = kept - history + t
            out[row, :, t] = _convolve(inputs[:, first : first + history + 1], weight, bias, silu_activation)
        conv_state[slot] = inputs[:, length:]
