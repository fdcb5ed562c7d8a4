"""What the mixers of mamba_ssm keep between calls, and what they share."""

import math
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mamba_ops.compat.arguments import only
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_varlen_states


class Packing(TypedDict):
    """How packed sequences are told of."""

    seq_idx: Tensor | None
    cu_seqlens: Tensor | None


Step = tuple[Tensor, Tensor, Tensor]
"""Output, and both states."""


class HasCaches(Protocol):
    """What mixers ask of mamba_ssm's InferenceParams."""

    seqlen_offset: int
    batch_size_offset: int
    key_value_memory_dict: dict[int, Any]


class WithCaches(nn.Module):
    """States by layer index: the last d_conv inputs `(batch, channels, d_conv)`, and the scan's."""

    layer_idx: int | None
    conv1d: nn.Conv1d
    _channels_last = True  # of the convolution's state, in memory

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return new states of zeros, of `dtype`, or of the weights'."""
        weight = self.conv1d.weight
        new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype if dtype is None else dtype}
        sizes = (self.conv1d.kernel_size[0], weight.shape[0])
        conv_state = torch.zeros(batch_size, *(sizes if self._channels_last else sizes[::-1]), **new)
        if self._channels_last:
            conv_state = conv_state.transpose(1, 2)
        return conv_state, torch.zeros(batch_size, *self._state_shape(), **new)

    def _state_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _get_states_from_cache(
        self, inference_params: HasCaches, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        conv_state, ssm_state = states_of(self, inference_params, batch_size, initialize_states)
        return conv_state, ssm_state

    def continues_cache(self, inference_params: HasCaches | None) -> bool:
        return inference_params is not None and inference_params.seqlen_offset > 0


def states_of(
    mixer: Any, inference_params: HasCaches, batch_size: int, initialize_states: bool = False
) -> tuple[Tensor, ...]:
    """Return a mixer's states of a batch, made where there are none yet; zero, if they are to be initialised."""
    name = type(mixer).__name__
    if mixer.layer_idx is None:
        expected = "the number of the layer, under which it finds its states in inference_params"
        raise ValueError(f"{name}: layer_idx: got None, expected {expected}")
    caches = inference_params.key_value_memory_dict
    if mixer.layer_idx not in caches:
        caches[mixer.layer_idx] = mixer.allocate_inference_cache(batch_size, 0)
    begin = inference_params.batch_size_offset
    states = tuple(state[begin : begin + batch_size] for state in caches[mixer.layer_idx])
    if states[0].shape[0] != batch_size:
        raise ValueError(
            f"{name}: inference_params: got states of {states[0].shape[0]} rows in layer {mixer.layer_idx}, expected "
            f"at least {batch_size}; make new ones for a larger batch"
        )
    for state in states if initialize_states else ():
        state.zero_()
    return states


def step_sizes(count: int, low: float, high: float, floor: float, **new: Any) -> Tensor:
    """Return biases whose softplus is spread over the logarithms of low to high."""
    dt = torch.exp(torch.rand(count, **new) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def depthwise(channels: int, width: int, bias: bool, **new: Any) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, **new)


def not_decayed(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as one that optimizers do not decay."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def convolve(conv: nn.Conv1d, x: Tensor, conv_state: Tensor | None, continues: bool, packed: Packing) -> Tensor:
    """Convolve `(batch, channels, length)`, after what `conv_state` holds if it `continues`; keep the last inputs."""
    weight, width = conv.weight.squeeze(1), conv.kernel_size[0]
    past = conv_state[..., 1:].to(x.dtype) if conv_state is not None and continues else None
    out = only(causal_conv1d_fn(x, weight, conv.bias, initial_states=past, activation="silu", **packed))
    if conv_state is None:
        return out
    with torch.no_grad():
        if (cu_seqlens := packed["cu_seqlens"]) is not None:
            last = causal_conv1d_varlen_states(x.squeeze(0).t(), cu_seqlens, width)
        else:
            last = pad(x, (width, 0)) if past is None else torch.cat((conv_state.to(x.dtype), x), dim=-1)
            last = last[..., -width:]
            if (seq_idx := packed["seq_idx"]) is not None:
                number = pad(seq_idx, (width, 0), value=-1)[:, -width:]
                last = last * (number == number[:, -1:]).unsqueeze(1)
        conv_state.copy_(last)
    return out


def one_token(mixer: nn.Module, hidden_states: Tensor) -> Tensor:
    if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
        expected = "(batch, 1, d_model): one token; forward continues with several"
        name = type(mixer).__name__
        raise ValueError(f"{name}.step: hidden_states: got shape {tuple(hidden_states.shape)}, expected {expected}")
    return hidden_states.squeeze(1)
