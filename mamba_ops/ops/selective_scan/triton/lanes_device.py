"""Device functions of the selective scan's kernel whose lanes share states, `lanes`.

Tensors have a number for each lane of a warp. Lanes that share the states of some channels have a part of each, and of
a tile of as many tokens each has the x, dt and z of one.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"
# Tuples grow in what Triton compiles.
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import silu
from mamba_ops.ops.selective_scan.triton.device import decays, next_state, numbers_of, products, read_out, step_size


@triton.jit
def advance(more, stride, TOKENS: tl.constexpr):
    # How far a pointer moves: to the next tile, if there is one. Where it did so always, compilers would keep a pointer
    # for every token of a tile, and add what lanes have in common and what not apart.
    return tl.where(more, stride, 0).to(tl.int64) * TOKENS


@triton.jit
def load_tile(x, dt, z, there, in_dim, APART: tl.constexpr):
    # x, dt and z of every channel of a lane as they lie in memory.
    found = ()
    for i in tl.static_range(len(in_dim)):
        mask = in_dim[i] & there
        found += (tl.load(x + i * APART, mask, other=0.0), tl.load(dt + i * APART, mask, other=0.0))
        if z is not None:
            found += (tl.load(z + i * APART, mask, other=0.0),)
    return found


@triton.jit
def load_words(
    tensor,  # for every lane the address of its part of a token; compilers do not know that many are one
    stride,
    entry,
    DSTATE: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
):
    # B or C of the tokens of a tile as they lie in memory, with WORDS in words of 32 bits, several at once.
    found = ()
    BYTES: tl.constexpr = tensor.dtype.element_ty.primitive_bitwidth // 8
    COUNT: tl.constexpr = 16 // BYTES if 16 // BYTES < WIDTH else WIDTH
    LONG: tl.constexpr = COUNT * BYTES // 4  # words of 32 bits at once
    for t in tl.static_range(TOKENS):
        of_token = tensor + t * stride.to(tl.int64)
        if WORDS:
            words = of_token.to(tl.pointer_type(tl.int32), bitcast=True)
            for word in tl.static_range(WIDTH // COUNT):
                place = words[:, None] + (word * LONG + tl.arange(0, LONG)[None, :])
                place = tl.multiple_of(place, (4 * LONG, 4 * LONG))
                if PARTS * WIDTH > DSTATE:
                    some = tl.load(place, (entry + word * COUNT < DSTATE)[:, None], other=0)
                else:
                    some = tl.load(place)
                if LONG > 2:
                    evens, odds = tl.split(tl.reshape(some, [tensor.shape[0], 2, 2]))
                    evens = tl.split(evens)
                    odds = tl.split(odds)
                    found += (evens[0], odds[0], evens[1], odds[1])
                else:
                    found += tl.split(some)
        else:
            for number in tl.static_range(WIDTH):
                if PARTS * WIDTH > DSTATE:
                    found += (tl.load(of_token + number, entry + number < DSTATE, other=0.0),)
                else:
                    found += (tl.load(of_token + number),)
    return found


@triton.jit
def words_in_float32(values, dtype: tl.constexpr, WORDS: tl.constexpr):
    found = ()
    for i in tl.static_range(len(values)):
        if WORDS:
            found += numbers_of(values[i], dtype)
        else:
            found += (values[i].to(tl.float32),)
    return found


@triton.jit
def swapped(values, APART: tl.constexpr, LANES: tl.constexpr):
    # Those that are APART in each other's place. Bits cancel, so that an exchange is all that is left.
    bits = tl.reshape(values.to(tl.int32, bitcast=True), [LANES // (2 * APART), 2, APART])
    return tl.reshape(bits ^ tl.xor_sum(bits, axis=1, keep_dims=True), [LANES]).to(tl.float32, bitcast=True)


@triton.jit
def halved(values, APART: tl.constexpr, LANES: tl.constexpr):
    # Half as many tensors: of every two, adds the numbers that are APART, and has the sums of the first tensor where
    # that bit of the place is not set, those of the second where it is. A lane sends what another one adds.
    is_one = tl.arange(0, LANES) & APART == 0
    sums = ()
    for pair in tl.static_range(len(values) // 2):
        one = values[2 * pair]
        other = values[2 * pair + 1]
        sums += (tl.where(is_one, one, other) + swapped(tl.where(is_one, other, one), APART, LANES),)
    return sums


@triton.jit
def tile_outputs(
    output,
    s,
    left,
    total,
    now,  # x, dt and z of each channel
    b,
    c,
    rates,
    bias,
    skip,
    lane,
    there,
    SOFTPLUS: tl.constexpr,
    APART: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,  # as many as parts of a state, of which a lane has one, or one, which every lane has
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    GATED: tl.constexpr,
):
    # Write the outputs of a tile of tokens; return the states after it, those as if the chunk began with nothing, and
    # the sums of step sizes.
    LANES: tl.constexpr = lane.shape[0]
    BITS: tl.constexpr = output.dtype.element_ty.primitive_bitwidth
    PER: tl.constexpr = len(now) // CHANNELS
    steps = ()
    pushed = ()
    for i in tl.static_range(CHANNELS):
        if bias is not None:
            step = step_size(now[PER * i + 1], bias[i], SOFTPLUS)
        else:
            step = step_size(now[PER * i + 1], None, SOFTPLUS)
        steps += (step,)
        pushed += (step * now[PER * i],)
    found = ()
    for t in tl.static_range(TOKENS):
        of_lane = t * APART + lane % APART
        for i in tl.static_range(CHANNELS):
            step = steps[i]
            push = pushed[i]
            if TOKENS > 1:
                step = tl.gather(step, of_lane, 0)
                push = tl.gather(push, of_lane, 0)
            decay = decays(step, rates[i * WIDTH : (i + 1) * WIDTH], WIDTH)
            added = products(push, b[t * WIDTH : (t + 1) * WIDTH], WIDTH)
            after = next_state(s[:WIDTH], decay, added, WIDTH)
            s = s[WIDTH:] + after
            left = left[WIDTH:] + next_state(left[:WIDTH], decay, added, WIDTH)  # as if the chunk began with nothing
            total = total[1:] + (total[0] + step,)  # noqa: RUF005 - no stars in Triton
            found += (read_out(after, c[t * WIDTH : (t + 1) * WIDTH], WIDTH, 1),)
    for i in tl.static_range(CHANNELS):
        mine = ()
        for t in tl.static_range(TOKENS):
            mine += (found[t * CHANNELS + i],)
        for level in tl.static_range(LEVELS):
            if TOKENS > 1:
                mine = halved(mine, APART << level, LANES)
            else:
                mine = (mine[0] + swapped(mine[0], APART << level, LANES),)
        y = mine[0]
        if skip is not None:
            y = tl.fma(now[PER * i], skip[i], y)
        if GATED:
            y *= silu(now[PER * i + 2], BITS)
        tl.store(output + i * APART, y, there[i])
    return s + left + total
