"""What Mamba-3's ops and its layer share: rotated states, the trapezoidal rule, and both as a scan of Mamba-2's.

The trapezoidal rule adds two products of k and v to a state at each token, its own and the one before:

    s[t] = a[t] * (s[t-1] + late[t] * v[t-1] * k[t-1]) + early[t] * v[t] * k[t]        a = exp(A * dt)

The state without the token's own product, r[t] = s[t] - early[t] * v[t] * k[t], follows

    r[t] = a[t] * r[t-1] + a[t] * (early[t-1] + late[t]) * v[t-1] * k[t-1]

which is a scan of Mamba-2's that reads each token's k and v one token later. A token more at the end of a row makes s
of r, where the state is kept.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.ops._common.slots import row_at, row_bounds

LEAST = 1e-20
"""The least step of the scan: its decay is 1, and what is divided by it is a number yet."""


_TURN = 6.28125
"""2 pi, but for what float32 cannot multiply by small whole numbers exactly."""


class Tokens(NamedTuple):
    """The activations of a call in float32 at least, all of them packed; `dt`, `A` and `trap` (tokens, heads)."""

    x: Tensor  # (tokens, heads, dim)
    dt: Tensor
    A: Tensor
    trap: Tensor
    angles: Tensor  # (tokens, angles)
    k: Tensor  # (tokens, heads, dstate): B by head, with its bias
    q: Tensor  # C, so too


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
    k: Tensor  # (n, heads, dstate), rotated
    v: Tensor  # (n, heads, dim)


def by_head(parameter: Tensor, bias: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """Return B or C, (..., groups, dstate), for every head, with its bias (heads, dstate)."""
    groups, found = parameter.shape[-2], parameter.to(dtype)
    if groups != heads:
        found = found.unsqueeze(-2).expand(*found.shape[:-1], heads // groups, -1).flatten(-3, -2)
    return found if bias is None else found + bias.to(dtype)


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


def advance(angles: Tensor, dt: Tensor) -> Tensor:
    """Return by how many half turns every pair of a head turns at a token, (..., heads, angles)."""
    return torch.tanh(angles).unsqueeze(-2) * dt.unsqueeze(-1)


def rotate(vectors: Tensor, angle: Tensor) -> Tensor:
    """Turn the first pairs of neighbours of (..., heads, dstate) by an angle (..., heads, angles); the rest stays."""
    turned = 2 * angle.shape[-1]
    first, second = vectors[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    pairs = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    return pairs if turned == vectors.shape[-1] else torch.cat((pairs, vectors[..., turned:]), dim=-1)


def reduced(half_turns: Tensor) -> Tensor:
    """Return half turns without whole turns, from -1 to 1; nothing is rounded. Small ones keep their digits."""
    return half_turns - 2 * torch.round(half_turns.detach() / 2)


def near_zero(angle: Tensor) -> Tensor:
    """Return an angle without whole turns, from -pi to pi. A turn is subtracted in two parts, the first exactly."""
    whole = torch.round(angle / (2 * math.pi))
    return angle - whole * _TURN - whole * (2 * math.pi - _TURN)


def total_turns(tokens: Tokens, rows: Layout, state: State | None) -> Tensor:
    """Return the half turns of each row up to each token, (tokens, heads, angles), from -1 to 1.

    They are summed as whole numbers, which rounds nothing: what counts is how far apart two tokens of a row are turned.
    """
    turn = reduced(advance(tokens.angles, tokens.dt))
    one = 2.0 ** (40 if turn.dtype == torch.float32 else 50)  # a sum that overflows is right but for whole turns

    def fixed(half_turns: Tensor) -> Tensor:
        return (half_turns.detach() * one).round().long()

    def by_row(values: Tensor) -> Tensor:
        total = values.cumsum(0)
        return total - (total - values)[rows.starts.clamp(max=values.shape[0] - 1)][rows.row]

    total = by_row(fixed(turn))
    if state is not None:
        total = total + fixed(reduced(state.angle / math.pi))[rows.row]
    total = torch.remainder(total + int(one), 2 * int(one)) - int(one)
    result = total.to(turn.dtype) / one
    if not (torch.is_grad_enabled() and turn.requires_grad):
        return result
    for_gradients = by_row(turn.nan_to_num(0, 0, 0))
    return result + (for_gradients - for_gradients.detach())


class Scanned(NamedTuple):
    """What a scan leaves: the output without skip and gate, and every token's angle and rotated k."""

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
) -> Scanned:
    """Run Mamba-3's recurrence by a scan of Mamba-2's, `chunk_scan`; it may record gradients.

    Args:
        tokens, rows: of the call.
        chunk_scan: `mamba_chunk_scan`, bound to a cache or to none.
        chunk_size: of its chunks.
        dtype: in which it is given k and q; v is large where steps are small, and stays in float32.
        state: what rows go on from; the recurrence's own state is in the cache. None: nothing.
        keeps: whether there is a cache.
    """
    x, dt, is_first = tokens.x, tokens.dt, (rows.place == 0).unsqueeze(1)
    angle = math.pi * total_turns(tokens, rows, state)
    turned = rotate(tokens.k, angle)
    k, q = turned.to(dtype), rotate(tokens.q, angle).to(dtype)
    early = torch.sigmoid(tokens.trap) * dt
    late, decay = dt - early, (-tokens.A * dt).clamp(min=0)
    step = decay.clamp(min=LEAST)
    weight = torch.exp(-decay) * (late + early.roll(1, 0).masked_fill(is_first, 0)) / step

    def before(values: Tensor, first: Tensor | None) -> Tensor:
        """The values one token later; those of `first` at the first token of a row."""
        start = torch.zeros_like(values) if first is None else first.to(values.dtype)[rows.row]
        return torch.where(is_first.unsqueeze(2), start, values.roll(1, 0))

    given: tuple[Tensor, ...] = (
        before(x, None if state is None else state.v) * weight.unsqueeze(-1),
        step,
        before(k, None if state is None else state.k),
        q,
    )
    ends, placed = rows.ends, None
    if keeps:
        last = ((early / LEAST).unsqueeze(-1) * x, torch.full_like(step, LEAST), k, torch.zeros_like(q))
        given, ends, placed = _one_more(given, last, rows)
    v, step, scan_k, scan_q = given
    A, cu_seqlens = step.new_full((step.shape[1],), -1), functional.pad(ends, (1, 0))
    y = chunk_scan(v, step, A, scan_k, scan_q, chunk_size, cu_seqlens=cu_seqlens)
    own = early * (k.to(x.dtype) * q).sum(-1)
    return Scanned((y if placed is None else y[placed]) + x * own.unsqueeze(-1), angle, turned)


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


def finished(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return an output with its skip, and gated."""
    if D is not None:
        y = y + x * D.to(x.dtype).unsqueeze(-1)
    return y if z is None else y * functional.silu(z.to(x.dtype))
