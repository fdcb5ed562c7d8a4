"""How kernels that advance states load and store them: wide, narrow with a scale for each row, rounded by a seed.

Formulas: mamba_ops/ops/_common/narrow.py and rounding.py. Floats of 8 bits come as bytes: GPUs that have instructions
for them convert by these (NATIVE), others by shifts.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import offset_ptr


class States(NamedTuple):
    """What a kernel gets about a call's states, beside their strides.

    Attributes:
        states: the cache; of 8-bit floats as bytes.
        strides: of scales, by slot and each further axis; Nones without them.
        rounds: of the generator; 0 where states are rounded to the nearest.
        hardware: whether float16 is rounded stochastically by an instruction.
        native: whether there are instructions for 8-bit floats.
    """

    states: Tensor
    strides: tuple[int | None, ...]
    rounds: int
    hardware: bool
    native: bool


def states_of(call: Any) -> States:
    """Read what a call says about its states."""
    states, scale, seeded = call.ssm_state, call.state_scale, call.rounding_seed is not None
    is_byte = states.dtype == torch.float8_e4m3fn
    return States(
        states.view(torch.uint8) if is_byte else states,
        (None,) * (states.dim() - 1) if scale is None else scale.stride(),
        (call.philox_rounds or 10) if seeded else 0,  # else neither is to tell kernels apart
        seeded and states.dtype == torch.float16 and _capability(states.device) in ((10, 0), (10, 3)),
        is_byte and _capability(states.device) >= (8, 9),
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU, whose instructions are known by it; (0, 0) for anything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0, 0
    major, minor = torch.get_device_module(device).get_device_capability(device)
    return major, minor


@triton.jit
def _rounded(s, r, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    # s on the grid of a format with so many bits after the first, whose numbers are as far apart below the exponent
    # LEAST as there (as float32 counts them, from 127): by the random words r, or without them to the nearest, to even.
    bits = s.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    exponent = tl.maximum(exponent, LEAST)
    steps = tl.abs(s) * ((254 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    if r is None:
        whole = (steps + 12582912.0) - 12582912.0  # 1.5 * 2^23: there neighbours are 1 apart
    else:
        whole = tl.floor(steps)
        u = (r >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        whole += (steps - whole >= 1.0 - u).to(tl.float32)
    size = whole * ((exponent - MANTISSA) << 23).to(tl.float32, bitcast=True)
    return (size.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_by_hardware(s, r):
    # The same in float16, for normal numbers: the instruction adds 13 random bits a number, and takes two numbers.
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
def _words(s, rounding_seed, slot, channel, WIDTH: tl.constexpr, ROUNDS: tl.constexpr):
    # A random word for every entry of a state. Four entries in a row share one call of the generator.
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
    return tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), s.shape)


@triton.jit
def _from_byte(byte, NATIVE: tl.constexpr):
    # The float32 that a byte of float8_e4m3fn is.
    if NATIVE:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        size = (byte & 0x7F).to(tl.uint32)
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        normal = tl.where(size == 0x7F, float("nan"), normal)
        wide = tl.where(size < 8, size.to(tl.int32).to(tl.float32) * 0.001953125, normal)  # 2^-9
        return tl.where(byte >= 0x80, -wide, wide)


@triton.jit
def _to_byte(q, r, NATIVE: tl.constexpr):
    # The byte of float8_e4m3fn that q, at most 448, is rounded to.
    if NATIVE:
        if r is not None:
            q = _rounded(q, r, 3, 121)
        return q.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        q = _rounded(q, r, 3, 121)
        bits = q.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        small = (tl.abs(q) * 512.0).to(tl.int32).to(tl.uint32)
        size = tl.where(size < (121 << 23), small, (size - (120 << 23)) >> 20)
        return (size | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def load_state(
    ssm_state, slot, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale, in_row,
    ALIGNED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    # A slot's state, in float32.
    state = offset_ptr(ssm_state, slot * slot_stride, ALIGNED) + of_state
    if state_scale is None:
        return tl.load(state, in_state, other=0.0).to(tl.float32)
    else:
        s = tl.load(state, in_state, other=0)
        s = _from_byte(s, NATIVE) if s.dtype == tl.uint8 else s.to(tl.float32)
        return s * tl.load(state_scale + slot * scale_stride + of_scale, in_row, other=0.0)[:, None]


@triton.jit
def store_state(
    s, ssm_state, slot, slot_stride, of_state, in_state, state_scale, scale_stride, of_scale, in_row, rounding_seed,
    channel, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, HARDWARE: tl.constexpr, ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    # Store a state in a slot; `channel` counts its rows through all heads.
    state = offset_ptr(ssm_state, slot * slot_stride, ALIGNED) + of_state
    words = None if rounding_seed is None else _words(s, rounding_seed, slot, channel, WIDTH, ROUNDS)
    if state_scale is None:
        if words is not None:
            s = _rounded_by_hardware(s, words) if HARDWARE else _rounded(s, words, 10, 113).to(tl.float16)
        tl.store(state, s, in_state)
    else:
        # By the bits of numbers, infinity is the largest but for NaN.
        size = tl.max((s.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32), axis=1)
        is_byte: tl.constexpr = ssm_state.dtype.element_ty == tl.uint8
        most: tl.constexpr = 448.0 if is_byte else 32767.0
        finite = size < 0x7F800000
        scale = tl.div_rn(tl.where(finite, size, 0).to(tl.float32, bitcast=True), tl.full(size.shape, most, tl.float32))
        scale = tl.maximum(scale, 1.1754943508222875e-38)  # 2^-126
        q = s * tl.div_rn(tl.full(size.shape, 1.0, tl.float32), scale)[:, None]
        q = tl.where(finite[:, None], tl.minimum(tl.maximum(q, -most), most), 0.0)
        tl.store(state_scale + slot * scale_stride + of_scale, tl.where(finite, scale, float("nan")), in_row)
        if is_byte:
            tl.store(state, _to_byte(q, words, NATIVE), in_state)
        else:
            tl.store(state, _rounded(q, words, 15, 142).to(tl.int16), in_state)
