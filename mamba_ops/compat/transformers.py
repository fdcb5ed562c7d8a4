"""Runs Mamba-2 models of Transformers 5 on our ops, by binding the functions that their modeling files call.

Such a file has five functions of its own for this. Transformers decides where each goes: to a kernel from the hub if
one was asked for, else to mamba_ssm or causal_conv1d if they are installed, else to torch code. Whatever it decided, a
mixer finds the function by its name in the file, at every call, and there ours are put.

Ours have the parameters of the originals in mamba_ssm 2.3 and causal_conv1d 1.6. Mixers hand on to them whatever
keyword arguments the model was called with, and Transformers silently drops those that a function does not name; here
each one is honoured or refused, but for those that are the model's own business.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops import ops
from mamba_ops.layers import gated_rms_norm

States = tuple[Tensor, Tensor]

# -- binding ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Binding:
    """What `use_mamba_ops` did, for printing and for undoing; a context manager undoes it at its end.

    Attributes:
        bound: the functions that are ours now, as `file.function`.
        not_bound: those that are not, each with the reason.
    """

    bound: list[str] = field(default_factory=list)
    not_bound: dict[str, str] = field(default_factory=dict)
    _files: list[str] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the originals back, where no other binding needs ours. Once undone, a binding does nothing more."""
        while self._files:
            file = self._files.pop()
            originals, bindings = _bindings[file]
            bindings.remove(self)
            if not bindings:
                vars(sys.modules[file]).update(originals)
                del _bindings[file]

    def __enter__(self) -> "Binding":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{name} runs on mamba_ops" for name in self.bound]
        return "\n".join(lines + [f"{name} stays as it was: {why}" for name, why in self.not_bound.items()])


_bindings: dict[str, tuple[dict[str, Any], list[Binding]]] = {}  # of each bound file: the originals, and who needs ours


def use_mamba_ops(model: nn.Module) -> Binding:
    """Let the Mamba-2 mixers of a Transformers model run on our ops, until `undo()` of what is returned.

    Nothing else changes: not the parameters, nor the cache, nor `generate()`. As the functions belong to the modeling
    file, all models that share it change together. The ops record no gradients: call the model under `no_grad`.

    Args:
        model: a model with Mamba-2 mixers, or any module that holds one.

    Raises:
        ValueError: there are no such mixers in it.
    """
    files = {type(module).__module__ for module in model.modules()}
    files = {file for file in files if hasattr(sys.modules.get(file), "mamba2_chunk_scan")}
    if not files:
        expected = "a model with Mamba-2 mixers of Transformers 5"
        raise ValueError(f"use_mamba_ops: model: got {type(model).__name__}, expected {expected}")
    binding = Binding()
    for file in sorted(files):
        names = vars(sys.modules[file])
        originals = {name: names[name] for name in _FUNCTIONS if name in names}
        _bindings.setdefault(file, (originals, []))[1].append(binding)
        binding._files.append(file)
        binding.bound += [f"{file}.{name}" for name in originals]
        binding.not_bound |= {f"{file}.{name}": "there is none" for name in _FUNCTIONS if name not in originals}
        names.update({name: _FUNCTIONS[name] for name in originals})
    return binding


# -- the functions of causal_conv1d -----------------------------------------------------------------------------------


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    **others: object,
) -> Tensor | States:
    """Convolve sequences `(batch, dim, length)`; with `return_final_states` also return their last width - 1 inputs.

    Args:
        x, weight, bias: `(batch, dim, length)`, `(dim, width)` and `(dim,)`.
        seq_idx: refused.
        initial_states: `(batch, dim, width - 1)`, the inputs before the first.
        return_final_states: whether to return `(output, final states)`.
        final_states_out: where the final states go, `(batch, dim, width - 1)`. Mutated.
        activation: None, "silu" or "swish".
        others: refused.
    """
    _refuse("causal_conv1d_fn", seq_idx=seq_idx, **others)
    if not return_final_states:
        _refuse("causal_conv1d_fn", final_states_out=final_states_out)
    batch, dim, _ = x.shape
    state = final_states_out
    if state is None and (return_final_states or initial_states is not None):
        state = x.new_zeros(batch, weight.shape[1] - 1, dim).transpose(1, 2)
    if state is not None and initial_states is not None:
        state.copy_(initial_states)
    out = ops.causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        conv_state=state,
        has_initial_state=_all_have(initial_states),
        silu=_is_silu("causal_conv1d_fn", activation),
    ).transpose(1, 2)
    return (out, state) if return_final_states and state is not None else out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve new inputs, `(batch, dim)` or `(batch, dim, length)`, with those before them, which `conv_state` holds.

    Args:
        x: the new inputs.
        conv_state: `(slots, dim, state_len)`, the last state_len inputs, the latest in the last column. Mutated.
        weight, bias: `(dim, width)` and `(dim,)`; state_len is at least width - 1, and at most 7.
        activation: None, "silu" or "swish".
        cache_seqlens: refused; conv_state is no circular buffer here, its columns move.
        conv_state_indices: int32 or int64 `(batch,)`, the slot of each row; a negative one is nobody's.
    """
    _refuse("causal_conv1d_update", cache_seqlens=cache_seqlens)
    silu = _is_silu("causal_conv1d_update", activation)
    if spare := conv_state.shape[2] + 1 - weight.shape[1]:
        # The op's window begins in column 0, the original's ends in the last one. With a tap of weight zero for each
        # column to spare the two are the same, and all columns move along.
        weight = functional.pad(weight, (spare, 0))
    rows = x if x.dim() == 2 else x.transpose(1, 2)
    out = ops.causal_conv1d_update(rows, conv_state, weight, bias, slots=conv_state_indices, silu=silu)
    return out if x.dim() == 2 else out.transpose(1, 2)


# -- the functions of mamba_ssm ---------------------------------------------------------------------------------------


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    **others: object,
) -> Tensor:
    """Advance `state` by one token and return that token's output.

    Args:
        state: `(slots, heads, dim, dstate)`, or without heads as all else. Mutated.
        x, dt, z: `(batch, heads, dim)`.
        A: `(heads, dim, dstate)`.
        B, C: `(batch, groups, dstate)`.
        D, dt_bias: `(heads, dim)`.
        dt_softplus: whether softplus is applied to dt after the bias.
        state_batch_indices: int32 or int64 `(batch,)`, the slot of each row; a negative one is nobody's.
        others: refused.
    """
    _refuse("selective_state_update", **others)
    if state.dim() == 4:  # what is expanded from one number a head is handed on as such: a kernel then reads it once
        dt, A = _per_head(dt, 1), _per_head(A, 2)
        D, dt_bias = (None if t is None else _per_head(t, 1) for t in (D, dt_bias))
    return ops.selective_state_update(
        state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, slots=state_batch_indices
    )


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    **others: object,
) -> Tensor | States:
    """Scan sequences of length `length`; with `return_final_states` also return their last states, in float32.

    Args:
        x, z: `(batch, length, heads, dim)`.
        dt: `(batch, length, heads)`.
        A, dt_bias: `(heads,)`.
        B, C: `(batch, length, groups, dstate)`.
        chunk_size: tokens per chunk.
        D: `(heads,)` or `(heads, dim)`.
        initial_states: `(batch, heads, dim, dstate)`.
        seq_idx, cu_seqlens, return_varlen_states: refused.
        dt_softplus: whether softplus is applied to dt after the bias.
        dt_limit: the least and the largest dt.
        return_final_states: whether to return `(output, final states)`.
        others: refused.
    """
    name = "mamba_chunk_scan_combined"
    _refuse(name, seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states, **others)
    state_dtype, state = torch.promote_types(x.dtype, torch.float32), None
    if initial_states is not None:
        state = initial_states.to(state_dtype, copy=True)
    elif return_final_states:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=state_dtype)
    dt_min, dt_max = dt_limit
    out = ops.mamba_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_min=dt_min,
        dt_max=dt_max,
        ssm_state=state,
        has_initial_state=_all_have(initial_states),
    )
    return (out, state) if return_final_states and state is not None else out


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    **others: object,
) -> Tensor | States:
    """Do all that a Mamba-2 mixer does to its first projection `zxbcdt`, but for caches; return what the mixer returns.

    Args:
        zxbcdt: `(batch, length, heads * dim + conv_dim + heads)`: gate, what is convolved, dt.
        conv1d_weight, conv1d_bias: `(conv_dim, width)` and `(conv_dim,)`, conv_dim = heads * dim + 2 * groups * dstate.
        dt_bias, A: `(heads,)`.
        D: `(heads, dim)`, or `(heads,)` with `headdim`.
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states: as for `mamba_chunk_scan_combined`.
        activation: of the convolution; None, "silu" or "swish".
        rmsnorm_weight: `(heads * dim,)`; None: the scan's output is gated and not normalised.
        rmsnorm_eps, norm_before_gate: of the norm.
        outproj_weight, outproj_bias: of the last projection; None: there is none.
        headdim: dim, where `D` does not tell.
        ngroups: groups of B and C, and of the norm's channels.
        others: refused.
    """
    name = "mamba_split_conv1d_scan_combined"
    _refuse(name, seq_idx=seq_idx, **others)
    heads, dim = D.shape if D.dim() == 2 else (D.shape[0], headdim)
    if dim is None:
        raise ValueError(f"{name}: headdim: got None, expected the size of a head, as D is per head")
    inner, conv_dim = heads * dim, conv1d_weight.shape[0]
    if zxbcdt.shape[-1] != inner + conv_dim + heads:
        expected = (
            f"{inner} + {conv_dim} + {heads} (gate, conv_dim, heads); a gated MLP beside the mixer is not supported"
        )
        raise ValueError(f"{name}: zxbcdt: got {zxbcdt.shape[-1]} channels, expected {expected}")
    gate, mixed, dt = zxbcdt.split([inner, conv_dim, heads], dim=-1)
    mixed = ops.causal_conv1d(mixed, conv1d_weight, conv1d_bias, silu=_is_silu(name, activation))
    x, B, C = mixed.split([inner, (conv_dim - inner) // 2, (conv_dim - inner) // 2], dim=-1)
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, dim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=gate.unflatten(-1, (heads, dim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    out, *states = y if isinstance(y, tuple) else (y,)
    out = out.flatten(-2)
    if rmsnorm_weight is not None:
        out = gated_rms_norm(
            out, gate, rmsnorm_weight, groups=ngroups, eps=rmsnorm_eps, norm_before_gate=norm_before_gate
        )
    if outproj_weight is not None:
        out = functional.linear(out, outproj_weight, outproj_bias)
    return (out, states[0]) if states else out


_FUNCTIONS: dict[str, Callable[..., Tensor | States]] = {  # by their names in the modeling files
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
    "mamba2_selective_state_update": selective_state_update,
    "mamba2_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
}


# Keyword arguments that a model takes for itself and yet hands on: they ask for more outputs, or are for the loss.
_OF_THE_MODEL = ("num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits")


def _refuse(function: str, **arguments: object) -> None:
    """Raise if one of the arguments is set."""
    for name, got in arguments.items():
        if got is not None and got is not False and name not in _OF_THE_MODEL:
            packed = name in ("cu_seqlens", "seq_idx")
            hint = "; mamba_ops.layers.Mamba2 keeps packed sequences apart, with cu_seqlens" if packed else ""
            raise ValueError(
                f"{function}: {name}: got a {type(got).__name__}, expected none: it has no effect here{hint}"
            )


def _is_silu(function: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{function}: activation: got {activation!r}, expected None, 'silu' or 'swish'")
    return activation is not None


def _all_have(initial_states: Tensor | None) -> Tensor | None:
    """Say to an op that every sequence has an initial state, if there are any."""
    return None if initial_states is None else initial_states.new_ones(initial_states.shape[0], dtype=torch.bool)


def _per_head(tensor: Tensor, axes: int) -> Tensor:
    """Take back the expansion of a tensor's last axes, where it is one."""
    if any(tensor.stride(-1 - axis) for axis in range(axes)):
        return tensor
    return tensor.flatten(-axes)[..., 0]
