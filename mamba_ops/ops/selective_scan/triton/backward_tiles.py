"""Device functions of the selective scan's backward pass: what a thread has in registers of a tile."""

# mypy: disable-error-code="assignment,misc"
# Tuples grow in what Triton compiles.
import triton
import triton.language as tl

from mamba_ops.ops.selective_scan.triton.device import step_size


@triton.jit
def of_chunk(program, DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    # A program's chunk, its group, its block of channels in the group, these channels, and whether there are such.
    OF_GROUP: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK - 1) // BLOCK
    block = program % BLOCKS
    group = program // BLOCKS % GROUPS
    in_group = block * BLOCK + tl.arange(0, BLOCK)
    return program // (BLOCKS * GROUPS), group, block, group * OF_GROUP + in_group, in_group < OF_GROUP


@triton.jit
def moved(pointers, offset, PAIRS: tl.constexpr):
    # Pointers to a token's channels. With PAIRS, two channels are read or written at once.
    pointers += offset
    if PAIRS:
        BITS: tl.constexpr = pointers.dtype.element_ty.primitive_bitwidth
        pointers = tl.multiple_of(pointers, BITS // 4)
    return pointers


@triton.jit
def sigmoid(v, BITS: tl.constexpr):
    # Of numbers of so many bits. A GPU has an instruction for a root's reciprocal, good to 22 bits; a division is
    # several. tl.exp takes three more instructions than tl.exp2, for denormals.
    shifted = 1.0 + tl.exp2(v * -1.4426950408889634)
    if BITS > 16:
        return 1.0 / shifted
    else:
        root = tl.rsqrt(shifted)
        return root * root


@triton.jit
def read_tile(
    x,
    dt,
    z,
    grad_output,
    bias,
    start,
    high,
    channel,
    in_dim,
    x_token,
    dt_token,
    z_token,
    grad_token,
    SOFTPLUS: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
):
    # Of the tokens of a tile: step sizes, what is pushed into the state for every number of B, and what is pulled back
    # for every number of C. All are zero where there is no token.
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    d = ()
    u = ()
    pulled = ()
    at = start.to(tl.int64)
    x = moved(x + at * x_token, channel, PAIRS)
    dt = moved(dt + at * dt_token, channel, PAIRS)
    grad_output = moved(grad_output + at * grad_token, channel, PAIRS)
    if z is not None:
        z = moved(z + at * z_token, channel, PAIRS)
    for t in tl.static_range(TILE):
        there = in_dim & (start + t < high)
        step = step_size(tl.load(dt, there, other=0.0).to(tl.float32), bias, SOFTPLUS)
        step = tl.where(there, step, 0.0)
        value = tl.load(x, there, other=0.0).to(tl.float32)
        grad = tl.load(grad_output, there, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z, there, other=0.0).to(tl.float32)
            grad *= gate * sigmoid(gate, BITS)
            z = moved(z, z_token, PAIRS)
        x = moved(x, x_token, PAIRS)
        dt = moved(dt, dt_token, PAIRS)
        grad_output = moved(grad_output, grad_token, PAIRS)
        d += (step,)
        u += (step * value,)
        pulled += (grad,)
    return d + u + pulled  # one tuple: an older Triton returns no tuples of tuples


@triton.jit
def read_pairs(arranged, TILE: tl.constexpr, BLOCK: tl.constexpr):
    # The numbers of B of a tile and those of C, of one entry, for every channel. Those of two tokens are one read, by
    # an address of each thread's own.
    bs = ()
    cs = ()
    for word in tl.static_range(TILE // 2):
        place = arranged[:, None] + (word * 4 + tl.arange(0, 4))[None, :]
        found = tl.load(tl.multiple_of(place, (16, 16)))
        of_B, of_C = tl.split(tl.reshape(found, [32, 2, 2]))
        of_B = tl.split(of_B)
        of_C = tl.split(of_C)
        for token in tl.static_range(2):
            bs += (tl.reshape(tl.broadcast_to(of_B[token][:, None], [32, BLOCK // 32]), [BLOCK]),)
            cs += (tl.reshape(tl.broadcast_to(of_C[token][:, None], [32, BLOCK // 32]), [BLOCK]),)
    return bs + cs
