"""What the oracles of the mixing ops share: a plan read row by row, and the convolution one token at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Row:
    """One row of a plan that is no padding: its tokens, where its state is read, and where it goes after each token."""

    tokens: range
    source: int
    slot: int  # where the convolution's state is
    target: int | None  # where it goes
    goes_on: bool
    targets: list[int | None]  # after token t the state goes to targets[t]
    accepted: int | None  # of the tokens of the call before, for a speculative decode
    decodes: bool
    computed: int  # tokens of the request before these

    def begin(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """The state before the row's tokens; without any, that is the one that is kept."""
        state = states[self.source].to(dtype, copy=True) if self.goes_on else torch.zeros_like(states[0], dtype=dtype)
        if not self.tokens and self.target is not None:
            states[self.target] = state.to(states.dtype)
        return state

    def keep(self, states: Tensor, number: int, state: Tensor) -> None:
        if (target := self.targets[number]) is not None:
            states[target] = state.to(states.dtype)


def rows_of(
    counts: Tensor | None,
    cu_seqlens: Tensor,
    prefill_cu_seqlens: Tensor,
    slots: Tensor,
    has_initial_state: Tensor,
    num_computed_tokens: Tensor,
    num_accepted_tokens: Tensor | None,
    write_slots: Tensor | None,
    *,
    null_slot: int,
    windows_alone: bool = False,
) -> list[Row]:
    """The rows that have tokens and are no padding; where there are windows alone, column 0 says which are."""
    if counts is None:
        return []
    decodes, prefills = int(counts[0]), int(counts[2::2].sum())
    ends, table = cu_seqlens.tolist(), slots.reshape(slots.shape[0], -1).tolist()
    rows = []
    for i in range(decodes + prefills):
        tokens = range(ends[i], ends[i + 1])
        accepted = None if num_accepted_tokens is None or i >= decodes else int(num_accepted_tokens[i])
        source = table[i][0 if accepted is None or windows_alone else accepted - 1]
        target = table[i][0] if write_slots is None or i < decodes else int(write_slots.flatten()[i])
        if source < 0 or source == null_slot or (not tokens and (target in (source, null_slot) or target < 0)):
            continue
        last = len(tokens) - 1
        wanted = [target if t == last else -1 for t in range(len(tokens))] if accepted is None else table[i]
        to, *targets = [None if slot < 0 or slot == null_slot else slot for slot in (target, *wanted)]
        goes_on = i < decodes or bool(has_initial_state[i])
        computed = int(num_computed_tokens[i])
        rows.append(Row(tokens, source, table[i][0], to, goes_on, targets, accepted, i < decodes, computed))
    return rows


def wide(states: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What states with scales stand for."""
    return states if scale is None else states.to(dtype) * scale.to(dtype).unsqueeze(-1)


@dataclass
class Rounding:
    """The dtype to compute in, and the one that the convolution hands its result on in (None: as computed)."""

    dtype: torch.dtype
    handed_on: torch.dtype | None

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype if self.dtype == torch.float64 else tensor.dtype, copy=True)

    def hand_on(self, value: Tensor) -> Tensor:
        return value if self.handed_on is None else value.to(self.handed_on).to(self.dtype)


class Convolution:
    """The depthwise convolution, with silu or without, and its cache."""

    def __init__(
        self, state: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding, *, silu: bool = True
    ) -> None:
        self.silu = silu
        self.state, self.rounding = rounding.copy(state), rounding
        self.weight = weight.to(rounding.dtype)
        self.bias = None if bias is None else bias.to(rounding.dtype)

    def begin(self, row: Row) -> "Window":
        return Window(self, row)


class Window:
    """The inputs of one row: those that it goes on from, and those that it got."""

    def __init__(self, convolution: Convolution, row: Row) -> None:
        self.convolution, self.row = convolution, row
        history, old = convolution.weight.shape[1] - 1, convolution.state[row.slot].t()
        first = 0 if row.accepted is None else row.accepted - 1
        self.entries = [e.clone() if row.goes_on else torch.zeros_like(e) for e in old[first : first + history]]

    def push(self, entry: Tensor) -> Tensor:
        """The convolution's output for one token more."""
        weight, bias, rounding = self.convolution.weight, self.convolution.bias, self.convolution.rounding
        self.entries.append(entry)
        window = torch.stack([e.to(rounding.dtype) for e in self.entries[-weight.shape[1] :]])
        acc = (window * weight.t()).sum(0)
        if bias is not None:
            acc = acc + bias
        return rounding.hand_on(acc * torch.sigmoid(acc) if self.convolution.silu else acc)

    def end(self) -> None:
        """Keep the last inputs; a speculative decode keeps all that it may have to go back to."""
        history = self.convolution.weight.shape[1] - 1
        kept = self.entries[-history:] if self.row.accepted is None else self.entries[1:]
        for column, entry in enumerate(kept if self.row.target is not None else []):
            self.convolution.state[self.row.target, :, column] = entry.to(self.convolution.state.dtype)


def read_in_chunks(
    row: Row,
    states: Tensor,
    s: Tensor,
    mixed: Sequence[Sequence[Tensor]],
    g: Tensor,
    beta: Tensor,
    output: Tensor,
    chunk_step: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Read a prefill of a delta rule in chunks of 64 tokens.

    Args:
        row, states, s: which one it is, where states are, and its own, (v_heads, v_dim, k_dim).
        mixed: of each token q, k and v, flat.
        g, beta, output: of each token of the batch, by head.
        chunk_step: one chunk of one head, of the prefill op's oracle.
    """
    v_heads, v_dim, k_dim = s.shape
    for start in range(0, len(row.tokens), 64):
        at, part = list(row.tokens[start : start + 64]), mixed[start : start + 64]
        q, k, v = (torch.stack(each) for each in zip(*part, strict=True))
        q, k, v = (t.view(len(at), -1, dim) for t, dim in ((q, k_dim), (k, k_dim), (v, v_dim)))
        for h in range(v_heads):
            group = h // (v_heads // q.shape[1])
            s[h], y = chunk_step(s[h], q[:, group], k[:, group], v[:, h], g[at, h], beta[at, h], None, True)
            output[at, h] = y.to(output.dtype)
    if row.tokens:
        row.keep(states, len(row.tokens) - 1, s)


def softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20, x, torch.log1p(torch.exp(x)))
