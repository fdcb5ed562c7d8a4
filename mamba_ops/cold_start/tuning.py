"""Makes a table of launch configurations by timing, once, on this machine. No call is ever timed."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.cold_start.specialization import our_modules
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.registry import Sample, ops, use_backend
from mamba_ops.registry.errors import NoBackendError, unknown
from mamba_ops.registry.jit import allow_jit

WORTH = 0.98  # of the time: a smaller saving is noise
AGREEMENT = 1e-2  # relative error above which two launches have not computed the same
LARGEST = {"num_warps": 8, "num_stages": 4}
PREFILL, UPDATE = "packed cached", "one token"
READS, UPDATES = ((1, 4096), (16, 512)), ((64, 1), (256, 1))  # rows, and tokens of each


class Tuned(NamedTuple):
    """The result for one op and one set of static sizes: microseconds of its workloads before and after."""

    op: str
    sizes: Mapping[str, Any]
    launches: Mapping[str, Mapping[str, int]]
    before_us: float
    """Infinite where the device does not run the launch."""
    after_us: float

    @property
    def us(self) -> list[float | None]:
        """Both, as JSON has them."""
        return [None if math.isinf(self.before_us) else self.before_us, self.after_us]


def tune(
    names: list[str],
    device: torch.device,
    folder: Path,
    *,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    progress: Callable[[str, int, int], None],
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> list[Tuned]:
    """Time the kernels of some ops with other blocks, warps and stages, and keep the fastest in a table.

    The table is `<family>.json` in the folder. Entries that it has for these sizes are not timed again, so a run that
    was stopped can be continued. Each trial runs on copies of what the op mutates. A launch is kept that also runs with
    other dtypes which get the same one, and that gives the numbers of the rule's.

    Args:
        names: the ops.
        device: where to run; the table is for all devices of its family.
        folder: the table's folder, for MAMBA_OPS_CONFIG_DIR.
        sizes: static sizes, by the names that the ops' call patterns ask for.
        dtype, state_dtype: of activations and states.
        progress: called with the step, how much of it is done, and of how much.
        clock: returns the milliseconds of a call; None: Triton's own benchmark.

    Raises:
        ValueError: a name of no op, of one without Triton kernels of its own, or of no size; no device with compiled
            Triton kernels.
    """
    known = sorted(name for name, op in ops().items() if op.patterns and triton.name in op.kernels)
    for name in names:
        if name not in ops():
            raise unknown("op", name, known)
        if name not in known:
            raise ValueError(f"{name} has no launches of its own; ops to tune: {', '.join(known)}")
    if clock is None:
        is_interpreted = "would be interpreted" if device.type == "cpu" else None
        if reason := triton.why_unusable(device.type, by_name=True) or is_interpreted:
            raise ValueError(f"tune: device: got {device}, expected a GPU with Triton: triton {reason}")
    from mamba_ops.ops._triton import launch_config

    our_modules()  # so that all rules are known

    path = folder / f"{launch_config.family(-1 if device.index is None else device.index)}.json"
    found = []
    with allow_jit(), use_backend("triton"), torch.no_grad():
        for work in [each for name in names for each in _works(name, device, sizes, state_dtype)]:
            name, samples = work.op, list(work.calls(dtype))
            keys = _keys_of(name, samples, launch_config.chosen)
            table = launch_config.load(path)
            done = [entry["sizes"] for entry in table["kernels"].get(name, ())]
            if all(key in done for key in keys):
                progress(f"{name}: in the table", 1, 1)
                continue
            others = _of_other_dtypes(work, keys[0], dtype, launch_config.chosen)
            tuned = _tune(name, keys[0], samples, others, clock or _milliseconds, launch_config, progress)
            found.append(tuned)
            entry = {"sizes": keys[0], "launches": tuned.launches, "us": tuned.us}
            table["kernels"].setdefault(name, []).append(entry)
            table |= _facts(device)
            folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".tmp").replace(path)  # atomically
    return found


class _Work(NamedTuple):
    """An op's most frequent calls in serving: one long prompt and many shorter ones, or a token of many rows."""

    op: str
    pattern: str
    device: torch.device
    sizes: Mapping[str, int]
    state_dtype: torch.dtype

    def calls(self, dtype: torch.dtype) -> Iterator[Sample]:
        """Yield them, with activations of a dtype."""
        for rows, length in READS if self.pattern == PREFILL else UPDATES:
            options: dict[str, Any] = {"sizes": self.sizes, "dtype": dtype, "state_dtype": self.state_dtype}
            random = RandomInputs(self.device, rows, length, **options)
            call = ops()[self.op].make_call(random, self.pattern)
            if stray := self.sizes.keys() - random.asked:
                raise unknown("size", min(stray), random.asked)
            yield call


def _works(name: str, device: torch.device, sizes: Mapping[str, int], state_dtype: torch.dtype) -> Iterator[_Work]:
    """Yield the calls of an op: of Mamba-1, and of Mamba-2, where one op is for both."""
    patterns = ops()[name].patterns
    for pattern in [PREFILL] if PREFILL in patterns else [p for p in patterns if p.startswith(UPDATE)]:
        yield _Work(name, pattern, device, sizes, state_dtype)


def _keys_of(name: str, samples: list[Sample], chosen: list[Any]) -> list[dict[str, Any]]:
    """Run the workloads once, and return the static sizes by which their launches are chosen."""
    from mamba_ops.ops._triton import launch_config

    before = len(chosen)

    launch_config.forget(name)
    ops()[name].kernels["triton"].forget()
    for sample in samples:
        try:
            _run(name, sample)()
        except NoBackendError:  # the device cannot run what the rule says: another launch may do
            continue
    return [dict(choice.sizes) for choice in chosen[before:] if choice.op == name]


def _of_other_dtypes(work: _Work, key: dict[str, Any], dtype: torch.dtype, chosen: list[Any]) -> list[Sample]:
    """Return a call for each other dtype whose launches are those of the same key, and which the rule's launch takes.

    What is fastest in two bytes may take more shared memory in four than there is.
    """
    found = []
    for other in {torch.bfloat16, torch.float32} - {dtype}:
        sample = next(work.calls(other))
        try:
            if key in _keys_of(work.op, [sample], chosen):
                _run(work.op, sample)()
                found.append(sample)
        except Exception as error:  # nothing that the launch could be tried with
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return found


def _results(name: str, sample: Sample) -> list[Tensor]:
    """Return the output of a call on copies, and what it leaves in what it mutates."""
    mine = sample.clone()
    op = ops()[name]
    arguments = op.bind(mine.args, mine.kwargs)
    arguments["output"] = op(*mine.args, **mine.kwargs)
    return [arguments[mutated] for mutated in sorted(op.mutates) if arguments[mutated] is not None]


def _agree(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two launches have computed the same, but for rounding."""
    pairs = [(a.nan_to_num().double(), b.nan_to_num().double()) for a, b in zip(some, others, strict=True)]
    return all(float((a - b).norm()) <= AGREEMENT * float(b.norm()) for a, b in pairs)


def _run(name: str, sample: Sample) -> Callable[[], object]:
    """Return a call on copies of what the op mutates, with a given output, as in a compiled graph."""
    mine = sample.clone()
    return partial(ops()[name], *mine.args, **mine.kwargs)


def _tune(
    name: str,
    key: dict[str, Any],
    samples: list[Sample],
    others: list[Sample],
    clock: Callable[[Callable[[], object]], float],
    launch_config: Any,
    progress: Callable[[str, int, int], None],
) -> Tuned:
    """Change one number after the other, and keep each change that makes the workloads faster."""

    from mamba_ops.ops._triton.limits import limits_of

    def cost(launches: dict[str, dict[str, int]]) -> float:
        force(launches)
        try:
            # The geometric mean: each workload counts as much as the others.
            return math.exp(sum(math.log(1e3 * clock(_run(name, sample))) for sample in samples) / len(samples))
        except Exception as error:  # too much shared memory, or Triton cannot compile it
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return math.inf
        finally:
            force(None)

    def is_right(launches: dict[str, dict[str, int]]) -> bool:
        """Whether a launch runs with all dtypes that get it, and gives what the first that ran gave."""
        force(launches)
        try:
            for number, sample in enumerate([*samples, *others]):
                found = _results(name, sample)
                if not _agree(found, expected.setdefault(number, found)):
                    return False
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        finally:
            force(None)
        return True

    def force(launches: dict[str, dict[str, int]] | None) -> None:
        launch_config.force(name, launches)
        ops()[name].kernels["triton"].forget()  # where one launch does not run, another one may

    rule = launch_config.rules[name](limits_of(samples[0].args[0].get_device()), *key.values())
    best: dict[str, dict[str, int]] = {}
    expected: dict[int, list[Tensor]] = {}
    before = least = cost(best)
    if least < math.inf:
        is_right(best)  # keeps what the rule's launches give
    free = [(kernel, number) for kernel, numbers in launch_config.tunable[name].items() for number in numbers]
    for done, (kernel, number) in enumerate(free):
        progress(f"{name}: {kernel}, {number}", done, len(free))
        now = best.get(kernel, {}).get(number, rule[kernel].get(number, 3))  # Triton's own number of stages
        for step in (2, 0.5) if number != "num_stages" else (1, -1):
            value = now
            while True:
                value = int(value * step) if number != "num_stages" else value + int(step)
                if not 1 <= value <= LARGEST.get(number, 512):
                    break
                trial = {**best, kernel: {**best.get(kernel, {}), number: value}}
                if (taken := cost(trial)) >= WORTH * least:
                    if taken == least == math.inf:  # none has run yet: go on to those that take less
                        continue
                    break
                if not is_right(trial):
                    break
                best, least = trial, taken
    progress(f"{name}: done", len(free), len(free))
    if least == math.inf:
        raise ValueError(f"{name}: this device runs none of the launches that were tried, for sizes {key}")
    launch_config.forget(name)
    return Tuned(name, key, best, before, least)


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def _facts(device: torch.device) -> dict[str, str]:
    import triton

    name = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}
