"""Calls of every op in each of its forms, with any numbers of rows and tokens and tensors at any places."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import Sample

SIZES = {"heads": 4, "dim": 16, "dstate": 16, "groups": 2, "channels": 64, "k_heads": 2, "width": 4, "chunk_size": 32}


class Draw:
    """The numbers of one call, and tensors at random places; without `rng`, each in memory of its own.

    Rows have as many tokens as the longest, or any number up to that.
    """

    def __init__(
        self,
        device: torch.device,
        rows: int,
        length: int,
        rng: random.Random | None = None,
        *,
        sizes: dict[str, int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.rows, self.length, self.rng = device, rows, length, rng
        self.sizes, self.dtype, self.state_dtype = SIZES | (sizes or {}), dtype, state_dtype
        self.lengths = [length if rng is None else rng.randint(0, length) for _ in range(rows)]
        self.packed = self.channel_major = False
        self.lead: tuple[int, ...] = (rows,)

    def form(self, form: str) -> set[str]:
        """Read a form's words; tokens are then laid out as it says."""
        words = set(form.split())
        self.packed, self.channel_major = "packed" in words, "channel-major" in words
        if self.packed:
            self.lead = (sum(self.lengths) + self._any(1, 5),)
        elif "rows" in words:
            self.lead = (self.rows, self.length)
        return words

    def placed(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, dense within an entry of its first dimension, that begins anywhere."""
        inner = math.prod(shape[1:])
        # Most tensors lie as in memory of their own; some begin anywhere, and some of those have gaps.
        before = self._any(1, 9) * (self._any(0, 3) == 1)
        apart = self._any(0, 9) if before else 0
        flat = torch.zeros(before + shape[0] * (inner + apart), dtype=dtype, device=self.device)
        if self.rng is None and dtype.is_floating_point:
            flat.normal_()
        return flat[before:].view(shape[0], inner + apart)[:, :inner].view(shape)

    def _any(self, low: int, high: int) -> int:
        return 0 if self.rng is None else self.rng.randint(low, high)

    def tokens(self, *trail: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.channel_major:
            return self.placed((*trail, *self.lead), dtype or self.dtype).movedim(-1, 0)
        return self.placed((*self.lead, *trail), dtype or self.dtype)

    def cache(self, *trail: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.placed((self.rows + self._any(1, 9), *trail), dtype or self.state_dtype)

    def weight(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter, negative as A is: it stays where it is, at a multiple of 16 bytes."""
        return -torch.rand(shape, dtype=dtype, device=self.device)

    def slots(self, columns: int | None = None) -> Tensor:
        shape = (self.rows,) if columns is None else (self.rows, columns)
        first = torch.arange(self.rows, dtype=torch.int32).view(-1, *[1] * (len(shape) - 1))
        return self.placed(shape, torch.int32).copy_(first)

    def row_of(self, dtype: torch.dtype) -> Tensor:
        return self.placed((self.rows,), dtype).fill_(1)

    def cu_seqlens(self) -> Tensor | None:
        if not self.packed:
            return None
        ends = self.placed((self.rows + 1,), torch.int32)
        return ends.copy_(torch.tensor([0, *self.lengths]).cumsum(0))


_SPECULATED = 3


def _reads(draw: Draw, words: set[str]) -> dict[str, Any]:
    """What ops that read sequences are told of their rows."""
    rows: dict[str, Any] = {"cu_seqlens": draw.cu_seqlens()}
    if "cached" in words:
        rows |= {"slots": draw.slots(), "has_initial_state": draw.row_of(torch.bool)}
    return rows


def _updates(draw: Draw, words: set[str]) -> dict[str, Any]:
    """What ops that advance states are told of their rows."""
    if "speculative" not in words:
        return {"slots": draw.slots()}
    draw.lengths = [min(length, _SPECULATED) for length in draw.lengths]
    rows = {"slots": draw.slots(_SPECULATED), "num_accepted_tokens": draw.row_of(torch.int32)}
    return {**rows, "cu_seqlens": draw.cu_seqlens()}


def _conv(draw: Draw, form: str) -> Sample:
    words, dim, width = draw.form(form), draw.sizes["channels"], draw.sizes["width"]
    state = draw.cache(width - 1, dim, dtype=draw.dtype).transpose(1, 2)
    options = _reads(draw, words) | ({"conv_state": state} if "cached" in words else {})
    return Sample(form, (draw.tokens(dim), draw.weight(dim, width), draw.weight(dim)), options)


def _conv_update(draw: Draw, form: str) -> Sample:
    words, dim, width = draw.form(form), draw.sizes["channels"], draw.sizes["width"]
    state = draw.cache(width - 1 + _SPECULATED, dim, dtype=draw.dtype).transpose(1, 2)
    call = draw.tokens(dim), state, draw.weight(dim, width), draw.weight(dim)
    return Sample(form, call, _updates(draw, words))


def _selective_scan(draw: Draw, form: str) -> Sample:
    words, dim, dstate = draw.form(form), draw.sizes["channels"], draw.sizes["dstate"]
    options = _reads(draw, words) | {"D": draw.weight(dim), "z": draw.tokens(dim), "dt_bias": draw.weight(dim)}
    if "cached" in words:
        options["ssm_state"] = draw.cache(dim, dstate)
    u, delta, B, C = draw.tokens(dim), draw.tokens(dim), draw.tokens(dstate), draw.tokens(dstate)
    return Sample(form, (u, delta, draw.weight(dim, dstate), B, C), {**options, "dt_softplus": True})


def _chunk_scan(draw: Draw, form: str) -> Sample:
    words = draw.form(form)
    heads, dim, dstate, groups = (draw.sizes[name] for name in ("heads", "dim", "dstate", "groups"))
    options = _reads(draw, words) | {"D": draw.weight(heads), "dt_bias": draw.weight(heads), "dt_softplus": True}
    if "cached" in words:
        options |= {"ssm_state": draw.cache(heads, dim, dstate), "num_computed_tokens": draw.row_of(torch.int32)}
    x, dt = draw.tokens(heads, dim), draw.tokens(heads)
    B, C = draw.tokens(groups, dstate), draw.tokens(groups, dstate)
    return Sample(form, (x, dt, draw.weight(heads), B, C, draw.sizes["chunk_size"]), options)


def _state_update(draw: Draw, form: str) -> Sample:
    words = draw.form(form)
    heads, dim, dstate, groups = (draw.sizes[name] for name in ("heads", "dim", "dstate", "groups"))
    inner, group, a = ((heads, dim), (groups,), (heads,)) if "mamba1" not in words else ((dim,), (), (dim, dstate))
    options = _updates(draw, words) | {"D": draw.weight(*inner[:1]), "dt_bias": draw.weight(*inner[:1])}
    x, dt = draw.tokens(*inner), draw.tokens(*inner[:1])
    B, C = draw.tokens(*group, dstate), draw.tokens(*group, dstate)
    return Sample(form, (draw.cache(*inner, dstate), x, dt, draw.weight(*a), B, C), {**options, "dt_softplus": True})


def _delta_rule(draw: Draw, form: str) -> Sample:
    words = draw.form(form)
    options = _reads(draw, words)
    if "cached" in words:
        options["ssm_state"] = draw.cache(draw.sizes["heads"], draw.sizes["dim"], draw.sizes["dim"])
    q, k, v = _qkv(draw)
    g, beta = draw.tokens(draw.sizes["heads"], dtype=torch.float32), draw.tokens(draw.sizes["heads"])
    return Sample(form, (q, k, v, g, beta), {**options, "qk_l2norm": True})


def _delta_update(draw: Draw, form: str) -> Sample:
    words, heads = draw.form(form), draw.sizes["heads"]
    options = _updates(draw, words) | {"A_log": draw.weight(heads), "dt_bias": draw.weight(heads)}
    options |= {"a": draw.tokens(heads), "b": draw.tokens(heads)}
    return Sample(
        form, (draw.cache(heads, draw.sizes["dim"], draw.sizes["dim"]), *_qkv(draw)), {**options, "qk_l2norm": True}
    )


def _qkv(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    k_heads, heads, dim = draw.sizes["k_heads"], draw.sizes["heads"], draw.sizes["dim"]
    return draw.tokens(k_heads, dim), draw.tokens(k_heads, dim), draw.tokens(heads, dim)


_READS = ("rows", "packed", "rows cached", "packed cached", "packed channel-major")
_UPDATES = ("one token", "rows", "packed speculative")
FORMS: dict[str, tuple[tuple[str, ...], Callable[[Draw, str], Sample]]] = {
    "causal_conv1d": (_READS, _conv),
    "causal_conv1d_update": (_UPDATES, _conv_update),
    "selective_scan": (_READS, _selective_scan),
    "mamba_chunk_scan": (_READS, _chunk_scan),
    "selective_state_update": ((*_UPDATES, "one token mamba1"), _state_update),
    "chunk_gated_delta_rule": (_READS, _delta_rule),
    "gated_delta_rule_update": (_UPDATES, _delta_update),
}
