"""What a chunk's tokens keep of each other: sums of the logarithms of decays, and differences of those sums.

The decay from token j to token i is 2 to the power of total[i] - total[j], where total are sums since the chunk began.
In float32 these sums fail under strong decay: one token of -1e6 leaves an error of 0.06 in every later difference, -inf
leaves NaN, and a parallel scan of one sign is not even monotone, so that a difference can turn positive and overflow
(state-spaces/mamba#713). Here the sums are integers, in units of 2^-40:

- A logarithm below -256 counts as -256: 2^-256 is zero in float32, so a decay over such a token is exactly zero, -inf
  included. 4096 tokens of it fit in an int64.
- Sums of integers are exact, in whatever order a scan adds: they never rise where nothing grows, and bits do not depend
  on the device. All that is lost is 2^-40 a token.
- A matrix of differences is to cost no more than in float32. `split` therefore rounds a sum to the nearest float32, and
  gives what that leaves out as two factors near 1, one for each side of a difference:
  2^(total[i] - total[j]) = 2^(near[i] - near[j]) * up[i] * down[j]. Each goes into a factor that a kernel has there
  anyway. Rounding keeps the order, so no difference of `near` is positive either.
- Where a sum is not subtracted, its float32 is enough: 2^s changes by s * 2^-24 * 2^s, which is small for every s.
"""

import triton
import triton.language as tl

_LIMIT: tl.constexpr = tl.constexpr(256.0)
_UNITS: tl.constexpr = tl.constexpr(2.0**40)


@triton.jit
def finite_rate(rate):
    # A rate of which a step of 0 makes a decay of 1: -1e30 stands for -inf.
    return tl.where(rate < -1e30, -1e30, rate)


@triton.jit
def exact_sums(log2_decay):
    # Of a chunk's tokens, the first axis: sums up to each token with it, and of those after it, in units of 2^-40.
    # NaN counts as -256: a caller makes it NaN elsewhere.
    limited = tl.where(log2_decay > -_LIMIT, tl.minimum(log2_decay, _LIMIT), -_LIMIT)
    steps = (limited * _UNITS).to(tl.int64)
    total = tl.cumsum(steps, 0)
    return total, tl.expand_dims(tl.sum(steps, 0), 0) - total


@triton.jit
def to_log2(total):
    # A sum as a float32.
    return total.to(tl.float32) * (1.0 / _UNITS)


@triton.jit
def split(total):
    # The float32 nearest to a sum, 2 to the power of what that leaves out, and one over that. What is left out is at
    # most 2^-5: a polynomial is closer than a GPU's exp2.
    near = total.to(tl.float32)
    rest = (total - near.to(tl.int64)).to(tl.float32) * (0.6931471805599453 / _UNITS)
    up = 1.0 + rest * (1.0 + rest * (0.5 + rest * (1.0 / 6)))
    down = 1.0 - rest * (1.0 - rest * (0.5 - rest * (1.0 / 6)))
    return near * (1.0 / _UNITS), up, down


@triton.jit
def sums_from(pairs, operand: tl.constexpr, PRECISION: tl.constexpr):
    # For matrices of pairs of tokens: the sums of every row from each column on. By a matrix product, in which sums
    # cost no exchange between threads; float16 has too narrow a range for what is no product's operand already.
    if operand == tl.float16:
        return tl.cumsum(pairs, 1, reverse=True)
    else:
        i = tl.arange(0, pairs.shape[1])
        from_on = (i[:, None] >= i[None, :]).to(operand)
        return tl.dot(pairs.to(operand), from_on, input_precision=PRECISION)
