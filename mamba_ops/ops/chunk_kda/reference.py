"""The plain-torch kernel of chunk_kda: its reference, which runs on any device."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mamba_ops.ops._common.delta_rule import CHUNK
from mamba_ops.ops._common.delta_rule_reference import read_chunks
from mamba_ops.ops.chunk_kda.op import Arguments

PART = 16  # tokens: pairs of those of one part have their exponents summed one by one
_PARTS = CHUNK // PART


class ChannelDecays:
    """What a chunk's tokens keep of each other where every channel of a key decays by itself; see `Decays`.

    The decay from token j to token i of a later part is exp(sum up to i in its part) * exp(sum from j to there). All
    exponents are sums of the logs of their own tokens: none is the difference of two sums, so that decays of any
    strength are exact, -inf included.

    Attributes:
        parts: (pieces, v_heads, parts, PART, k_dim), the logs.
        opening: likewise, the decay since the part began.
        rest: likewise, the sum of the logs of a part's tokens after each one.
    """

    def __init__(self, log_decay: Tensor, per_key: int) -> None:
        self.per_key = per_key
        self.parts = log_decay.unflatten(2, (_PARTS, PART))
        within = self.parts.cumsum(3)
        self.total = within[:, :, :, -1]
        earlier = _after(self.total.flip(2), 2).flip(2)
        self.opening, self.rest = torch.exp(within), _after(self.parts, 3)
        self.since = torch.exp(within + earlier.unsqueeze(3)).flatten(2, 3)
        self.left = torch.exp(self.rest + _after(self.total, 2).unsqueeze(3)).flatten(2, 3)

    def until(self, part: int) -> Tensor:
        """Return the decays of the tokens of all parts before this one, until it begins; `parts` is shorter."""
        return torch.exp(self.rest[:, :, :part] + _after(self.total[:, :, :part], 2).unsqueeze(3))

    def pairs(self, j: int, exponents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the decays in each part from token j to all, 0 to earlier ones, and their exponents, given j + 1's."""
        place = torch.arange(PART, device=self.parts.device).unsqueeze(1)
        if exponents is None:
            exponents = torch.zeros_like(self.parts)
        else:
            exponents = torch.where(place > j, exponents + self.parts[:, :, :, j + 1 : j + 2], 0)
        return torch.where(place >= j, torch.exp(exponents), 0), exponents

    def by_part(self, x: Tensor) -> Tensor:
        """Return what heads of k have, (pieces, k_heads, CHUNK, k_dim), for heads of v and by part."""
        parts: Tensor = x.repeat_interleave(self.per_key, 1).unflatten(2, (_PARTS, PART))
        return parts

    def products(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decayed products of keys with those before them, and of queries with keys."""
        both, keys = torch.stack([self.by_part(keys), self.by_part(queries)]), self.by_part(keys)
        columns: list[Tensor] = []
        exponents = None
        for j in reversed(range(PART)):
            decay, exponents = self.pairs(j, exponents)
            columns.insert(0, (both * (decay * keys[:, :, :, j : j + 1])).sum(-1))
        own = torch.stack(columns, dim=-1)
        opened, rows = both * self.opening, [pad(own[:, :, :, 0], (0, CHUNK - PART))]
        for part in range(1, _PARTS):
            earlier = (keys[:, :, :part] * self.until(part)).flatten(2, 3)
            row = torch.cat([opened[:, :, :, part] @ earlier.mT, own[:, :, :, part]], dim=-1)
            rows.append(pad(row, (0, CHUNK - row.shape[-1])))
        of_keys, of_queries = torch.cat(rows, dim=3)
        return of_keys.tril(-1), of_queries

    def gradients(
        self, queries: Tensor, keys: Tensor, grad_of_keys: Tensor, grad_of_queries: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and the logs of decays, given those of both products."""
        both, keys = torch.stack([self.by_part(keys), self.by_part(queries)]), self.by_part(keys)
        grads = torch.stack([grad_of_keys, grad_of_queries]).unflatten(3, (_PARTS, PART))
        grad_rows, grad_keys = torch.zeros_like(both), torch.zeros_like(keys)
        grad_decay = torch.zeros_like(keys)

        # Pairs in two parts: what rows read since their part began, what keys give until then, and parts between.
        opened, spanned = both * self.opening, torch.zeros_like(self.total)
        for part in range(1, _PARTS):
            until, own = self.until(part), grads[:, :, :, part, :, : part * PART]
            earlier = (keys[:, :, :part] * until).flatten(2, 3)
            grad_rows[:, :, :, part] = (own @ earlier) * self.opening[:, :, part]
            given = until * (own.mT @ opened[:, :, :, part]).sum(0).unflatten(2, (part, PART))
            grad_keys[:, :, :part] += given
            given = given * keys[:, :, :part]
            grad_decay[:, :, :part, 1:] += given.cumsum(3)[:, :, :, :-1]
            spanned[:, :, 1:part] += given.sum(3).cumsum(2)[:, :, :-1]
        grad_decay += _from((grad_rows * both).sum(0), 3) + spanned.unsqueeze(3)

        # Pairs in one part.
        place = torch.arange(PART, device=keys.device).unsqueeze(1)
        exponents = None
        for j in reversed(range(PART)):
            decay, exponents = self.pairs(j, exponents)
            own = torch.stack([grads[:, :, :, part, :, part * PART + j] for part in range(_PARTS)], dim=3).unsqueeze(-1)
            key, read = keys[:, :, :, j : j + 1], (own * both).sum(0) * decay
            grad_rows += own * (decay * key)
            grad_keys[:, :, :, j] += read.sum(3)
            grad_decay += torch.where(place > j, _from(read * key, 3), 0)

        grad_keys = grad_keys + grad_rows[0]
        return grad_rows[1].flatten(2, 3), grad_keys.flatten(2, 3), grad_decay.flatten(2, 3)


def _from(x: Tensor, dim: int) -> Tensor:
    """The sums of all entries along `dim` from each one on."""
    return x.flip(dim).cumsum(dim).flip(dim)


def _after(x: Tensor, dim: int) -> Tensor:
    """The sums of all entries along `dim` after each one."""
    first, later = x.split([1, x.shape[dim] - 1], dim)
    return _from(torch.cat([later, torch.zeros_like(first)], dim), dim)


def chunk_kda(call: Arguments) -> None:
    read_chunks(call, ChannelDecays)
