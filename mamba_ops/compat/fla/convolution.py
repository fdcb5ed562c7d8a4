"""The short convolution of flash-linear-attention 0.6, over our ops. Its states hold width inputs, the latest last."""

from typing import Any

import torch
from torch import Tensor, nn

from mamba_ops.compat.arguments import check_states, is_silu, only, refuse
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn
from mamba_ops.compat.causal_conv1d import causal_conv1d_update as update
from mamba_ops.registry import answering

OutputAndState = tuple[Tensor, Tensor | None]


@answering
def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    *,
    seq_idx: Tensor | None = None,
    **others: object,
) -> OutputAndState:
    """Convolve sequences; return their output and, if asked for, their last inputs.

    Differentiable: x, weight, bias, residual and initial_state; the last inputs have gradients too.

    Args:
        x: `(batch, length, dim)`, or with the channels of heads apart; with `cu_seqlens` batch is 1.
        weight, bias: `(dim, width)` and `(dim,)`; there must be a weight.
        residual: like x; added to the output.
        initial_state: `(n, dim, width)`, the inputs before the first. Not changed.
        output_final_state: whether to return the last `(n, dim, width)` inputs.
        activation: None, "silu" or "swish".
        cu_seqlens: int32 or int64 `(n + 1,)`.
        seq_idx: int32 or int64 `(batch, length)`: packed sequences without states.
        backend, cu_seqlens_cpu, chunk_indices: of no effect.
        cp_context, others: refused.
    """
    name = "causal_conv1d"
    refuse(name, cp_context=cp_context, **others)
    if weight is None:
        raise ValueError(f"{name}: weight: got None, expected a tensor (dim, width)")
    shape, x = x.shape, _channels(x, weight)
    n, width = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, weight.shape[1]
    check_states(name, "initial_state", initial_state, (n, x.shape[-1], width))
    past = None if initial_state is None else initial_state[..., 1:].to(x.dtype)
    packed: dict[str, Any] = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx if cu_seqlens is None else None}
    y = only(
        causal_conv1d_fn(x.transpose(1, 2), weight, bias, initial_states=past, activation=activation, **packed)
    ).transpose(1, 2)
    y = y.reshape(shape)
    if residual is not None:
        y = y + residual
    return y, causal_conv1d_update_states(x, width, initial_state, cu_seqlens) if output_final_state else None


@answering
def causal_conv1d_update_states(
    x: Tensor, state_len: int, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return the last inputs of sequences, `(n, dim, state_len)`; before the first those of `initial_state`, or zeros.

    Args:
        x: `(batch, length, dim)`; with `cu_seqlens` batch is 1, or not there.
        state_len: how many inputs.
        initial_state: `(n, dim, state_len)`.
        cu_seqlens: int32 or int64 `(n + 1,)`.
    """
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], x.shape[2], state_len) if initial_state is None else initial_state.to(x.dtype)
        return torch.cat((before, x.transpose(1, 2)), dim=-1)[..., -state_len:]
    tokens, bounds = x.flatten(0, -2), cu_seqlens.long()
    places = bounds[1:].unsqueeze(1) + torch.arange(-state_len, 0, device=x.device)
    missing = bounds[:-1].unsqueeze(1) - places  # how many inputs before the first
    if initial_state is None:
        before = x.new_zeros(())
    else:
        columns = (state_len - missing).clamp(0, state_len - 1)
        before = initial_state.to(x.dtype).transpose(1, 2).gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    inside = (missing <= 0).unsqueeze(-1)
    return torch.where(inside, tokens[places.clamp(0, tokens.shape[0] - 1)], before).transpose(1, 2)


@answering
def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve one token a row with the inputs before it, which `cache` holds; return the output and the cache.

    Args:
        x: `(n, dim)`, `(n, 1, dim)` or `(1, n, dim)`, or with the channels of heads apart.
        cache: `(n, dim, width)`. Mutated.
        residual: like x; added to the output.
        weight, bias, activation: as for `causal_conv1d`.
    """
    name = "causal_conv1d_update"
    is_silu(name, activation)
    if weight is None:
        raise ValueError(f"{name}: weight: got None, expected a tensor (dim, width)")
    rows = _channels(x, weight) if x.dim() > 2 else x
    if rows.dim() == 3 and rows.shape[0] * rows.shape[1] != cache.shape[0]:
        expected = f"one token for each of the {cache.shape[0]} rows of cache"
        raise ValueError(f"{name}: x: got shape {tuple(x.shape)}, expected {expected}")
    y = update(rows.flatten(0, -2), cache, weight, bias, activation).view(x.shape)
    return y if residual is None else y + residual, cache


def _channels(x: Tensor, weight: Tensor) -> Tensor:
    """Return `(batch, length, dim)` of heads' channels too."""
    return x.flatten(2) if x.dim() > 3 or x.shape[-1] != weight.shape[0] else x


class ShortConvolution(nn.Conv1d):
    """`causal_conv1d` with weight and bias as parameters, and fla's constructor."""

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = "triton",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: object,
    ) -> None:
        is_silu("ShortConvolution", activation)
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_size, hidden_size, kernel_size, groups=hidden_size, padding=kernel_size - 1, bias=bias, **new
        )
        self.hidden_size, self.activation, self.backend = hidden_size, activation, backend

    @property
    def state_size(self) -> int:
        """How many numbers the state of a sequence has."""
        return self.hidden_size * self.kernel_size[0]

    def extra_repr(self) -> str:
        """Return the sizes."""
        sizes: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{sizes}, activation={self.activation}"

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        **others: Any,
    ) -> OutputAndState:
        """Convolve `(batch, length, dim)`, and return the output and, if asked for, the last inputs.

        Args:
            x, residual, output_final_state, cu_seqlens, chunk_indices: as for `causal_conv1d`.
            mask: `(batch, length)`, zero for padding, whose inputs count as zeros.
            cache: `(n, dim, width)`, the inputs before the first; where no gradients are recorded and every sequence
                has one token, it is advanced in place.
            others: for `causal_conv1d`.
        """
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("ShortConvolution: mask: got it with cu_seqlens, expected one of the two")
            x = x * mask.unsqueeze(-1)
        n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if not torch.is_grad_enabled() and x.shape[0] * x.shape[1] == n and _one_each(cu_seqlens):
            return self.step(x, residual, cache, output_final_state, cu_seqlens)
        weight, options = self.weight.squeeze(1), {"activation": self.activation, "cu_seqlens": cu_seqlens, **others}
        states: dict[str, Any] = {"initial_state": cache, "output_final_state": output_final_state}
        return causal_conv1d(x, weight, self.bias, residual, **states, **options)

    def step(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: Tensor | None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> OutputAndState:
        """Convolve one token a sequence; `cache` is advanced in place."""
        if cache is None:
            n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            cache = x.new_zeros(n, self.hidden_size, self.kernel_size[0])
        y, cache = causal_conv1d_update(x, cache, residual, self.weight.squeeze(1), self.bias, self.activation)
        return y, cache if output_final_state else None


def _one_each(cu_seqlens: Tensor | None) -> bool:
    """Return whether every sequence has one token, if there are as many as tokens; waits for the device."""
    return cu_seqlens is None or torch.compiler.is_compiling() or bool((cu_seqlens.diff() == 1).all())
