"""What the gated delta rules have in common: one decay a head, or one for each channel of a key."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import (
    accepted_tokens,
    check_tensors,
    count_of,
    initial_flags,
    packed_rows,
    shape_is,
    slot_for_each,
    slot_table,
    slots_for,
    tensor_rank,
)
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.narrow import check_rounding, check_state
from mamba_ops.registry import bad_argument

CHUNK = 64  # tokens
EPS = 1e-6  # added to the sum of squares where q and k are normalised


class PrefillArguments(NamedTuple):
    """A call that reads whole sequences: what its checks and its kernels get."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float | None
    cu_seqlens: Tensor | None
    ssm_state: Tensor | None
    slots: Tensor | None
    write_slots: Tensor | None
    has_initial_state: Tensor | None
    qk_l2norm: bool
    null_slot: int
    output: Tensor


class BackwardArguments(NamedTuple):
    """A call of the backward pass: what its checks and its kernels get."""

    grad_output: Tensor
    grad_final_states: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_states: Tensor | None
    cu_seqlens: Tensor | None
    scale: float | None
    qk_l2norm: bool
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_g: Tensor
    grad_beta: Tensor
    grad_initial_states: Tensor


def check_prefill(call: PrefillArguments, *, by_channel: bool) -> None:
    """Raise the ValueError about a call that reads whole sequences, if it is wrong.

    Args:
        call: the call.
        by_channel: whether g has a number for each channel of a key.
    """
    check_tensors(call, "v")
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("v", call.v, {4: "(n, length, v_heads, v_dim)"}, hint="packed tokens come with cu_seqlens")
    else:
        tensor_rank("v", call.v, {3: "(tokens, v_heads, v_dim)"}, hint="with cu_seqlens, tokens are packed")
    *lead, v_heads, v_dim = call.v.shape
    tensor_rank("q", call.q, {call.v.dim(): "(..., k_heads, k_dim), with the tokens of v"})
    k_dim = call.q.shape[-1]
    for name, tensor in (("v", call.v), ("q", call.q)):
        if 0 in tensor.shape[-2:]:
            raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected="only tokens of size 0")
    _check_tokens(call.q, call.k, tuple(lead), v_heads, k_dim)
    shape_is("g", call.g, _gate_shape((*lead, v_heads), k_dim, by_channel), hint=_number_for(by_channel))
    shape_is("beta", call.beta, (*lead, v_heads), hint="one number a token and head of v")
    shape_is("out", call.output, tuple(call.v.shape), hint="out is like v")

    n = row_count(call.v, call.cu_seqlens)
    slot_table("slots", call.slots, rows=n)
    slot_table("write_slots", call.write_slots, rows=n)
    initial_flags("ssm_state", call.ssm_state, call.has_initial_state, rows=n)
    if call.ssm_state is not None:
        shape = count_of(call.ssm_state), v_heads, v_dim, k_dim
        shape_is("ssm_state", call.ssm_state, shape, hint="(slots, v_heads, v_dim, k_dim)")
        slot_for_each("ssm_state", call.ssm_state, call.slots, rows=n)


def check_update(call: Any, *, by_channel: bool) -> None:
    """Raise the ValueError about a call that advances states by a few tokens, if it is wrong.

    Args:
        call: the call.
        by_channel: whether g, a and dt_bias have a number for each channel of a key.
    """
    given_gates = {"g": call.g, "beta": call.beta}
    raw_gates = {"a": call.a, "b": call.b, "A_log": call.A_log, "dt_bias": call.dt_bias}
    check_tensors(call, "v", indices=["rounding_seed", "ssm_state"])
    wanted, others = (raw_gates, given_gates) if call.g is None and call.beta is None else (given_gates, raw_gates)
    names = f"{' and '.join(given_gates)}, or {', '.join(raw_gates)}"
    for name, tensor in wanted.items():
        if tensor is None:
            raise bad_argument(name, got="none", expected=f"a tensor: either {names} are given")
    for name, tensor in others.items():
        if tensor is not None:
            raise bad_argument(name, got="a tensor", expected=f"none: either {names} are given")

    tensor_rank("ssm_state", call.ssm_state, {4: "(slots, v_heads, v_dim, k_dim)"})
    check_state(call.ssm_state, call.state_scale, "(slots, v_heads, v_dim)")
    check_rounding(call.ssm_state, call.rounding_seed, call.philox_rounds)
    _, v_heads, v_dim, k_dim = call.ssm_state.shape
    packed_rows(call.cu_seqlens)
    if call.cu_seqlens is None:
        tensor_rank("v", call.v, {3: "(n, v_heads, v_dim)", 4: "(n, length, v_heads, v_dim)"})
    else:
        tensor_rank("v", call.v, {3: "(tokens, v_heads, v_dim)"}, hint="with cu_seqlens, tokens are packed")
    lead = tuple(call.v.shape[:-2])
    shape_is("v", call.v, (*lead, v_heads, v_dim), hint="heads and v_dim are those of ssm_state")
    _check_tokens(call.q, call.k, lead, v_heads, k_dim)
    for name in ("g", "a"):
        shape = _gate_shape((*lead, v_heads), k_dim, by_channel)
        shape_is(name, getattr(call, name), shape, hint=_number_for(by_channel))
    for name in ("beta", "b"):
        shape_is(name, getattr(call, name), (*lead, v_heads), hint="one number a token and head of v")
    shape_is("A_log", call.A_log, (v_heads,), hint="one number a head of v")
    hint = "one number a head of v" + (" and channel of k" if by_channel else "")
    shape_is("dt_bias", call.dt_bias, _gate_shape((v_heads,), k_dim, by_channel), hint=hint)
    shape_is("out", call.output, tuple(call.v.shape), hint="out is like v")

    n = row_count(call.v, call.cu_seqlens)
    slot_table("slots", call.slots, rows=n)
    slot_table("write_slots", call.write_slots, rows=n)
    slot_for_each("ssm_state", call.ssm_state, call.slots, rows=n)
    accepted_tokens(call.num_accepted_tokens, call.slots, rows=n)
    slots_for("ssm_state", call.ssm_state, call.slots)


def check_heads(call: Any) -> None:
    """Raise the ValueError about the heads of a mixing op's call, if they are wrong."""
    for name in ("num_k_heads", "head_k_dim", "head_v_dim"):
        if (value := getattr(call, name)) < 1:
            raise bad_argument(name, got=value, expected="a positive number")
    if call.num_v_heads < 1 or call.num_v_heads % call.num_k_heads:
        expected = f"a multiple of the {call.num_k_heads} heads of k"
        raise bad_argument("num_v_heads", got=call.num_v_heads, expected=expected)


def check_lower_bound(lower_bound: float | None) -> None:
    """Raise the ValueError about a lower bound of the logs of decays, if it is none."""
    if lower_bound is not None and not -math.inf < lower_bound < 0:
        raise bad_argument("lower_bound", got=lower_bound, expected="a number below 0, or none")


def _gate_shape(heads: tuple[int, ...], k_dim: int, by_channel: bool) -> tuple[int, ...]:
    return (*heads, k_dim) if by_channel else heads


def _number_for(by_channel: bool) -> str:
    return "one number a token, head of v and channel of k" if by_channel else "one number a token and head of v"


def _check_tokens(q: Tensor, k: Tensor, lead: tuple[int, ...], v_heads: int, k_dim: int) -> None:
    """Raise unless q and k have the tokens `lead` and heads that `v_heads` heads can share."""
    tensor_rank("q", q, {len(lead) + 2: "(..., k_heads, k_dim), with the tokens of v"})
    k_heads = q.shape[-2]
    shape_is("q", q, (*lead, k_heads, k_dim), hint="tokens are those of v")
    shape_is("k", k, tuple(q.shape), hint="k is like q")
    if k_heads == 0 or v_heads % k_heads:
        raise bad_argument("q", got=f"{k_heads} heads", expected=f"a divisor of the {v_heads} heads of v")


def unsupported_by_triton(q: Tensor, v: Tensor) -> str | None:
    """Takes no float64 q, and a k_dim and a v_dim of at most 256."""
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"takes a k_dim and a v_dim of at most 256, and they are {q.shape[-1]} and {v.shape[-1]}"
    return "computes in float32, and q is float64" if q.dtype == torch.float64 else None
