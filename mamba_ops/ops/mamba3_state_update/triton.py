"""One Triton kernel for the decode step of Mamba-3 with one input and output a head.

A program owns a head of a row, so no other reads what it overwrites. The state of some channels, most often of all,
stays in registers over all tokens of the row.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import (
    is_slot,
    kernel,
    load_slot,
    offset_ptr,
    on_device_of,
    or_placeholder,
    row_tokens,
    slots_of,
)
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.mamba3 import gated, half_turns, log_decay, rotated, sin_cos, turned

if TYPE_CHECKING:
    from mamba_ops.ops.mamba3_state_update.op import Arguments


@triton.jit
def _keep(
    angle, s, k, v, angle_state, ssm_state, k_state, v_state, slot, angle_stride, slot_stride, k_stride, v_stride,
    of_angle, of_state, of_k, of_v, is_angle, in_state, in_k, in_v, ALIGNED: tl.constexpr,
):  # fmt: skip
    # Store a head's states in a slot.
    tl.store(offset_ptr(ssm_state, slot * slot_stride, ALIGNED) + of_state, s, in_state)
    tl.store(v_state + slot * v_stride + of_v, v, in_v)
    tl.store(k_state + slot * k_stride + of_k, k, in_k)
    tl.store(angle_state + slot * angle_stride + of_angle, angle, is_angle)


@kernel(first_number="angle_stride", static="B_bias C_bias D")
def _kernel(
    angle_state,
    ssm_state,
    k_state,
    v_state,
    x,
    dt,
    A,
    trap,
    angles,
    B,
    C,
    B_bias,
    C_bias,
    D,
    z,
    output,
    slots,
    write_slots,
    cu_seqlens,
    num_accepted_tokens,
    angle_stride,  # this and the next three: from slot to slot
    slot_stride,
    k_stride,
    v_stride,
    angle_head_stride,  # this and the next eight are None for ALIGNED caches, which are dense
    angle_pair_stride,
    head_stride,
    dim_stride,
    dstate_stride,
    k_head_stride,
    k_entry_stride,
    v_head_stride,
    v_entry_stride,
    x_stride,  # this and the next eight: from token to token
    dt_stride,
    A_stride,
    trap_stride,
    angles_stride,
    B_stride,
    C_stride,
    z_stride,
    output_stride,
    slots_stride,
    slots_columns,
    write_stride,
    write_columns,
    length,  # tokens of every row; None for one; of all packed rows together
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    ANGLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // HEADS).to(tl.int64)
    head = program % HEADS
    entry = tl.arange(0, WIDTH)
    pair = entry // 2
    is_first = entry % 2 == 0
    turns = pair < ANGLES
    in_dstate = entry < DSTATE

    first = row
    tokens = 1
    if cu_seqlens is not None:
        first, tokens = row_tokens(row, cu_seqlens, length)
        if tokens <= 0:
            return
    elif length is not None:
        first = row * length
        tokens = length

    if num_accepted_tokens is not None:
        accepted = tl.load(num_accepted_tokens + row).to(tl.int32)
        slots += tl.minimum(tl.maximum(accepted, 1), slots_columns) - 1
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)

    of_group = head // (HEADS // GROUPS) * DSTATE + entry
    of_other = head // (HEADS // GROUPS) * DSTATE + (entry ^ 1)
    of_angle = head * ANGLES + pair
    of_k = head * DSTATE + entry
    if not ALIGNED:
        of_head = head.to(tl.int64)
        of_angle = of_head * angle_head_stride + pair.to(tl.int64) * angle_pair_stride
        of_k = of_head * k_head_stride + entry.to(tl.int64) * k_entry_stride
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    if B_bias is not None:
        more_k = tl.load(B_bias + head * DSTATE + entry, in_dstate, other=0.0).to(tl.float32)
        more_of_other_k = tl.load(B_bias + head * DSTATE + (entry ^ 1), turns, other=0.0).to(tl.float32)
    if C_bias is not None:
        more_q = tl.load(C_bias + head * DSTATE + entry, in_dstate, other=0.0).to(tl.float32)
        more_of_other_q = tl.load(C_bias + head * DSTATE + (entry ^ 1), turns, other=0.0).to(tl.float32)

    for low in range(0, DIM, BLOCK):
        channel = low + tl.arange(0, BLOCK)
        in_dim = channel < DIM
        in_state = in_dim[:, None] & in_dstate[None, :]
        of_x = head * DIM + channel
        of_v = of_x
        if ALIGNED:
            of_state = of_x[:, None] * DSTATE + entry[None, :]
        else:
            of_v = of_head * v_head_stride + channel.to(tl.int64) * v_entry_stride
            of_state = of_head * head_stride + channel.to(tl.int64)[:, None] * dim_stride
            of_state += entry.to(tl.int64)[None, :] * dstate_stride
        is_last = low + BLOCK >= DIM  # what all channels share is stored with the last ones
        is_angle = turns & is_first & is_last
        in_k = in_dstate & is_last

        if source < 0:
            for t in range(tokens):
                tl.store(output + (first + t) * output_stride + of_x, tl.zeros([BLOCK], tl.float32), in_dim)
        else:
            s = tl.load(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, in_state, other=0.0)
            s = s.to(tl.float32)
            angle = tl.load(angle_state + source * angle_stride + of_angle, turns, other=0.0).to(tl.float32)
            k_before = tl.load(k_state + source * k_stride + of_k, in_dstate, other=0.0).to(tl.float32)
            v_before = tl.load(v_state + source * v_stride + of_v, in_dim, other=0.0).to(tl.float32)
            tl.debug_barrier()  # all threads have read what some of them overwrite

            for t in range(tokens):
                token = first + t
                u = tl.load(x + token * x_stride + of_x, in_dim, other=0.0).to(tl.float32)
                d = tl.load(dt + token * dt_stride + head).to(tl.float32)
                rate = tl.load(A + token * A_stride + head).to(tl.float32)
                share = tl.load(trap + token * trap_stride + head).to(tl.float32)
                raw = tl.load(angles + token * angles_stride + pair, turns, other=0.0).to(tl.float32)
                b = tl.load(B + token * B_stride + of_group, in_dstate, other=0.0).to(tl.float32)
                c = tl.load(C + token * C_stride + of_group, in_dstate, other=0.0).to(tl.float32)
                other_b = tl.load(B + token * B_stride + of_other, turns, other=0.0).to(tl.float32)
                other_c = tl.load(C + token * C_stride + of_other, turns, other=0.0).to(tl.float32)
                if B_bias is not None:
                    b += more_k
                    other_b += more_of_other_k
                if C_bias is not None:
                    c += more_q
                    other_c += more_of_other_q

                angle = tl.where(turns, turned(angle, half_turns(raw, d)), 0.0)
                sine, cosine = sin_cos(angle)
                k = rotated(b, other_b, sine, cosine, is_first)
                q = rotated(c, other_c, sine, cosine, is_first)
                early = tl.sigmoid(share) * d
                late = tl.sigmoid(-share) * d
                s += (v_before * late)[:, None] * k_before[None, :]
                s = s * tl.exp(log_decay(rate, d)) + (u * early)[:, None] * k[None, :]
                k_before = k
                v_before = u
                if num_accepted_tokens is not None:
                    if t < write_columns:
                        target = tl.load(write_slots + row * write_stride + t).to(tl.int64)
                        if is_slot(target, null_slot, slot_count):
                            _keep(
                                angle, s, k, u, angle_state, ssm_state, k_state, v_state, target, angle_stride,
                                slot_stride, k_stride, v_stride, of_angle, of_state, of_k, of_v, is_angle, in_state,
                                in_k, in_dim, ALIGNED,
                            )  # fmt: skip

                y = tl.sum(s * q[None, :], axis=1)
                if D is not None:
                    y += u * skip
                if z is not None:
                    y = gated(y, tl.load(z + token * z_stride + of_x, in_dim, other=0.0).to(tl.float32))
                tl.store(output + token * output_stride + of_x, y, in_dim)

            if num_accepted_tokens is None:
                target = source
                stored = True
                if write_slots is not None:
                    target = tl.load(write_slots + row * write_stride).to(tl.int64)
                    stored = is_slot(target, null_slot, slot_count)
                if stored:
                    _keep(
                        angle, s, k_before, v_before, angle_state, ssm_state, k_state, v_state, target, angle_stride,
                        slot_stride, k_stride, v_stride, of_angle, of_state, of_k, of_v, is_angle, in_state, in_k,
                        in_dim, ALIGNED,
                    )  # fmt: skip


def mamba3_state_update(call: "Arguments") -> None:
    """Advance the caches in place and write `output`; shapes and meaning are the op's, and are not checked again.

    Every token of an activation must be dense, and every parameter: others are copied first, and an output that is
    not is written through a copy. Where a cache is not dense within a slot, or a slot of ssm_state does not start at a
    multiple of 16 bytes, caches are read and written element by element, which is slower.
    """
    if call.output.numel() == 0 or (call.cu_seqlens is not None and call.cu_seqlens.shape[0] == 1):
        return
    flat = call.x.dim() == 3
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    heads, dim, dstate = call.ssm_state.shape[1:]

    written = by_token(call.output, flat)
    tokens = [by_token(t, flat) for t in (call.x, call.dt, call.A, call.trap, call.angles, call.B, call.C)]
    z = None if call.z is None else by_token(call.z, flat)
    B_bias, C_bias, D = (None if t is None else t.contiguous() for t in (call.B_bias, call.C_bias, call.D))
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    num_accepted_tokens = None if call.num_accepted_tokens is None else call.num_accepted_tokens.contiguous()
    slots = None if call.slots is None else dense(call.slots)
    write_slots = None if call.write_slots is None else dense(call.write_slots)
    slots_columns = write_columns = None
    if num_accepted_tokens is not None and slots is not None:
        write_slots = slots if write_slots is None else write_slots
        slots_columns, write_columns = ((*table.shape, 1)[1] for table in (slots, write_slots))
    slots, slots_stride = or_placeholder(slots, tokens[0], tl.int32)

    caches = (call.angle_state, call.ssm_state, call.k_state, call.v_state)
    places = call.ssm_state.data_ptr() | call.ssm_state.stride(0) * call.ssm_state.itemsize
    aligned = places % 16 == 0 and all(map(is_dense, caches))
    inner = [None if aligned else stride for cache in caches for stride in cache.stride()[1:]]

    with on_device_of(call.ssm_state):
        _kernel[(rows * heads,)](
            *caches,
            *tokens,
            B_bias,
            C_bias,
            D,
            z,
            written,
            slots,
            write_slots,
            cu_seqlens,
            num_accepted_tokens,
            *(cache.stride(0) for cache in caches),
            *inner,
            *(t.stride(0) for t in tokens),
            None if z is None else z.stride(0),
            written.stride(0),
            slots_stride,
            slots_columns,
            None if write_slots is None else write_slots.stride(0),
            write_columns,
            call.output.shape[1] if not flat else None if cu_seqlens is None else call.x.shape[0],
            call.null_slot,
            slots_of(call.ssm_state),
            HEADS=heads,
            DIM=dim,
            DSTATE=dstate,
            GROUPS=call.B.shape[-2],
            ANGLES=call.angles.shape[-1],
            ALIGNED=aligned,
            **_launches(call.ssm_state.get_device(), dim, dstate)["_kernel"],
        )
    write_back(written, call.output, flat)


@tunable_launch(_kernel="BLOCK num_warps")
def _launches(dim: int, dstate: int) -> Launches:
    """A thread has 32 entries of the state."""
    width = triton.next_power_of_2(dstate)
    block = min(triton.next_power_of_2(dim), max(8192 // width, 1))
    return {"_kernel": {"BLOCK": block, "WIDTH": width, "num_warps": min(max(block * width // 1024, 1), 8)}}
