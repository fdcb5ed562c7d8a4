"""How many variants of each kernel Triton compiles as token counts, batches, strides and addresses vary.

Each op is called thirty times in each of its call patterns (dense or packed, cached or not, speculative or not), with
random numbers of rows and tokens and tensors at random places. Triton's own hook says which variant a launch asks for.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mamba_ops.cold_start.specialization import Finding, audit_sources, kernel_name, our_modules
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._triton import _triton
from mamba_ops.registry import ops, use_backend

CALLS = 30
ALLOWED = 2  # of each kernel and pattern: one for aligned addresses, one for any


class Variants(NamedTuple):
    """How many variants of one kernel the calls of one pattern of an op asked for."""

    op: str
    pattern: str
    kernel: str
    variants: int
    allowed: int
    reason: str
    """Why more than two are allowed: from `MORE_VARIANTS`, beside the kernel."""

    def __str__(self) -> str:
        text = f"{self.op}, {self.pattern}: {self.kernel}: {self.variants} variants in {CALLS} calls"
        return f"{text}; up to {self.allowed}: {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Specialization:
    """The result of the audit: defects in the sources, and how many variants random calls asked for."""

    findings: list[Finding]
    variants: list[Variants]

    @property
    def problems(self) -> list[str]:
        """A sentence for everything that is wrong; empty: nothing is."""
        many = [f"{v}, expected at most {v.allowed}" for v in self.variants if v.variants > v.allowed]
        return [*map(str, self.findings), *many]

    @property
    def summary(self) -> str:
        """The totals in one sentence."""
        kernels, total = {v.kernel for v in self.variants}, sum(v.variants for v in self.variants)
        wrong = f"{len(self.problems)} problems" if self.problems else "no problem"
        calls = f"{len(self.variants)} static signatures with {CALLS} random calls each"
        return f"Triton specialises {len(kernels)} kernels {total} times over {calls}: {wrong}."

    def __str__(self) -> str:
        return "\n".join([*map(str, self.variants), *self.problems, self.summary])


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
    for op in ops().values():
        for pattern in op.patterns if "triton" in op.kernels else ():
            samples = (op.make_call(random_inputs, pattern) for random_inputs in _random_inputs(where))
            asked = variants_of(modules, (partial(op, *s.args, **s.kwargs) for s in samples), compiles=compiles)
            for (module, function), keys in sorted(asked.items()):
                allowed, reason = more[module].get(function, (ALLOWED, ""))
                kernel = kernel_name(module, function)
                rows.append(Variants(op.name, pattern, kernel, len(keys), allowed, reason))
    return Specialization(audit_sources(*modules), rows)


def variants_of(
    modules: Iterable[ModuleType], calls: Iterable[Callable[[], object]], *, compiles: bool = False
) -> dict[tuple[str, str], set[str]]:
    """Return the variants that calls ask for of the Triton kernels in some modules, as if none were compiled yet.

    By module and function, the keys under which Triton keeps what it compiles.
    """
    import triton

    asked: dict[tuple[str, str], set[str]] = {}

    def note(*_: object, key: str, fn: Any, **__: object) -> bool:
        asked.setdefault((fn.module, fn.name), set()).add(key)
        return not compiles

    kernels = [f for m in modules for f in vars(m).values() if isinstance(f, triton.JITFunction)]
    counting = _triton.hook(_triton.BEFORE_LOAD, note, "the variants that calls ask for are not counted")
    with counting, _triton.unloaded(kernels), use_backend("triton"), torch.inference_mode():
        for call in calls:
            call()
    return asked


def _random_inputs(device: torch.device) -> Iterator[RandomInputs]:
    rng = random.Random(0)
    special = [(1, 1), (16, 16), (1, 64), (64, 1), (17, 33), (2, 128)]  # 1 and multiples of 16, and others
    for number in range(CALLS):
        rows, length = special[number] if number < len(special) else (rng.randint(1, 40), rng.randint(1, 150))
        yield RandomInputs(device, rows, length, rng)
