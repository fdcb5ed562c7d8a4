"""How many variants of each kernel Triton compiles as token counts, batches, strides and addresses vary.

Each op is called thirty times in each of its forms (dense or packed, cached or not, speculative or not), with random
numbers of rows and tokens and tensors at random places. Triton's own hook says which variant every launch asks for.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.cold_start.specialization import Finding, audit_sources, our_modules
from mamba_ops.registry import Op, ops, use_backend

CALLS = 30
ALLOWED = 2  # of each kernel and form: one for aligned addresses, one for any
SIZES = {"heads": 4, "dim": 16, "dstate": 16, "groups": 2, "channels": 64, "k_heads": 2, "width": 4, "chunk_size": 32}


class Variants(NamedTuple):
    """How many variants of one kernel the calls of one form of an op asked for."""

    op: str
    form: str
    kernel: str
    variants: int
    allowed: int
    reason: str
    """Why there may be more than two: from `MORE_VARIANTS`, beside the kernel."""

    def __str__(self) -> str:
        text = f"{self.op}, {self.form}: {self.kernel}: {self.variants} variants in {CALLS} calls"
        return f"{text}; up to {self.allowed}: {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Specialization:
    """What the audit found: defects in the sources, and how many variants random calls asked for."""

    findings: list[Finding]
    variants: list[Variants]

    @property
    def problems(self) -> list[str]:
        """A sentence for everything that is wrong; empty: nothing is."""
        many = [f"{v}, expected at most {v.allowed}" for v in self.variants if v.variants > v.allowed]
        return [*map(str, self.findings), *many]

    def __str__(self) -> str:
        kernels = {v.kernel for v in self.variants}
        total = sum(v.variants for v in self.variants)
        summary = f"{len(kernels)} Triton kernels, {len(self.variants)} static signatures, {total} variants in all"
        return "\n".join([*map(str, self.variants), *self.problems, summary])


def audit_specialization(device: torch.device | str, *, compiles: bool = False) -> Specialization:
    """Audit every Triton kernel of this package: its source, and the variants that random calls on a device ask for.

    Args:
        device: where the tensors are: one for which Triton compiles.
        compiles: whether kernels are compiled and launched, too. Otherwise each launch ends where Triton knows the
            variant that it needs, and outputs are left as they are; all of it takes seconds.
    """
    where, rows = torch.device(device), []
    modules = our_modules()
    more = {m.__name__: getattr(m, "MORE_VARIANTS", {}) for m in modules}
    for name, (forms, call) in _OPS.items():
        op = ops()[name]
        for form in forms:
            asked = variants_of(modules, (partial(call, op, draw, form) for draw in _draws(where)), compiles=compiles)
            for (module, function), keys in sorted(asked.items()):
                allowed, reason = more[module].get(function, (ALLOWED, ""))
                kernel = f"{module.rpartition('.')[2]}.{function}"
                rows.append(Variants(name, form, kernel, len(keys), allowed, reason))
    return Specialization(audit_sources(*modules), rows)


def variants_of(
    modules: Iterable[ModuleType], calls: Iterable[Callable[[], object]], *, compiles: bool = False
) -> dict[tuple[str, str], set[str]]:
    """Return the variants that calls ask for of the Triton kernels in some modules, as if none were compiled yet.

    By module and function, the keys under which Triton keeps what it compiles.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    asked: dict[tuple[str, str], set[str]] = {}

    def note(*_: object, key: str, fn: Any, **__: object) -> bool:
        asked.setdefault((fn.module, fn.name), set()).add(key)
        return not compiles

    kernels = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]
    before = [(kernel, kernel.device_caches) for kernel in kernels]
    with knobs.runtime.scope(), use_backend("triton"), torch.inference_mode():
        knobs.runtime.jit_cache_hook = note
        for kernel, caches in before:
            kernel.device_caches = type(caches)(kernel.create_binder)
        try:
            for call in calls:
                call()
        finally:
            for kernel, caches in before:
                kernel.device_caches = caches
    return asked


# -- random calls -----------------------------------------------------------------------------------------------------


class _Draw:
    """The numbers of one call, and tensors at random places."""

    def __init__(self, device: torch.device, rng: random.Random, rows: int, length: int) -> None:
        self.device, self.rng, self.rows, self.length = device, rng, rows, length
        self.lengths = [rng.randint(0, length) for _ in range(rows)]
        self.packed = False
        self.lead: tuple[int, ...] = (rows,)

    def form(self, form: str) -> set[str]:
        """Read a form's words; tokens are then laid out as it says."""
        words = set(form.split())
        self.packed = "packed" in words
        if self.packed:
            self.lead = (sum(self.lengths) + self.rng.randint(1, 5),)
        elif "rows" in words:
            self.lead = (self.rows, self.length)
        return words

    def placed(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, dense within an entry of its first dimension, that begins anywhere."""
        inner = math.prod(shape[1:])
        # Most tensors lie as in memory of their own; some begin anywhere, and some of those have gaps.
        before = self.rng.choice((0, 0, 0, self.rng.randint(1, 9)))
        apart = self.rng.randint(0, 9) if before else 0
        flat = torch.zeros(before + shape[0] * (inner + apart), dtype=dtype, device=self.device)
        return flat[before:].view(shape[0], inner + apart)[:, :inner].view(shape)

    def tokens(self, *trail: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.placed((*self.lead, *trail), dtype)

    def cache(self, *trail: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.placed((self.rows + self.rng.randint(1, 9), *trail), dtype)

    def weight(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter: it stays where it is, at a multiple of 16 bytes."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def slots(self, columns: int | None = None) -> Tensor:
        shape = (self.rows,) if columns is None else (self.rows, columns)
        return self.placed(shape, torch.int32).zero_()

    def row_of(self, dtype: torch.dtype) -> Tensor:
        return self.placed((self.rows,), dtype).fill_(1)

    def cu_seqlens(self) -> Tensor | None:
        if not self.packed:
            return None
        ends = self.placed((self.rows + 1,), torch.int32)
        return ends.copy_(torch.tensor([0, *self.lengths]).cumsum(0))


def _draws(device: torch.device) -> Iterator[_Draw]:
    rng = random.Random(0)
    special = [(1, 1), (16, 16), (1, 64), (64, 1), (17, 33), (2, 128)]  # what Triton has an eye for, among others
    for number in range(CALLS):
        rows, length = special[number] if number < len(special) else (rng.randint(1, 40), rng.randint(1, 150))
        yield _Draw(device, rng, rows, length)


_SPECULATED = 3


def _reads(draw: _Draw, words: set[str]) -> dict[str, Any]:
    """What ops that read sequences are told of their rows."""
    rows: dict[str, Any] = {"cu_seqlens": draw.cu_seqlens()}
    if "cached" in words:
        rows |= {"slots": draw.slots(), "has_initial_state": draw.row_of(torch.bool)}
    return rows


def _updates(draw: _Draw, words: set[str]) -> dict[str, Any]:
    """What ops that advance states are told of their rows."""
    if "speculative" not in words:
        return {"slots": draw.slots()}
    draw.lengths = [min(length, _SPECULATED) for length in draw.lengths]
    rows = {"slots": draw.slots(_SPECULATED), "num_accepted_tokens": draw.row_of(torch.int32)}
    return {**rows, "cu_seqlens": draw.cu_seqlens()}


def _conv(op: Op[...], draw: _Draw, form: str) -> None:
    words, dim, width = draw.form(form), SIZES["channels"], SIZES["width"]
    state = draw.cache(width - 1, dim, dtype=torch.bfloat16).transpose(1, 2)
    options = _reads(draw, words) | ({"conv_state": state} if "cached" in words else {})
    op(draw.tokens(dim), draw.weight(dim, width), draw.weight(dim), **options)


def _conv_update(op: Op[...], draw: _Draw, form: str) -> None:
    words, dim, width = draw.form(form), SIZES["channels"], SIZES["width"]
    state = draw.cache(width - 1 + _SPECULATED, dim, dtype=torch.bfloat16).transpose(1, 2)
    op(draw.tokens(dim), state, draw.weight(dim, width), draw.weight(dim), **_updates(draw, words))


def _selective_scan(op: Op[...], draw: _Draw, form: str) -> None:
    words, dim, dstate = draw.form(form), SIZES["channels"], SIZES["dstate"]
    options = _reads(draw, words) | {"D": draw.weight(dim), "z": draw.tokens(dim), "delta_bias": draw.weight(dim)}
    if "cached" in words:
        options["ssm_state"] = draw.cache(dim, dstate)
    u, delta, B, C = draw.tokens(dim), draw.tokens(dim), draw.tokens(dstate), draw.tokens(dstate)
    op(u, delta, draw.weight(dim, dstate), B, C, delta_softplus=True, **options)


def _chunk_scan(op: Op[...], draw: _Draw, form: str) -> None:
    words = draw.form(form)
    heads, dim, dstate, groups = (SIZES[name] for name in ("heads", "dim", "dstate", "groups"))
    options = _reads(draw, words) | {"D": draw.weight(heads), "dt_bias": draw.weight(heads), "dt_softplus": True}
    if "cached" in words:
        options |= {"ssm_state": draw.cache(heads, dim, dstate), "computed_tokens": draw.row_of(torch.int32)}
    x, dt = draw.tokens(heads, dim), draw.tokens(heads)
    B, C = draw.tokens(groups, dstate), draw.tokens(groups, dstate)
    op(x, dt, draw.weight(heads), B, C, SIZES["chunk_size"], **options)


def _state_update(op: Op[...], draw: _Draw, form: str) -> None:
    words = draw.form(form)
    heads, dim, dstate, groups = (SIZES[name] for name in ("heads", "dim", "dstate", "groups"))
    inner, group, a = ((heads, dim), (groups,), (heads,)) if "mamba1" not in words else ((dim,), (), (dim, dstate))
    options = _updates(draw, words) | {"D": draw.weight(*inner[:1]), "dt_bias": draw.weight(*inner[:1])}
    x, dt = draw.tokens(*inner), draw.tokens(*inner[:1])
    B, C = draw.tokens(*group, dstate), draw.tokens(*group, dstate)
    op(draw.cache(*inner, dstate), x, dt, draw.weight(*a), B, C, dt_softplus=True, **options)


def _delta_rule(op: Op[...], draw: _Draw, form: str) -> None:
    words = draw.form(form)
    options = _reads(draw, words)
    if "cached" in words:
        options["state"] = draw.cache(SIZES["heads"], SIZES["dim"], SIZES["dim"])
    q, k, v = _qkv(draw)
    g, beta = draw.tokens(SIZES["heads"], dtype=torch.float32), draw.tokens(SIZES["heads"])
    op(q, k, v, g, beta, qk_l2norm=True, **options)


def _delta_update(op: Op[...], draw: _Draw, form: str) -> None:
    words, heads = draw.form(form), SIZES["heads"]
    options = _updates(draw, words) | {"A_log": draw.weight(heads), "dt_bias": draw.weight(heads)}
    options |= {"a": draw.tokens(heads), "b": draw.tokens(heads)}
    op(draw.cache(heads, SIZES["dim"], SIZES["dim"]), *_qkv(draw), qk_l2norm=True, **options)


def _qkv(draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
    k_heads, heads, dim = SIZES["k_heads"], SIZES["heads"], SIZES["dim"]
    return draw.tokens(k_heads, dim), draw.tokens(k_heads, dim), draw.tokens(heads, dim)


_READS = ("rows", "packed", "rows cached", "packed cached")
_UPDATES = ("one token", "rows", "packed speculative")
_OPS: dict[str, tuple[tuple[str, ...], Callable[[Op[...], _Draw, str], None]]] = {
    "causal_conv1d": (_READS, _conv),
    "causal_conv1d_update": (_UPDATES, _conv_update),
    "selective_scan": (_READS, _selective_scan),
    "mamba_chunk_scan": (_READS, _chunk_scan),
    "selective_state_update": ((*_UPDATES, "one token mamba1"), _state_update),
    "chunk_gated_delta_rule": (_READS, _delta_rule),
    "gated_delta_rule_update": (_UPDATES, _delta_update),
}
