"""One Triton kernel for a decode step of both gated delta rules; its time goes into reading and writing the state.

A program owns some rows of one head's state (v_dim by k_dim) of one row of the batch: they stay in registers over all
tokens. Everything else, gates and norms included, is computed again by every program, which is cheaper than a launch.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import (
    cdiv,
    is_slot,
    kernel,
    load_slot,
    offset_ptr,
    on_device_of,
    or_placeholder,
    row_tokens,
    slots_of,
    softplus,
)
from mamba_ops.ops._triton.decay import finite_rate
from mamba_ops.ops._triton.launch_config import Launches
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.states import load_state, states_of, store_state


@triton.jit
def _load_gate(gate, head, key, K_DIM: tl.constexpr, BY_CHANNEL: tl.constexpr):
    # A head's number, or one for each channel of k.
    if BY_CHANNEL:
        return tl.load(gate + head * K_DIM + key, key < K_DIM, other=0.0).to(tl.float32)
    else:
        return tl.load(gate + head).to(tl.float32)


@kernel(first_number="lower_bound")
def _kernel(
    ssm_state,
    q,
    k,
    v,
    gate,  # g; with RAW a; a number a head, or BY_CHANNEL of k
    strength,  # beta; with RAW b
    A_log,
    dt_bias,
    output,
    slots,
    write_slots,
    cu_seqlens,
    num_accepted_tokens,
    rounding_seed,
    state_scale,
    lower_bound,  # of g, with RAW; None: there is none
    scale,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    value_stride,
    key_stride,
    scale_stride,  # this and the next two are None without scales
    scale_head_stride,
    scale_value_stride,
    q_stride,  # this and the next five: from token to token
    k_stride,
    v_stride,
    gate_stride,
    strength_stride,
    output_stride,
    slots_stride,
    slots_columns,
    write_stride,
    write_columns,
    length,  # tokens of every row; None for one; of all packed rows together
    null_slot,
    slot_count,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    RAW: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    L2NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    HARDWARE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    BLOCKS: tl.constexpr = (V_DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // (BLOCKS * V_HEADS)).to(tl.int64)
    head = program // BLOCKS % V_HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, WIDTH)
    in_value = value < V_DIM
    in_key = key < K_DIM
    in_state = in_value[:, None] & in_key[None, :]

    first = row
    tokens = 1
    if cu_seqlens is not None:
        first, tokens = row_tokens(row, cu_seqlens, length)
        if tokens <= 0:
            return
    elif length is not None:
        first = row * length
        tokens = length

    of_v = head * V_DIM + value
    of_k = head // (V_HEADS // K_HEADS) * K_DIM + key
    if ALIGNED:
        of_state = of_v[:, None] * K_DIM + key[None, :]
    else:
        of_state = value.to(tl.int64)[:, None] * value_stride + key.to(tl.int64)[None, :] * key_stride
        of_state += head.to(tl.int64) * head_stride
    of_scale = value
    if state_scale is not None:
        of_scale = head.to(tl.int64) * scale_head_stride + value.to(tl.int64) * scale_value_stride

    if num_accepted_tokens is not None:
        accepted = tl.load(num_accepted_tokens + row).to(tl.int32)
        slots += tl.minimum(tl.maximum(accepted, 1), slots_columns) - 1
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        for t in range(tokens):
            tl.store(output + (first + t) * output_stride + of_v, tl.zeros([BLOCK], tl.float32), in_value)
        return

    s = load_state(
        ssm_state, source, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale, in_value, ALIGNED,
        NATIVE,
    )  # fmt: skip
    if RAW:
        rate = finite_rate(-tl.exp(tl.load(A_log + head).to(tl.float32)))
        bias = _load_gate(dt_bias, head, key, K_DIM, BY_CHANNEL)

    for t in range(tokens):
        token = first + t
        query = tl.load(offset_ptr(q, token * q_stride, ALIGNED) + of_k, in_key, other=0.0).to(tl.float32)
        keys = tl.load(offset_ptr(k, token * k_stride, ALIGNED) + of_k, in_key, other=0.0).to(tl.float32)
        values = tl.load(v + token * v_stride + of_v, in_value, other=0.0).to(tl.float32)
        g = _load_gate(gate + token * gate_stride, head, key, K_DIM, BY_CHANNEL)
        beta = tl.load(strength + token * strength_stride + head).to(tl.float32)
        if RAW:
            g += bias
            g = rate * softplus(g) if lower_bound is None else lower_bound * tl.sigmoid(-rate * g)
            beta = tl.sigmoid(beta)
        if L2NORM:
            query /= tl.sqrt(tl.sum(query * query, axis=0) + 1e-6)
            keys /= tl.sqrt(tl.sum(keys * keys, axis=0) + 1e-6)

        if BY_CHANNEL:
            s *= tl.exp(g)[None, :]
        else:
            s *= tl.exp(g)
        delta = values - tl.sum(s * keys[None, :], axis=1)
        s += (beta * delta)[:, None] * keys[None, :]
        if num_accepted_tokens is not None:
            if t < write_columns:
                target = tl.load(write_slots + row * write_stride + t).to(tl.int64)
                if is_slot(target, null_slot, slot_count):
                    store_state(
                        s, ssm_state, target, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale,
                        in_value, rounding_seed, of_v, WIDTH, ROUNDS, HARDWARE, ALIGNED, NATIVE,
                    )  # fmt: skip
        y = tl.sum(s * (query * scale)[None, :], axis=1)
        tl.store(output + token * output_stride + of_v, y, in_value)

    if num_accepted_tokens is None:
        if write_slots is None:
            store_state(
                s, ssm_state, source, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale,
                in_value, rounding_seed, of_v, WIDTH, ROUNDS, HARDWARE, ALIGNED, NATIVE,
            )  # fmt: skip
        else:
            target = tl.load(write_slots + row * write_stride).to(tl.int64)
            if is_slot(target, null_slot, slot_count):
                store_state(
                    s, ssm_state, target, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale,
                    in_value, rounding_seed, of_v, WIDTH, ROUNDS, HARDWARE, ALIGNED, NATIVE,
                )  # fmt: skip


def advance(call: Any, launches: Callable[..., Launches], by_channel: bool, lower_bound: float | None = None) -> None:
    """Advance `ssm_state` in place and write `output`; shapes and meaning are an op's, and are not checked again.

    Every token of an activation must be dense, and every parameter: others are copied first, and an output that is
    not is written through a copy. Where the state is not dense within a slot, or a slot of it or a token of q or k
    does not start at a multiple of 16 bytes, the state is read and written element by element, which is slower.

    Args:
        call: of the op.
        launches: chooses the launch, for the device's index, v_dim, k_dim and the bytes of a number of the state.
        by_channel: whether each channel of k decays by itself.
        lower_bound: of the logs of decays that are made of raw gates.
    """
    gate, strength = (call.a, call.b) if call.g is None else (call.g, call.beta)
    if (
        call.output.numel() == 0
        or (call.cu_seqlens is not None and call.cu_seqlens.shape[0] == 1)
        or gate is None
        or strength is None
    ):
        return
    flat = call.v.dim() < call.ssm_state.dim()
    rows = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    (_, v_heads, v_dim, k_dim), k_heads = call.ssm_state.shape, call.q.shape[-2]

    written = by_token(call.output, flat)
    q, k, v, gate, strength = (by_token(t, flat) for t in (call.q, call.k, call.v, gate, strength))
    A_log, dt_bias, cu_seqlens, num_accepted_tokens = (
        None if t is None else t.contiguous()
        for t in (call.A_log, call.dt_bias, call.cu_seqlens, call.num_accepted_tokens)
    )
    slots, write_slots = (None if t is None else dense(t) for t in (call.slots, call.write_slots))
    slots_columns = write_columns = None
    if num_accepted_tokens is not None and slots is not None:
        write_slots = slots if write_slots is None else write_slots
        slots_columns, write_columns = ((*table.shape, 1)[1] for table in (slots, write_slots))

    slots, slots_stride = or_placeholder(slots, v, tl.int32)
    slot_stride, *strides = call.ssm_state.stride()
    places = call.ssm_state.data_ptr() | q.data_ptr() | k.data_ptr()
    places |= slot_stride * call.ssm_state.itemsize | q.stride(0) * q.itemsize | k.stride(0) * k.itemsize
    aligned = places % 16 == 0 and is_dense(call.ssm_state)
    head_stride, value_stride, key_stride = (None, None, None) if aligned else strides
    states = states_of(call)

    launch = launches(call.ssm_state.get_device(), v_dim, k_dim, call.ssm_state.itemsize)["_kernel"]
    if call.rounding_seed is not None:
        launch = {**launch, "WIDTH": max(launch["WIDTH"], 4)}
    with on_device_of(call.ssm_state):
        _kernel[(rows * v_heads * cdiv(v_dim, launch["BLOCK"]),)](
            states.states,
            q,
            k,
            v,
            gate,
            strength,
            A_log,
            dt_bias,
            written,
            slots,
            write_slots,
            cu_seqlens,
            num_accepted_tokens,
            call.rounding_seed,
            call.state_scale,
            None if lower_bound is None else float(lower_bound),
            k_dim**-0.5 if call.scale is None else float(call.scale),
            slot_stride,
            head_stride,
            value_stride,
            key_stride,
            *states.strides,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            gate.stride(0),
            strength.stride(0),
            written.stride(0),
            slots_stride,
            slots_columns,
            None if write_slots is None else write_slots.stride(0),
            write_columns,
            call.output.shape[1] if not flat else None if cu_seqlens is None else v.shape[0],
            call.null_slot,
            slots_of(call.ssm_state),
            K_HEADS=k_heads,
            V_HEADS=v_heads,
            K_DIM=k_dim,
            V_DIM=v_dim,
            RAW=call.g is None,
            BY_CHANNEL=by_channel,
            L2NORM=call.qk_l2norm,
            ALIGNED=aligned,
            ROUNDS=states.rounds,
            HARDWARE=states.hardware,
            NATIVE=states.native,
            **launch,
        )
    write_back(written, call.output, flat)


def one_warp(v_dim: int, k_dim: int, itemsize: int) -> Launches:
    """Return the rule of launches: a program is one warp and has 2 KB of the state.

    More warps would have to meet at every sum; more of the state to a thread would take the registers that let many
    programs share a multiprocessor.
    """
    width = triton.next_power_of_2(k_dim)
    block = min(triton.next_power_of_2(v_dim), max(2048 // (width * max(itemsize, 2)), 1))  # in float32 it is large
    return {"_kernel": {"BLOCK": block, "WIDTH": width, "num_warps": 1}}
