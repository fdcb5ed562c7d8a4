"""One Triton kernel for the decode step of Mamba-1 and Mamba-2; its time goes into reading and writing the state.

A program owns some channels of one head of one row: their state stays in registers over all tokens of the row.
"""

from typing import TYPE_CHECKING

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
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.states import load_state, states_of, store_state

if TYPE_CHECKING:
    from mamba_ops.ops.selective_state_update.op import Arguments


@triton.jit
def _weight(values, head, channel, in_dim, DIM: tl.constexpr, PER_CHANNEL: tl.constexpr):
    # A head's number, or its channels' numbers.
    if PER_CHANNEL:
        weight = tl.load(values + head * DIM + channel, in_dim, other=0.0)
    else:
        weight = tl.load(values + head)
    return weight.to(tl.float32)


@kernel(first_number="slot_stride", static="A D dt_bias")
def _kernel(
    ssm_state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    output,
    slots,
    write_slots,
    cu_seqlens,
    num_accepted_tokens,
    rounding_seed,
    state_scale,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    dim_stride,
    dstate_stride,
    scale_stride,  # this and the next two are None without scales
    scale_head_stride,
    scale_dim_stride,
    x_stride,  # this and the next five: from token to token
    dt_stride,
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
    A_IS_FULL: tl.constexpr,
    DT_PER_CHANNEL: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    BIAS_PER_CHANNEL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    HARDWARE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    # Rows are outermost: programs that run together then read neighbouring state, and share B and C.
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // (BLOCKS * HEADS)).to(tl.int64)
    head = program // BLOCKS % HEADS
    channel = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, WIDTH)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    in_state = in_dim[:, None] & in_dstate[None, :]

    first = row
    tokens = 1
    if cu_seqlens is not None:
        first, tokens = row_tokens(row, cu_seqlens, length)
        if tokens <= 0:
            return
    elif length is not None:
        first = row * length
        tokens = length

    of_x = head * DIM + channel
    of_group = head // (HEADS // GROUPS) * DSTATE + entry
    if ALIGNED:
        of_state = of_x[:, None] * DSTATE + entry[None, :]
    else:
        of_head = head.to(tl.int64) * head_stride
        of_state = of_head + channel.to(tl.int64)[:, None] * dim_stride + entry.to(tl.int64)[None, :] * dstate_stride
    of_scale = channel
    if state_scale is not None:
        of_scale = head.to(tl.int64) * scale_head_stride + channel.to(tl.int64) * scale_dim_stride

    if num_accepted_tokens is not None:
        accepted = tl.load(num_accepted_tokens + row).to(tl.int32)
        slots += tl.minimum(tl.maximum(accepted, 1), slots_columns) - 1
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        for t in range(tokens):
            tl.store(output + (first + t) * output_stride + of_x, tl.zeros([BLOCK], tl.float32), in_dim)
        return

    s = load_state(
        ssm_state, source, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale, in_dim, ALIGNED, NATIVE
    )  # fmt: skip
    if A_IS_FULL:
        a = tl.load(A + of_x[:, None] * DSTATE + entry[None, :], in_state, other=0.0).to(tl.float32)
    else:
        a = tl.load(A + head).to(tl.float32)
    a = finite_rate(a)
    if D is not None:
        skip = _weight(D, head, channel, in_dim, DIM, D_PER_CHANNEL)
    if dt_bias is not None:
        bias = _weight(dt_bias, head, channel, in_dim, DIM, BIAS_PER_CHANNEL)

    for t in range(tokens):
        token = first + t
        u = tl.load(x + token * x_stride + of_x, in_dim, other=0.0).to(tl.float32)
        b = tl.load(offset_ptr(B, token * B_stride, ALIGNED) + of_group, in_dstate, other=0.0).to(tl.float32)
        c = tl.load(offset_ptr(C, token * C_stride, ALIGNED) + of_group, in_dstate, other=0.0).to(tl.float32)
        d = _weight(dt + token * dt_stride, head, channel, in_dim, DIM, DT_PER_CHANNEL)
        if dt_bias is not None:
            d += bias
        if SOFTPLUS:
            d = softplus(d)
        if DT_PER_CHANNEL or (BIAS_PER_CHANNEL and dt_bias is not None):
            d = d[:, None]

        s = s * tl.exp(a * d) + (b[None, :] * d) * u[:, None]
        if num_accepted_tokens is not None:
            if t < write_columns:
                target = tl.load(write_slots + row * write_stride + t).to(tl.int64)
                if is_slot(target, null_slot, slot_count):
                    store_state(
                        s, ssm_state, target, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale,
                        in_dim, rounding_seed, of_x, WIDTH, ROUNDS, HARDWARE, ALIGNED, NATIVE,
                    )  # fmt: skip

        y = tl.sum(s * c[None, :], axis=1)
        if D is not None:
            y += u * skip
        if z is not None:
            gate = tl.load(z + token * z_stride + of_x, in_dim, other=0.0).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        tl.store(output + token * output_stride + of_x, y, in_dim)

    if num_accepted_tokens is None:
        if write_slots is None:
            store_state(
                s, ssm_state, source, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale,
                in_dim, rounding_seed, of_x, WIDTH, ROUNDS, HARDWARE, ALIGNED, NATIVE,
            )  # fmt: skip
        else:
            target = tl.load(write_slots + row * write_stride).to(tl.int64)
            if is_slot(target, null_slot, slot_count):
                store_state(
                    s, ssm_state, target, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale,
                    in_dim, rounding_seed, of_x, WIDTH, ROUNDS, HARDWARE, ALIGNED, NATIVE,
                )  # fmt: skip


def selective_state_update(call: "Arguments") -> None:
    """Advance `ssm_state` in place and write `output`; shapes and meaning are the op's, and are not checked again.

    Every token of an activation must be dense, and every parameter: others are copied first, and an output that is
    not is written through a copy. Where the state is not dense within a slot, or a slot of it or a token of B or C
    does not start at a multiple of 16 bytes, the state is read and written element by element, which is slower.
    """
    if call.output.numel() == 0 or (call.cu_seqlens is not None and call.cu_seqlens.shape[0] == 1):
        return
    flat, headless = call.x.dim() < call.ssm_state.dim(), call.ssm_state.dim() == 3
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    dim, dstate = call.ssm_state.shape[-2:]
    heads, groups = (1, 1) if headless else (call.ssm_state.shape[1], call.B.shape[-2])
    dt_per_channel = call.dt.dim() == call.x.dim()

    written = by_token(call.output, flat)
    x, dt, B, C = by_token(call.x, flat), by_token(call.dt, flat), by_token(call.B, flat), by_token(call.C, flat)
    z = None if call.z is None else by_token(call.z, flat)
    A = call.A.contiguous()
    D = None if call.D is None else call.D.contiguous()
    dt_bias = None if call.dt_bias is None else call.dt_bias.contiguous()
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    num_accepted_tokens = None if call.num_accepted_tokens is None else call.num_accepted_tokens.contiguous()
    slots = None if call.slots is None else dense(call.slots)
    write_slots = None if call.write_slots is None else dense(call.write_slots)
    slots_columns = write_columns = None
    if num_accepted_tokens is not None and slots is not None:
        write_slots = slots if write_slots is None else write_slots
        slots_columns, write_columns = ((*table.shape, 1)[1] for table in (slots, write_slots))

    slots, slots_stride = or_placeholder(slots, x, tl.int32)
    slot_stride, *strides = call.ssm_state.stride()
    places = call.ssm_state.data_ptr() | B.data_ptr() | C.data_ptr()
    places |= slot_stride * call.ssm_state.itemsize | B.stride(0) * B.itemsize | C.stride(0) * C.itemsize
    aligned = places % 16 == 0 and is_dense(call.ssm_state)
    head_stride, dim_stride, dstate_stride = (None, None, None) if aligned else (0, *strides)[-3:]
    states = states_of(call)
    scale_stride, *scale_strides = states.strides
    if headless:  # its one head is at no distance
        scale_strides = [None if scale_stride is None else 0, *scale_strides]

    launch = _launches(call.ssm_state.get_device(), dim, dstate, A.dim() > 1)["_kernel"]
    if call.rounding_seed is not None:
        launch = {**launch, "WIDTH": max(launch["WIDTH"], 4)}
    with on_device_of(call.ssm_state):
        _kernel[(rows * heads * cdiv(dim, launch["BLOCK"]),)](
            states.states,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            written,
            slots,
            write_slots,
            cu_seqlens,
            num_accepted_tokens,
            call.rounding_seed,
            call.state_scale,
            slot_stride,
            head_stride,
            dim_stride,
            dstate_stride,
            scale_stride,
            *scale_strides,
            x.stride(0),
            dt.stride(0),
            B.stride(0),
            C.stride(0),
            None if z is None else z.stride(0),
            written.stride(0),
            slots_stride,
            slots_columns,
            None if write_slots is None else write_slots.stride(0),
            write_columns,
            call.output.shape[1] if not flat else None if cu_seqlens is None else x.shape[0],
            call.null_slot,
            slots_of(call.ssm_state),
            HEADS=heads,
            DIM=dim,
            DSTATE=dstate,
            GROUPS=groups,
            A_IS_FULL=A.dim() > 1,
            DT_PER_CHANNEL=dt_per_channel,
            D_PER_CHANNEL=headless or (D is not None and D.dim() > 1),
            BIAS_PER_CHANNEL=headless or (dt_bias is not None and dt_bias.dim() > 1),
            SOFTPLUS=call.dt_softplus,
            ALIGNED=aligned,
            ROUNDS=states.rounds,
            HARDWARE=states.hardware,
            NATIVE=states.native,
            **launch,
        )
    write_back(written, call.output, flat)


@tunable_launch(_kernel="BLOCK num_warps")
def _launches(dim: int, dstate: int, full_A: bool) -> Launches:
    """A program is one warp, whose threads have 32 entries of the state each, or 16 and as many of a full A.

    Small programs begin to store while others still load, and are spread evenly even where one row is all there is.
    With more threads than a channel has entries, each reads of B and C what it needs, without shared memory.
    """
    width = triton.next_power_of_2(dstate)
    entries = 512 if full_A else 1024
    block = min(triton.next_power_of_2(dim), max(entries // width, 1))
    return {"_kernel": {"BLOCK": block, "WIDTH": width, "num_warps": min(max(block * width // entries, 1), 8)}}
