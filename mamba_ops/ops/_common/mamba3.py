"""What Mamba-3's ops and its layer share: rotated states, the trapezoidal rule, and both as a scan of Mamba-2's.

The trapezoidal rule adds two products of k and v to a state at each token, its own and the one before:

    s[t] = a[t] * (s[t-1] + late[t] * v[t-1] * k[t-1]) + early[t] * v[t] * k[t]        a = exp(A * dt)

The state without the token's own product, r[t] = s[t] - early[t] * v[t] * k[t], follows

    r[t] = a[t] * r[t-1] + a[t] * (early[t-1] + late[t]) * v[t-1] * k[t-1]

which is a scan of Mamba-2's that reads each token's k and v one token later. A token more at the end of a row makes s
of r, where the state is kept.

With a rank (MIMO) a token has that many k, q and v, all products are added at once, and every q reads the same state.
Each becomes as many tokens of the scan: the first decays the state, the others do not. The q of one of them misses what
the tokens after it add, which is added to the output: nothing is subtracted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.ops._common.checking import MOST_OF_A_CHUNK
from mamba_ops.ops._common.decay import limited
from mamba_ops.ops._common.delta_rule_update import sigmoid
from mamba_ops.ops._common.slots import row_at, row_bounds

LEAST, MOST = 2.0**-66, 1e4
"""The least step of the scan, a power of two: its decay is 1, and what is divided by it is a number yet, with the same
digits. And the most: its decay is 0, and its product with 0 is."""
_SCALE = LEAST**-0.5
"""A power of two, so that nothing is rounded."""
_SUMMED = 64
"""Tokens that are summed one after another where there are many."""
_TURN = 6.28125
"""2 pi, but for what float32 cannot multiply by small whole numbers exactly."""


class Ranks(NamedTuple):
    """What makes a rank of one input and one output, each (rank, heads, dim); all None: SISO, a rank of 1."""

    x: Tensor | None = None
    z: Tensor | None = None
    o: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor | None, z: Tensor | None, o: Tensor | None, dtype: torch.dtype) -> "Ranks":
        """Take parameters, (heads, rank, dim)."""
        return cls(*(None if t is None else t.to(dtype).transpose(0, 1) for t in (x, z, o)))

    def spread(self, x: Tensor) -> Tensor:
        """Return v of x: (n, heads, dim) to (n, rank, heads, dim)."""
        return x.unsqueeze(1) if self.x is None else x.unsqueeze(1) * self.x

    def rotate(self, vectors: Tensor, angle: Tensor) -> Tensor:
        """Turn vectors (n, rank, heads, dstate) by an angle (n, heads, angles)."""
        return rotate(vectors, angle.unsqueeze(1), apart=self.x is not None)

    def finish(self, y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
        """Return an output (n, rank, heads, dim) with its skip, gated, and summed over the rank as far as it is.

        `x` and `z`: (n, heads, dim).
        """
        if D is not None:
            y = y + self.spread(x) * D.to(x.dtype).unsqueeze(-1)
        if z is not None:
            gate = z.to(x.dtype).unsqueeze(1)
            gate = gate if self.z is None else gate * self.z
            y = y * (gate.clamp(min=-88) * sigmoid(gate))  # no more is lost than sigmoid does
        if self.x is None:
            return y.squeeze(1)
        return y if self.o is None else (y * self.o).sum(1)


class Tokens(NamedTuple):
    """The activations of a call in float32 at least, all of them packed; `dt`, `A` and `trap` (tokens, heads)."""

    x: Tensor  # (tokens, heads, dim)
    dt: Tensor
    A: Tensor
    trap: Tensor
    angles: Tensor  # (tokens, angles)
    k: Tensor  # (tokens, rank, heads, dstate): B by head, with its bias
    q: Tensor  # C, so too
    ranks: Ranks = Ranks()


class Layout(NamedTuple):
    """Which row each token is in; n rows."""

    starts: Tensor  # (n,)
    ends: Tensor
    row: Tensor  # (tokens,): the row, or the last one for tokens after it
    place: Tensor  # (tokens,): the number of the token within its row
    owned: Tensor  # (tokens,): whether it is in a row


class State(NamedTuple):
    """What rows go on from: zero, where they begin."""

    angle: Tensor  # (n, heads, angles)
    k: Tensor  # (n, rank, heads, dstate), rotated
    x: Tensor  # (n, heads, dim)


def by_head(parameter: Tensor, bias: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """Return packed B or C for every head, (tokens, rank, heads, dstate), with its bias.

    Args:
        parameter: (tokens, groups, dstate), or (tokens, rank, groups, dstate).
        bias: (heads, dstate), or (heads, rank, dstate).
    """
    groups, found = parameter.shape[-2], parameter.to(dtype)
    if groups != heads:
        found = found.unsqueeze(-2).expand(*found.shape[:-1], heads // groups, -1).flatten(-3, -2)
    if bias is not None:
        found = found + (bias.to(dtype) if bias.dim() == 2 else bias.to(dtype).transpose(0, 1))
    return found if found.dim() == 4 else found.unsqueeze(1)


def operands_dtype(x: Tensor, B: Tensor, C: Tensor) -> torch.dtype:
    """Return the dtype in which k and q are multiplied."""
    return torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)


def layout(x: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """Lay out the tokens of x: (n, length, ...), or packed (tokens, ...)."""
    if cu_seqlens is None:
        n, length = x.shape[:2]
        tokens = n * length
        bounds = torch.arange(n + 1, device=x.device) * length
        starts, ends = bounds[:-1], bounds[1:]
    else:
        tokens = x.shape[0]
        starts, ends = row_bounds(cu_seqlens, tokens)
    token = torch.arange(tokens, device=x.device)
    row = row_at(ends, tokens).clamp(max=starts.shape[0] - 1)
    place = token - starts[row]
    return Layout(starts, ends, row, place, (place >= 0) & (token < ends[row]))


def turns_of(angles: Tensor, dt: Tensor) -> Tensor:
    """Return by how many half turns every pair of a head turns at a token, (..., heads, angles)."""
    return torch.tanh(angles).unsqueeze(-2) * dt.unsqueeze(-1)


def rotate(vectors: Tensor, angle: Tensor, *, apart: bool = False) -> Tensor:
    """Turn the first pairs of (..., dstate) by an angle (..., angles); the rest stays.

    A pair is two neighbours, or with `apart` two numbers that are half of dstate apart.
    """
    count, cos, sin = angle.shape[-1], angle.cos(), angle.sin()
    if apart:
        half = vectors.shape[-1] // 2
        sizes = [count, half - count, count, vectors.shape[-1] - half - count]
        first, middle, second, rest = vectors.split(sizes, dim=-1)
        return torch.cat((first * cos - second * sin, middle, first * sin + second * cos, rest), dim=-1)
    first, second = vectors[..., : 2 * count].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    return pairs if 2 * count == vectors.shape[-1] else torch.cat((pairs, vectors[..., 2 * count :]), dim=-1)


def reduced(half_turns: Tensor) -> Tensor:
    """Return half turns without whole turns, from -1 to 1; nothing is rounded. Small ones keep their digits."""
    return half_turns - 2 * torch.round(half_turns.detach() / 2)


def near_zero(angle: Tensor) -> Tensor:
    """Return an angle without whole turns, from -pi to pi. A turn is subtracted in two parts, the first exactly."""
    whole = torch.round(angle / (2 * math.pi))
    return angle - whole * _TURN - whole * (2 * math.pi - _TURN)


def sums_in_blocks(values: Tensor) -> Tensor:
    """Return `values.cumsum(0)` of finite values: a GPU sums each column by one thread, so there should be many."""
    count, pads = values.shape[0], (0,) * (2 * values.dim() - 1)
    blocks = functional.pad(values, (*pads, -count % _SUMMED)).unflatten(0, (-1, _SUMMED)).cumsum(1)
    total = blocks[:, -1]
    result: Tensor = (blocks + (total.cumsum(0) - total).unsqueeze(1)).flatten(0, 1)[:count]
    return result


def total_turns(
    tokens: Tokens,
    rows: Layout,
    state: State | None,
    row_sums: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """Return the half turns of each row up to each token, (tokens, heads, angles), from -1 to 1.

    They are summed as whole numbers, which rounds nothing: what counts is how far apart two tokens of a row are turned.
    Whole numbers have no gradients: those are the ones of `row_sums`, as `scan` has it.
    """
    turn = reduced(turns_of(tokens.angles, tokens.dt))
    one = 2.0 ** (40 if turn.dtype == torch.float32 else 50)  # a sum that overflows is right but for whole turns

    def fixed(half_turns: Tensor) -> Tensor:
        return (half_turns.detach() * one).round().long()

    def by_row(values: Tensor) -> Tensor:
        total = values.cumsum(0) if values.is_cpu else sums_in_blocks(values)
        return total - (total - values)[rows.starts.clamp(max=values.shape[0] - 1)][rows.row]

    total, before = by_row(fixed(turn)), None
    if state is not None:
        before = reduced(state.angle / math.pi)
        total = total + fixed(before)[rows.row]
    total = torch.remainder(total + int(one), 2 * int(one)) - int(one)
    result = total.to(turn.dtype) / one
    if row_sums is None:
        return result
    for_gradients = row_sums(turn.nan_to_num(0, 0, 0), None if before is None else before.nan_to_num(0, 0, 0))
    return result + (for_gradients - for_gradients.detach())


def one_later(values: Tensor, first: Tensor | None, rows: Layout) -> Tensor:
    """Return values of tokens one token later in their row; those of `first`, or zero, at the first token of it."""
    start = torch.zeros_like(values) if first is None else first.to(values.dtype)[rows.row]
    return torch.where((rows.place == 0).view(-1, *[1] * (values.dim() - 1)), start, values.roll(1, 0))


def first_alone(step: Tensor, rank: int) -> Tensor:
    """Return the steps of the scan's tokens, (n, rank, heads): the first of a rank decays by `step`, others do not."""
    step = step.unsqueeze(1)
    return step if rank == 1 else torch.cat((step, torch.full_like(step, LEAST).expand(-1, rank - 1, -1)), dim=1)


def read_at_once(k: Tensor, q: Tensor, v: Tensor, *, others: bool = False) -> Tensor:
    """Return what products of k and v give each q of the same token, (n, rank, heads, dim).

    With `others` each q of a rank gets those of the k after it alone.
    """
    rank = k.shape[1]
    if rank == 1:
        return torch.zeros_like(v) if others else (k * q).sum(-1, keepdim=True) * v
    found = q.transpose(1, 2) @ k.transpose(1, 2).transpose(2, 3)  # (n, heads, rank of q, rank of k)
    return ((found.triu(1) if others else found) @ v.transpose(1, 2)).transpose(1, 2)


class Scanned(NamedTuple):
    """What a scan leaves: the output (tokens, rank, heads, dim) without skip and gate; every token's angle and k."""

    y: Tensor
    angle: Tensor
    k: Tensor


def scan(
    tokens: Tokens,
    rows: Layout,
    chunk_scan: Callable[..., Tensor],
    chunk_size: int,
    dtype: torch.dtype,
    *,
    state: State | None = None,
    keeps: bool = False,
    row_sums: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> Scanned:
    """Run Mamba-3's recurrence by a scan of Mamba-2's, `chunk_scan`; it may record gradients.

    Args:
        tokens, rows: of the call.
        chunk_scan: `mamba_chunk_scan`, bound to a cache or to none.
        chunk_size: of its chunks.
        dtype: in which it is given k and q; v is large where steps are small, and stays in float32.
        state: what rows go on from; the recurrence's own state is in the cache. None: nothing.
        keeps: whether there is a cache.
        row_sums: returns the sum of a row's values (tokens, heads, angles) up to each token, and of what the row begins
            with (n, heads, angles), and records gradients; a row's depend on nothing of other rows. None: nothing is
            recorded.
    """
    x, dt, ranks, rank = tokens.x, tokens.dt, tokens.ranks, tokens.k.shape[1]
    angle = math.pi * total_turns(tokens, rows, state, row_sums)
    turned = ranks.rotate(tokens.k, angle)
    k, q, v = turned.to(dtype), ranks.rotate(tokens.q, angle).to(dtype), ranks.spread(x)
    early = sigmoid(tokens.trap) * dt
    late, decay = dt - early, limited(-tokens.A * dt, 0, MOST)
    step = first_alone(decay.clamp(min=LEAST), rank)
    weight = torch.exp(-decay) * (late + one_later(early, None, rows))
    v_before = one_later(v, None if state is None else ranks.spread(state.x), rows)
    k_before = one_later(k, None if state is None else state.k, rows)

    # A quotient's gradient divides twice: by the square of the least step, which float32 has only when it is scaled.
    share = weight.unsqueeze(1) / (step * _SCALE) * _SCALE
    given: tuple[Tensor, ...] = (v_before * share.unsqueeze(-1), step, k_before, q)
    ends, placed = rows.ends, None
    if keeps:
        last = ((early / LEAST)[:, None, :, None] * v, torch.full_like(step, LEAST), k, torch.zeros_like(q))
        given, ends, placed = _one_more(given, last, rows)
    scan_v, step, scan_k, scan_q = (values.flatten(0, 1) for values in given)
    A, cu_seqlens = step.new_full((step.shape[1],), -1), functional.pad(ends, (1, 0)) * rank
    chunk_size = min(chunk_size * rank, MOST_OF_A_CHUNK)
    y = chunk_scan(scan_v, step, A, scan_k, scan_q, chunk_size, cu_seqlens=cu_seqlens).unflatten(0, (-1, rank))
    k, q = k.to(x.dtype), q.to(x.dtype)
    y = (y if placed is None else y[placed]) + read_at_once(k, q, early[:, None, :, None] * v)
    if rank > 1:
        y = y + read_at_once(k_before.to(x.dtype), q, weight[:, None, :, None] * v_before, others=True)
    return Scanned(y, angle, turned)


def _one_more(
    given: tuple[Tensor, ...], last: tuple[Tensor, ...], rows: Layout
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Put a token after those of each row that has any: what `last` has for the last of them.

    Returns the tokens, where rows end among them, and where each of those given is.
    """
    count = given[0].shape[0]
    has_tokens = rows.ends > rows.starts
    added = has_tokens.cumsum(0)
    ends, shift = rows.ends + added, added - has_tokens.long()
    token = torch.arange(count + added.shape[0], device=ends.device)
    row = row_at(ends, token.shape[0]).clamp(max=added.shape[0] - 1)
    is_added = (token == (ends - 1)[row]) & has_tokens[row]
    source = (token - shift[row] - is_added.long()).clamp(0, count - 1)

    def put(values: Tensor, at_the_end: Tensor) -> Tensor:
        return torch.where(is_added.view(-1, *[1] * (values.dim() - 1)), at_the_end[source], values[source])

    placed = torch.arange(count, device=ends.device) + shift[rows.row]
    return tuple(put(*pair) for pair in zip(given, last, strict=True)), ends, placed
