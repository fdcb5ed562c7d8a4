"""One Triton kernel for the decode step of Mamba-1 and Mamba-2; its time goes into reading and writing the state.

A program owns some channels of one head of one row: their state stays in registers over all tokens of the row.
"""

import functools
from typing import TYPE_CHECKING

import torch
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


@triton.jit
def _rounded(s, r):
    # s as float16, rounded by the random words r as in mamba_ops/ops/_common/rounding.py.
    bits = s.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    exponent = tl.maximum(exponent, 113)  # below 2^-14 neighbours are as far apart as there
    steps = tl.abs(s) * ((264 - exponent) << 23).to(tl.float32, bitcast=True)
    whole = tl.floor(steps)
    u = (r >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    whole += (steps - whole >= 1.0 - u).to(tl.float32)
    size = whole * ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    return (size.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True).to(tl.float16)


@triton.jit
def _rounded_by_hardware(s, r):
    # The same for normal numbers: the instruction adds 13 random bits a number, and takes two numbers.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        shr.u32 low, $3, 19;
        shr.u32 high, $4, 19;
        shl.b32 high, high, 16;
        or.b32 low, low, high;
        cvt.rs.f16x2.f32 $0, $2, $1, low;
        }""",
        "=r,f,f,r,r",
        [s, r],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _stored(s, rounding_seed, slot, channel, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, HARDWARE: tl.constexpr):
    # What is stored of a state. Four entries in a row share one call of the generator.
    if rounding_seed is not None:
        quad = tl.arange(0, WIDTH // 4)
        zero = tl.zeros([1, WIDTH // 4], tl.uint32)
        place = channel[:, None].to(tl.uint32) + zero
        r0, r1, r2, r3 = tl.philox(
            tl.load(rounding_seed),
            quad[None, :].to(tl.uint32) + 0 * place,
            place,
            slot.to(tl.uint32) + zero,
            zero,
            ROUNDS,
        )
        words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), s.shape)
        if HARDWARE:
            s = _rounded_by_hardware(s, words)
        else:
            s = _rounded(s, words)
    return s


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
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    dim_stride,
    dstate_stride,
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

    if num_accepted_tokens is not None:
        accepted = tl.load(num_accepted_tokens + row).to(tl.int32)
        slots += tl.minimum(tl.maximum(accepted, 1), slots_columns) - 1
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        for t in range(tokens):
            tl.store(output + (first + t) * output_stride + of_x, tl.zeros([BLOCK], tl.float32), in_dim)
        return

    s = tl.load(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, in_state, other=0.0).to(tl.float32)
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
                    new = _stored(s, rounding_seed, target, of_x, WIDTH, ROUNDS, HARDWARE)
                    tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, new, in_state)

        y = tl.sum(s * c[None, :], axis=1)
        if D is not None:
            y += u * skip
        if z is not None:
            gate = tl.load(z + token * z_stride + of_x, in_dim, other=0.0).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        tl.store(output + token * output_stride + of_x, y, in_dim)

    if num_accepted_tokens is None:
        if write_slots is None:
            new = _stored(s, rounding_seed, source, of_x, WIDTH, ROUNDS, HARDWARE)
            tl.store(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, new, in_state)
        else:
            target = tl.load(write_slots + row * write_stride).to(tl.int64)
            if is_slot(target, null_slot, slot_count):
                new = _stored(s, rounding_seed, target, of_x, WIDTH, ROUNDS, HARDWARE)
                tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, new, in_state)


@functools.cache
def _rounds_by_hardware(device: torch.device) -> bool:
    """Whether the GPU has the instruction that rounds stochastically, cvt.rs."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.get_device_module(device).get_device_capability(device) in ((10, 0), (10, 3))


def selective_state_update(call: "Arguments") -> None:
    """Advance `ssm_state` in place and write `output`; shapes and meaning are the op's, and are not checked again.

    Every token of an activation must be dense, and every parameter: others are copied first, and an output that is
    not is written through a copy. Where the state is not dense within a slot, or a slot of it or a token of B or C
    does not start at a multiple of 16 bytes, the state is read and written element by element, which is slower.
    """
    philox_rounds = call.philox_rounds or 10
    round_by_hardware = call.rounding_seed is not None and _rounds_by_hardware(call.x.device)
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

    launch = _launches(call.ssm_state.get_device(), dim, dstate, A.dim() > 1)["_kernel"]
    if call.rounding_seed is None:  # then neither is to tell kernels apart
        philox_rounds, round_by_hardware = 0, False
    else:
        launch = {**launch, "WIDTH": max(launch["WIDTH"], 4)}
    with on_device_of(call.ssm_state):
        _kernel[(rows * heads * cdiv(dim, launch["BLOCK"]),)](
            call.ssm_state,
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
            slot_stride,
            head_stride,
            dim_stride,
            dstate_stride,
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
            ROUNDS=philox_rounds,
            HARDWARE=round_by_hardware,
            **launch,
        )
    write_back(written, call.output, flat)


@tunable_launch(_kernel="BLOCK num_warps")
def _launches(dim: int, dstate: int, full_A: bool) -> Launches:
    """A thread has 32 entries of the state, or 16 and as many of a full A.

    With more threads than a channel has entries, each reads of B and C what it needs, without shared memory.
    """
    width = triton.next_power_of_2(dstate)
    entries = 4096 if full_A else 8192
    block = min(triton.next_power_of_2(dim), max(entries // width, 1))
    return {"_kernel": {"BLOCK": block, "WIDTH": width, "num_warps": min(max(8 * block * width // entries, 1), 8)}}
