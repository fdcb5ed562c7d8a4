"""The gradients of causal_conv1d: its companions for training, and their plain-torch backward."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.delta_rule_update import sigmoid
from mamba_ops.ops._common.samples import SampleTensors, training_samples
from mamba_ops.ops._common.slots import row_at
from mamba_ops.ops._common.training import check_initial_states, new_output, states_to_run_on
from mamba_ops.ops.causal_conv1d.op import causal_conv1d
from mamba_ops.registry import Sample


class BackwardArguments(NamedTuple):
    """A call of causal_conv1d_backward: what its checks and its kernels get."""

    grad_output: Tensor
    grad_final_states: Tensor | None
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_states: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_initial_states: Tensor


def _final_states(x: Tensor, weight: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """What no token reaches stays zero; channels lie together."""
    dtype = x.dtype if initial_states is None else initial_states.dtype
    shape = row_count(x, cu_seqlens), weight.shape[-1] - 1, x.shape[-1]
    return x.new_zeros(shape, dtype=dtype).transpose(1, 2)


def _validate(x: Tensor, weight: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> None:
    shape = row_count(x, cu_seqlens), x.shape[-1], weight.shape[1] - 1
    check_initial_states(initial_states, x, shape, "(sequences, dim, width - 1), oldest input first")


@causal_conv1d.training(
    differentiable=("x", "weight", "bias", "initial_states"),
    results={"output": new_output, "final_states": _final_states},
    batched=("x", "initial_states"),
    validate=_validate,
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = True,
    *,
    output: Tensor,
    final_states: Tensor | None,
) -> None:
    state, known = states_to_run_on(initial_states, final_states)
    causal_conv1d.call_undispatched(
        x, weight, bias, cu_seqlens=cu_seqlens, conv_state=state, has_initial_state=known, silu=silu, out=output
    )


@causal_conv1d.backward
def _backward(call: BackwardArguments) -> None:
    """Recompute what stands before silu, then correlate its gradient with the taps, and with the inputs."""
    x, (dim, width) = call.x, call.weight.shape
    n, history = row_count(x, call.cu_seqlens), width - 1
    compute = torch.promote_types(x.dtype, torch.float32)
    if n == 0 or x.numel() == 0:
        for gradient in (call.grad_x, call.grad_weight, call.grad_bias, call.grad_initial_states):
            gradient.zero_()
        if n and call.initial_states is not None and call.grad_final_states is not None:
            call.grad_initial_states.copy_(call.grad_final_states)
        return
    tokens, grad = x.reshape(-1, dim).to(compute), call.grad_output.reshape(-1, dim).to(compute)
    total, device = tokens.shape[0], x.device

    # Of every token its sequence and its place there; of every sequence its beginning and length.
    token = torch.arange(total, device=device)
    if call.cu_seqlens is None:
        starts = torch.arange(n, device=device) * x.shape[1]
        ends = starts + x.shape[1]
    else:
        starts, ends = call.cu_seqlens[:-1].long(), call.cu_seqlens[1:].long()
    row = row_at(ends, total).clamp(max=n - 1)
    place, left = token - starts[row], ends[row] - token  # tokens before it, and from it on
    inside = ((place >= 0) & (left > 0)).unsqueeze(1)
    past = tokens.new_zeros(n, history, dim)
    if call.initial_states is not None:
        past = call.initial_states.transpose(1, 2).to(compute)

    def back(steps: int) -> Tensor:
        """The entry that many steps before each token."""
        known = past[row, (history + place - steps).clamp(0, history - 1)]
        return torch.where((place >= steps).unsqueeze(1), tokens[(token - steps).clamp(min=0)], known)

    taps = call.weight.t().to(compute)
    if call.silu:
        before = torch.zeros_like(tokens) if call.bias is None else call.bias.to(compute).expand_as(tokens)
        for tap in range(width):
            before = before + taps[tap] * back(history - tap)
        opened = sigmoid(before)
        grad = grad * (opened * (1 + before * (1 - opened)))
    grad = torch.where(inside, grad, 0)

    grad_x = torch.zeros_like(tokens)
    for tap in range(width):
        steps = history - tap
        call.grad_weight[:, tap] = torch.where(inside, grad * back(steps), 0).sum(0)
        later = grad[(token + steps).clamp(max=total - 1)]
        grad_x += torch.where(left.unsqueeze(1) > steps, taps[tap] * later, 0)
    if call.bias is not None:
        call.grad_bias.copy_(grad.sum(0))

    # Entry k of a final state is the window's at length + k, whether that is an old entry or a token.
    final = None if call.grad_final_states is None else call.grad_final_states.transpose(1, 2).to(compute)
    if final is not None:
        grad_x += torch.where(left.unsqueeze(1) <= history, final[row, (history - left).clamp(0, history - 1)], 0)
    call.grad_x.copy_(torch.where(inside, grad_x, 0).view(x.shape))
    if call.initial_states is not None:
        lengths, entry = (ends - starts).unsqueeze(1), torch.arange(history, device=device)
        firsts = grad[(starts.unsqueeze(1) + entry).clamp(max=total - 1)]
        firsts = torch.where((entry < lengths).unsqueeze(2), firsts, 0)
        grad_past = torch.zeros_like(past)
        for tap in range(history):
            grad_past[:, tap:] += taps[tap] * firsts[:, : history - tap]
        if final is not None:
            kept = final.gather(1, (entry - lengths).clamp(min=0).unsqueeze(2).expand_as(past))
            grad_past += torch.where((entry >= lengths).unsqueeze(2), kept, 0)
        call.grad_initial_states.copy_(grad_past.transpose(1, 2))


@causal_conv1d.sharding
def _sharding(x: Any, cu_seqlens: Any) -> list[dict[str, int]]:
    """By channels, and by sequences."""
    last = x.ndim - 1
    channels = {"x": last, "weight": 0, "bias": 0, "initial_states": 1, "output": last, "final_states": 1}
    rows = dict.fromkeys(("x", "initial_states", "output", "final_states"), 0)
    return [channels, *([rows] if cu_seqlens is None else [])]


@causal_conv1d.flops
def _flops(x: torch.Size, weight: torch.Size) -> tuple[int, int]:
    """Multiply-adds count as two; the backward computes the inputs of silu again, and two correlations."""
    forward = 2 * math.prod(x) * weight[1]
    return forward, 3 * forward


@causal_conv1d.training_samples
def _samples(device: torch.device, *, dim: int = 24, length: int = 6, **sizes: Any) -> Iterator[Sample]:
    """Yield those of the op, and rows that several programs of a backward share."""
    yield from training_samples(causal_conv1d, "conv_state", device, dim=dim, length=length, **sizes)
    make = SampleTensors(device, sizes.get("dtype", torch.bfloat16))
    weights, states = (make.normal(dim, 4), make.normal(dim)), make.normal(2, dim, 3)
    ends = make.indices(0, 25 * length, 50 * length)
    yield Sample("long rows, packed", (make.normal(50 * length, dim), *weights, states, ends, True))
    yield Sample("long rows", (make.normal(2, 25 * length, dim), *weights, None, None, False))


def _unsupported(x: Tensor, grad_output: Tensor) -> str | None:
    """Takes no float64 x."""
    return "computes in float32, and x is float64" if torch.float64 in (x.dtype, grad_output.dtype) else None


triton.implements(
    causal_conv1d.backward_op, "mamba_ops.ops.causal_conv1d.triton:causal_conv1d_backward", unsupported=_unsupported
)
