"""Inputs for call patterns: any numbers of rows and tokens, and tensors at any offset in memory."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.sequences import PlanTensors

SEQUENCE_PATTERNS = ("rows cached", "rows", "packed", "packed cached", "packed channel-major")
"""How ops that read whole sequences are called, for `RandomInputs.lay_out`."""
UPDATE_PATTERNS = ("one token", "rows", "packed speculative")
"""How ops that advance states by a few tokens are called."""
SPECULATED = 3  # the most tokens of a speculative decode


class RandomInputs:
    """The sizes of one call, and functions that make its tensors.

    Args:
        device: where the tensors are.
        rows: how many sequences.
        length: tokens of each row; with `rng`, of the longest.
        rng: draws the rows' lengths, and the offset of each tensor in a larger one. Without it every tensor has its own
            memory, and normally distributed numbers.
        slots: how many slots caches have. None: one for each row, and a few more with `rng`.
        sizes: static sizes that replace the defaults of the op's patterns, by the patterns' names for them.
        dtype: of activations.
        state_dtype: of recurrent states.
    """

    def __init__(
        self,
        device: torch.device,
        rows: int,
        length: int,
        rng: random.Random | None = None,
        *,
        slots: int | None = None,
        sizes: Mapping[str, int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.rows, self.length, self.rng = device, rows, length, rng
        self.dtype, self.state_dtype, self._sizes = dtype, state_dtype, sizes or {}
        self.lengths = [length if rng is None else rng.randint(0, length) for _ in range(rows)]
        self.cache_slots = rows + self._any(1, 9) if slots is None else slots
        self.packed = self.channel_major = False
        self._lead: tuple[int, ...] = (rows,)
        self.asked: set[str] = set()  # names of the static sizes that were asked for

    def size(self, name: str, default: int) -> int:
        """Return a static size."""
        self.asked.add(name)
        return self._sizes.get(name, default)

    def lay_out(self, pattern: str) -> set[str]:
        """Lay tokens out as a pattern says, and return its words.

        "rows" is (rows, length, ...), "packed" (tokens, ...) with cu_seqlens, neither of them one token a row;
        "channel-major" puts the tokens last in memory.
        """
        words = set(pattern.split())
        self.packed, self.channel_major = "packed" in words, "channel-major" in words
        if "speculative" in words:
            self.lengths = [min(length, SPECULATED) for length in self.lengths]
        if self.packed:
            self._lead = (sum(self.lengths) + self._any(1, 5),)
        elif "rows" in words:
            self._lead = (self.rows, self.length)
        return words

    def tokens(self, *trail: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an activation: the tokens' axes as they are laid out, then `trail`."""
        if self.channel_major:
            return self.placed((*trail, *self._lead), dtype or self.dtype).movedim(-1, 0)
        return self.placed((*self._lead, *trail), dtype or self.dtype)

    def cache(self, *trail: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a cache, (slots, *trail)."""
        return self.placed((self.cache_slots, *trail), dtype or self.state_dtype)

    def weight(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a parameter, negative as A is; its address is a multiple of 16 bytes, as parameters have it."""
        return -torch.rand(shape, dtype=dtype, device=self.device)

    def row_values(self, value: int, dtype: torch.dtype) -> Tensor:
        """Return one number for each row."""
        return self.placed((self.rows,), dtype).fill_(value)

    def sequence_arguments(self, words: set[str]) -> dict[str, Any]:
        """Return the keywords of ops that read sequences, about their rows."""
        keywords: dict[str, Any] = {"cu_seqlens": self._cu_seqlens()}
        if "cached" in words:
            keywords |= {"slots": self._slots(), "has_initial_state": self.row_values(1, torch.bool)}
        return keywords

    def update_arguments(self, words: set[str]) -> dict[str, Any]:
        """Return the keywords of ops that advance states, about their rows."""
        if "speculative" not in words:
            return {"slots": self._slots()}
        keywords = {"slots": self._slots(SPECULATED), "num_accepted_tokens": self.row_values(1, torch.int32)}
        return {**keywords, "cu_seqlens": self._cu_seqlens()}

    def mixed_plan(self) -> PlanTensors:
        """Return a plan of `rows` decodes of one token, as many prefills of two, and three padding rows."""
        n, padding = self.rows, [0] * 3
        self._lead, self.cache_slots = (3 * n,), max(self.cache_slots, 2 * n)
        decodes, prefills = [1] * n, [2] * n

        def ends(lengths: list[int]) -> Tensor:
            return self._numbers(torch.tensor([0, *lengths, *[0] * (2 * n + 3 - len(lengths))]).cumsum(0).tolist())

        return PlanTensors(
            torch.tensor([n, n, n, 2 * n]),
            ends(decodes + prefills),
            ends(prefills),
            self._numbers([*range(2 * n), -1, -1, -1]),
            self._numbers([*decodes, *[0] * n, *padding], torch.bool),
            self._numbers([self.length] * n + [0] * n + padding),
            None,
        )

    def placed(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor at any offset; each entry along its first dimension is dense."""
        inner = math.prod(shape[1:])
        # Most tensors have offset 0 and no gaps, some have another offset, and some of those have gaps.
        before = self._any(1, 9) * (self._any(0, 3) == 1)
        apart = self._any(0, 9) if before else 0
        flat = torch.zeros(before + shape[0] * (inner + apart), dtype=dtype, device=self.device)
        if self.rng is None and dtype.is_floating_point:
            flat.normal_()
        return flat[before:].view(shape[0], inner + apart)[:, :inner].view(shape)

    def _any(self, low: int, high: int) -> int:
        return 0 if self.rng is None else self.rng.randint(low, high)

    def _numbers(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return self.placed((len(values),), dtype).copy_(torch.tensor(values))

    def _slots(self, columns: int | None = None) -> Tensor:
        shape = (self.rows,) if columns is None else (self.rows, columns)
        first = torch.arange(self.rows, dtype=torch.int32).view(-1, *[1] * (len(shape) - 1))
        return self.placed(shape, torch.int32).copy_(first)

    def _cu_seqlens(self) -> Tensor | None:
        return self._numbers(torch.tensor([0, *self.lengths]).cumsum(0).tolist()) if self.packed else None
