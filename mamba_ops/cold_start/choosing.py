"""Times every backend that runs here, for each op and each size of call, and writes down which is fastest."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mamba_ops.config import FILE_KIND, device_kind
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.registry import Op, Sample, backends, ops, use_backend
from mamba_ops.registry.errors import NoBackendError, unknown
from mamba_ops.registry.jit import allow_jit

WORTH = 0.98  # of the time that the default takes: a smaller saving is noise
READS = {"one prompt of 4096 tokens": (1, 4096), "16 prompts of 512 tokens": (16, 512)}
UPDATES = {"1 row": (1, 1), "16 rows": (16, 1), "256 rows": (256, 1)}


class Choice(NamedTuple):
    """What was measured of an op, and what follows.

    Attributes:
        op: its name.
        order: its backends, the one to use first.
        why: a sentence.
        us: by size class and backend the microseconds of a call, or the sentence in which it was refused.
    """

    op: str
    order: tuple[str, ...]
    why: str
    us: Mapping[str, Mapping[str, float | str]]


def ops_to_choose_for(names: Sequence[str], device: torch.device) -> list[Op[...]]:
    """Return the ops named, or all, for which two backends run on a device.

    Raises:
        ValueError: a name of no op, or of one that has no choice there.
    """
    having = {name: op for name, op in ops().items() if op.patterns and not op.composed and len(usable(op, device)) > 1}
    for name in names:
        if name not in ops():
            raise unknown("op", name, [*having] or [*ops()])
        if name not in having:
            found = ", ".join(usable(ops()[name], device)) or "none"
            raise ValueError(f"bench: op: got {name}, expected one for which several backends run on {device}: {found}")
    return [op for name, op in having.items() if not names or name in names]


def usable(op: Op[...], device: torch.device) -> list[str]:
    """Return the backends with a kernel for an op that run on a device by default, in the default order."""
    return [b.name for b in backends() if b.name in op.kernels and b.why_unusable(device.type) is None]


def choose(
    chosen: Sequence[Op[...]],
    device: torch.device,
    *,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    progress: Callable[[str, int, int], None],
    clock: Callable[[Callable[[], object], torch.device], float] | None = None,
) -> list[Choice]:
    """Time the ops' backends, and choose for each the one that is fastest over its size classes.

    Args:
        chosen: the ops, of `ops_to_choose_for`.
        device: where to run.
        sizes: static sizes, by the names that the ops' call patterns ask for.
        dtype, state_dtype: of activations and states.
        progress: called with the step, how much of it is done, and of how much.
        clock: returns the microseconds of a call; None: `microseconds`.

    Raises:
        ValueError: a size of a name that none of the ops has.
    """
    asked: set[str] = set()
    work = [(op, *each) for op in chosen for each in _workloads(op, device, sizes, dtype, state_dtype, asked)]
    if stray := sizes.keys() - asked:
        raise unknown("size", min(stray), asked)
    total, done = sum(len(usable(op, device)) for op, _, _ in work), 0
    measured: dict[str, dict[str, dict[str, float | str]]] = {op.name: {} for op in chosen}
    with allow_jit(), torch.no_grad():
        for op, size_class, call in work:
            of_class = measured[op.name].setdefault(size_class, {})
            for name in usable(op, device):
                progress("timing", done, total)
                of_class[name] = _time(op, name, call.clone(), device, clock or microseconds)
                done += 1
    progress("timing", total, total)
    return [_choice(op.name, usable(op, device), measured[op.name]) for op in chosen]


def write(path: Path, choices: Sequence[Choice], device: torch.device) -> None:
    """Write what `BackendConfig.load` reads, at once: a reader sees all of it or what was there before."""
    found = {
        "kind": FILE_KIND,
        "device": device_kind(device),
        "torch": torch.__version__,
        "order": {choice.op: list(choice.order) for choice in choices},
        "why": {choice.op: choice.why for choice in choices},
        "us": {choice.op: choice.us for choice in choices},
    }
    partial = _partial(path)
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def require_writable(path: Path) -> None:
    """Raise the OSError that `write` would end in after everything was timed."""
    _partial(path).touch()
    _partial(path).unlink()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call, host and device, from its launch to its end; least of all it runs five times.

    An engine launches a step's kernels one after the other, so what counts is neither of the two alone.
    """

    def wait() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()

    def once() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    repeats = 1
    once()  # compiles, loads, fills caches
    first = once()
    repeats = max(1, min(100, int(2e-3 / max(first, 1e-9))))
    found: list[float] = []
    while len(found) < 5 or (sum(found) * repeats < 0.1 and len(found) < 50):
        found.append(once())
    return 1e6 * sorted(found)[len(found) // 2]


def _workloads(
    op: Op[...],
    device: torch.device,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    asked: set[str],
) -> list[tuple[str, Sample]]:
    """Return the calls to time, by size class: prompts, or a token of each row."""
    reads, found = "packed cached" in op.patterns, []
    for size_class, (rows, length) in (READS if reads else UPDATES).items():
        random = RandomInputs(device, rows, length, sizes=sizes, dtype=dtype, state_dtype=state_dtype)
        found.append((size_class, op.make_call(random, "packed cached" if reads else op.patterns[0])))
        asked |= random.asked
    return found


def _time(op: Op[...], backend: str, call: Sample, device: torch.device, clock: Callable[..., float]) -> float | str:
    """Return the microseconds of a call on a backend, or why it does not run there."""
    try:
        with use_backend(**{op.name: backend}):
            return round(clock(lambda: op(*call.args, **call.kwargs), device), 2)
    except NoBackendError as error:
        return error.reasons.get(backend) or str(error)
    except RuntimeError as error:  # out of memory, say: then it is not the one to choose
        return str(error).splitlines()[0]


def _choice(op: str, names: Sequence[str], us: Mapping[str, Mapping[str, float | str]]) -> Choice:
    """Put the backends of an op in order by how much longer they take than the fastest, over all size classes.

    One that does not take a class comes after those that do. The default stays first unless another is faster by more
    than noise.
    """

    def cost(name: str) -> tuple[int, float]:
        times = [(found[name], min(t for t in found.values() if isinstance(t, float))) for found in us.values()
                 if any(isinstance(t, float) for t in found.values())]  # fmt: skip
        taken = [math.log(t / best) for t, best in times if isinstance(t, float)]
        return len(times) - len(taken), math.exp(sum(taken) / len(taken)) if taken else math.inf

    costs = {name: cost(name) for name in names}
    order = sorted(names, key=costs.__getitem__)
    first = names[0]
    if costs[first][0] == costs[order[0]][0] and costs[order[0]][1] > WORTH * costs[first][1]:
        order.sort(key=lambda name: name != first)
    return Choice(op, tuple(order), _why(order, us, first), us)


def _why(order: Sequence[str], us: Mapping[str, Mapping[str, float | str]], default: str) -> str:
    """Return a sentence that says what the first backend of an order takes, and the next one."""

    def shown(name: str, size_class: str) -> str:
        found = us[size_class][name]
        return f"{found:.1f} us" if isinstance(found, float) else "refused"

    other = order[1]
    times = "; ".join(f"{c}: {shown(order[0], c)}, {other} {shown(other, c)}" for c in us)
    return f"{'the default, and fastest' if order[0] == default else 'fastest'} here: {times}"
