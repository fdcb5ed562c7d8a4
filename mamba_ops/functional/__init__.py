"""Ops as functions of tensors: states go in and come out as values, and all of them have gradients.

No cache, no slot and no `out`: nothing is written that was passed in. For training in segments, where a state goes from
one call to the next, and for losses that read the last state. Where states do not matter, the ops themselves record
gradients: `mamba_ops.causal_conv1d(x, weight)`.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mamba_ops import ops
from mamba_ops.ops._common import narrow
from mamba_ops.ops._common.checking import one_device
from mamba_ops.ops.mamba3_chunk_scan import training as mamba3
from mamba_ops.ops.mamba3_chunk_scan.training import Mamba3States as Mamba3States
from mamba_ops.registry import Op, answering, bad_argument
from mamba_ops.registry.errors import ArgumentTypeError, in_call_of
from mamba_ops.registry.kinds import check


def _call(op: Op[...], *inputs: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the final states, without what is saved for the backward."""
    output, final_states, *_ = cast(tuple[Tensor, ...], op.forward_states_op(*inputs))
    return output, final_states


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Convolve each sequence with its own past; return the outputs and the sequences' last inputs.

    Differentiable: x, weight, bias and initial_states.

    Args:
        x, weight, bias, cu_seqlens, silu: as for `mamba_ops.causal_conv1d`. Outputs of tokens in no sequence are zero.
        initial_states: (n, dim, width - 1), what came before each sequence, oldest first. None: zeros.

    Returns:
        The outputs, like x, and the final states, like initial_states (without it in the dtype of x).

    Raises:
        ValueError: an argument does not fit the others.
    """
    return _call(ops.causal_conv1d, x, weight, bias, initial_states, cu_seqlens, silu)


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the Mamba-2 recurrence over every row's tokens; return their outputs and the rows' last states.

    Differentiable: x, dt, A, B, C, D, z, dt_bias and initial_states.

    Args:
        x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus, dt_min, dt_max, cu_seqlens: as for
            `mamba_ops.mamba_chunk_scan`. Outputs of tokens in no row are zero.
        initial_states: (n, heads, dim, dstate), the rows' states before their first token. None: zeros.

    Returns:
        The outputs, like x, and the final states, like initial_states (without it in float32 at least). A row without
        tokens keeps its initial state.

    Raises:
        ValueError: an argument does not fit the others.
    """
    weights = D, z, dt_bias, initial_states, cu_seqlens
    return _call(ops.mamba_chunk_scan, x, dt, A, B, C, chunk_size, *weights, dt_softplus, dt_min, dt_max)


@answering
def mamba3_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    angles: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_states: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Mamba3States]:
    """Run Mamba-3's recurrence over every row's tokens; return their outputs and the rows' last states.

    Differentiable: x, dt, A, trap, angles, B, C, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o and the four initial
    states.

    Args:
        x, dt, A, trap, angles, B, C, chunk_size, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, cu_seqlens: as for
            `mamba_ops.mamba3_chunk_scan`. Outputs of tokens in no row are zero.
        initial_states: `Mamba3States`, or four tensors in their order: the rows' states before their first token. None:
            zeros.

    Returns:
        The outputs, and the final states, each like its initial one; without these angle_state and ssm_state in float32
        at least, k_state in the dtype that x, B and C promote to, and v_state in that of x. A row without tokens keeps
        its initial states.

    Raises:
        ValueError: an argument does not fit the others.
    """
    options = B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, cu_seqlens
    return mamba3.with_states(x, dt, A, trap, angles, B, C, chunk_size, *options, initial_states=initial_states)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the Mamba-1 recurrence over every row's tokens; return their outputs and the rows' last states.

    Differentiable: x, dt, A, B, C, D, z, dt_bias and initial_states.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens: as for `mamba_ops.selective_scan`. Outputs of tokens in
            no row are zero.
        initial_states: (n, dim, dstate), the rows' states before their first token. None: zeros.

    Returns:
        The outputs, like x, and the final states, like initial_states (without it in float32 at least). A row without
        tokens keeps its initial state.

    Raises:
        ValueError: an argument does not fit the others.
    """
    return _call(ops.selective_scan, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule over every row's tokens; return their outputs and the rows' last states.

    Differentiable: q, k, v, g, beta and initial_states.

    Args:
        q, k, v, g, beta, scale, qk_l2norm, cu_seqlens: as for `mamba_ops.chunk_gated_delta_rule`. Outputs of tokens in
            no row are zero.
        initial_states: (n, v_heads, v_dim, k_dim), the rows' states before their first token. None: zeros.

    Returns:
        The outputs, like v, and the final states, like initial_states (without it in float32 at least). A row without
        tokens keeps its initial state.

    Raises:
        ValueError: an argument does not fit the others.
    """
    return _call(ops.chunk_gated_delta_rule, q, k, v, g, beta, initial_states, cu_seqlens, scale, qk_l2norm)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run Kimi Delta Attention over every row's tokens; return their outputs and the rows' last states.

    Differentiable: q, k, v, g, beta and initial_states.

    Args:
        q, k, v, g, beta, scale, qk_l2norm, cu_seqlens: as for `mamba_ops.chunk_kda`. Outputs of tokens in no row are
            zero.
        initial_states: (n, v_heads, v_dim, k_dim), the rows' states before their first token. None: zeros.

    Returns:
        The outputs, like v, and the final states, as `chunk_gated_delta_rule` does.

    Raises:
        ValueError: an argument does not fit the others.
    """
    return _call(ops.chunk_kda, q, k, v, g, beta, initial_states, cu_seqlens, scale, qk_l2norm)


@answering
def narrow_states(states: Tensor, dtype: torch.dtype = torch.int16) -> tuple[Tensor, Tensor]:
    """Return states in few bits, as ops that decode take them, and a scale for each of their rows.

    Args:
        states: (slots, ..., dstate) of any float dtype; a row is the last axis.
        dtype: torch.int16 or torch.float8_e4m3fn.

    Returns:
        The states in that dtype, and their `state_scale`, float32 (slots, ...): a row's largest size divided by the
        dtype's, 32767 or 448, and 2^-126 at least. Numbers are rounded to the nearest. A row with an infinity or NaN
        becomes NaN.

    Raises:
        ValueError: another dtype, or states that are no floats.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in narrow.MOST:
        raise bad_argument("narrow_states: dtype", got=repr(dtype), expected="torch.int16 or torch.float8_e4m3fn")
    _require_tensors("narrow_states", states=states)
    if not states.is_floating_point() or states.itemsize == 1 or states.dim() < 2 or not states.shape[-1]:
        got, expected = f"{tuple(states.shape)} of {states.dtype}", "floats of 16 bits or more, (slots, ..., dstate)"
        raise bad_argument("narrow_states: states", got=got, expected=expected)
    return narrow.narrow(states, dtype)


@answering
def widen_states(states: Tensor, state_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers that states in few bits stand for: for ops over sequences, which take no others.

    Args:
        states: (slots, ..., dstate), int16 or float8_e4m3fn.
        state_scale: float32 (slots, ...).
        dtype: of the result.

    Raises:
        ValueError: the two do not fit each other.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise bad_argument("widen_states: dtype", got=repr(dtype), expected="a float of 16 bits or more")
    _require_tensors("widen_states", states=states, state_scale=state_scale)
    try:
        if states.dtype not in narrow.MOST or states.dim() < 2:
            got, expected = f"{tuple(states.shape)} of {states.dtype}", "(slots, ..., dstate), int16 or float8_e4m3fn"
            raise bad_argument("states", got=got, expected=expected)
        narrow.check_state(states, state_scale, "(slots, ...)")
        one_device(states.device, "states", state_scale=state_scale)
    except ValueError as error:
        raise in_call_of("widen_states", error) from None
    return narrow.widen(states, state_scale, dtype)


def _require_tensors(function: str, **given: Any) -> None:
    """Raise the ValueError about an argument of a function that is no tensor with strides."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            got = "None" if value is None else f"a {type(value).__name__}"
            raise ArgumentTypeError(str(bad_argument(f"{function}: {name}", got=got, expected="a torch.Tensor")))
    try:
        check(given)
    except ValueError as error:
        raise in_call_of(function, error) from None
