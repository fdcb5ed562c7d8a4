"""Measures: each case's numbers are checked first, and what is right is timed, all of it by turns."""

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import date
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mamba_ops
from mamba_ops.commands.bench import clocks, peers
from mamba_ops.commands.watch import device_name
from mamba_ops.ops._common.bench import LARGE, SMALL, Build, Call, Calls, Case, NotTaken
from mamba_ops.registry import backends, ops, use_backend
from mamba_ops.registry.errors import NoBackendError
from mamba_ops.registry.jit import allow_jit

KIND = "mamba-ops bench 1"
AGREEMENT = 1e-2  # relative error above which two kernels do not compute the same thing; bf16 products alone make 3e-3
RUNS = 3  # from the same inputs, which must give the same bits: a race would show

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number: two NaNs are alike

Row = dict[str, Any]
"""What was measured of a case, as JSON has it."""
Progress = Callable[[str, int, int], None]


class Rates(NamedTuple):
    """What the device does in a second at best; None: not known.

    Attributes:
        bytes: read and written by a large copy.
        products: floating-point operations of a large product of matrices.
        exponentials: by a kernel that does little else.
    """

    bytes: float
    products: float | None = None
    exponentials: float | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Rates":
        """Measure them."""
        return cls(clocks.copy_bandwidth(device), clocks.product_rate(device), clocks.exponential_rate(device))

    def floor(self, case: Case) -> tuple[float, str]:
        """Return the microseconds that no kernel can do a case in, and which of the rates says so."""
        least = {name: 1e6 * getattr(case, name) / rate for name, rate in self._asdict().items() if rate is not None}
        bound = max(least, key=least.__getitem__)
        return least[bound], bound


class Contestant(NamedTuple):
    """One that computes a case: a backend of ours, or a peer."""

    name: str
    kind: str
    calls: Calls
    within: Callable[[], AbstractContextManager[object]]


class Checked(NamedTuple):
    """What was found of a contestant.

    Attributes:
        error: the largest relative error of output and states in the first run; NaN if any of them has one.
        apart: "out" and names of caches that had other bits in a later run, with the places where one differed most.
        kept: whether slots that are in no table kept what they had.
    """

    error: float
    apart: Mapping[str, str]
    kept: bool

    @property
    def steady(self) -> bool:
        """Whether all runs gave the same bits."""
        return not self.apart


def cases_of(device: torch.device) -> dict[str, list[Build]]:
    """Return what builds each case, by op: large models' layers on a GPU, smaller ones on a CPU."""
    scale = SMALL if device.type == "cpu" else LARGE
    return {name: [*op.facets["bench_cases"](scale)] for name, op in ops().items() if "bench_cases" in op.facets}


def backends_of(case: Case, device: torch.device, names: Sequence[str] = ()) -> list[str]:
    """Return the backends that a case is measured on: those that run on a device, less those named if any are.

    Triton's interpreter, on a CPU, is measured where it is named alone.
    """
    found = [
        backend.name
        for backend in backends()
        if all(backend.name in op.kernels for op in case.inside or (case.op,))
        and backend.why_unusable(device.type, by_name=device.type != "cpu" or backend.name in names) is None
    ]
    return [name for name in found if not names or name in names]


def check(case: Case, call: Call, expected: tuple[Tensor, Mapping[str, Tensor]], runs: int = RUNS) -> Checked:
    """Run a contestant several times from the same inputs, and hold the first run against what is expected."""
    true = {"out": expected[0], **expected[1]}
    first: dict[str, Tensor] = {}
    places: dict[str, int] = dict.fromkeys(true, 0)  # where a run differs from the first
    table: Any = case.tables[0]
    kept = True
    for _ in range(runs):
        if case.out.is_floating_point():
            case.out.fill_(math.nan)
        caches = {name: cache.clone() for name, cache in case.caches.items()}
        got = {"out": call(caches, table).clone()}
        got |= {name: case.named(cache) for name, cache in caches.items()}
        for name, cache in caches.items() if table is not None else ():
            others = torch.ones(len(cache), dtype=torch.bool, device=cache.device)
            others[table.long()] = False
            kept &= torch.equal(cache[others], case.caches[name][others])
        first = first or got
        for name, tensor in got.items():
            places[name] = max(places[name], _apart(tensor, first[name]))
    errors = [_error(first[name], true[name], name in case.angles) for name in true]
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    apart = {name: f"{count} of {first[name].numel()}" for name, count in places.items() if count}
    return Checked(error, apart, kept)


def _apart(got: Tensor, other: Tensor) -> int:
    """Return in how many places the bits differ."""
    bits = _BITS[got.itemsize]
    return int((got.view(bits) != other.view(bits)).sum())


def _error(got: Tensor, true: Tensor, is_angle: bool) -> float:
    got = got.double()
    if is_angle:
        got, true = (torch.cat([t.cos(), t.sin()]) for t in (got, true))
    return float((got - true).norm() / true.norm())


def contestants(case: Case, names: Sequence[str], device: torch.device) -> tuple[list[Contestant], list[Row]]:
    """Return who computes a case, and rows of those that are not there or do not take it."""
    found = []
    for name in backends_of(case, device, names):
        composed = case.op.composed  # then the name is for the ops inside
        within = partial(use_backend, name) if composed else partial(use_backend, **{case.op.name: name})
        found.append(Contestant(name, "backend", Calls(case.ours(), case.ours()), within))
    calls, absent = peers.present(peers.of(case.op), case)
    found += [Contestant(name, "peer", each, ExitStack) for name, each in calls.items()]
    rows = []
    for name, why in absent.items():
        known = {NotTaken: "refused", ImportError: "absent"}
        status = next((status for kind, status in known.items() if isinstance(why, kind)), "failed")
        rows.append({"name": name, "kind": "peer", "status": status, "reason": _sentence(why)})
    return found, rows


def measured(case: Case, names: Sequence[str], device: torch.device, rates: Rates, late: Callable[[], bool]) -> Row:
    """Check all who compute a case, and time those that are right. A failure is noted, so that others still run."""
    floor, bound = rates.floor(case)
    row: Row = {"op": case.op.name, "case": case.name, "bytes": case.bytes, "floor_us": floor, "bound": bound}
    found, row["contestants"] = contestants(case, names, device)
    expected = case.expected()
    ready: dict[str, Contestant] = {}
    for each in found:
        result: Row = {"name": each.name, "kind": each.kind, "status": "not reached"}
        row["contestants"].append(result)
        if late():
            continue
        result |= _checked(case, each, expected)
        if result["status"] == "timed":
            ready[each.name] = each
    with ExitStack() as stack:
        calls = {name: _timed_call(case, each, device, stack) for name, each in ready.items()}
        within = {name: each.within for name, each in ready.items()}
        times = clocks.by_turns(calls, device, within=within)
    for result in row["contestants"]:
        if result["name"] in times:
            result["us"] = times[result["name"]] / len(case.tables)
    return row


def _checked(case: Case, each: Contestant, expected: tuple[Tensor, Mapping[str, Tensor]]) -> Row:
    """Return what the check of a contestant says: its errors, and whether it may be timed."""
    try:
        with each.within():
            checked = check(case, each.calls.checked, expected)
    except NoBackendError as refusal:
        return {"status": "refused", "reason": refusal.reasons.get(each.name) or str(refusal)}
    except Exception as failure:  # of a peer, or memory: the others are still measured
        return {"status": "failed", "reason": f"{type(failure).__name__}: {_sentence(failure)}"}
    error = checked.error
    problems = [f"relative error {error:.1e}, expected {AGREEMENT:.0e} at most"] * (not error <= AGREEMENT)
    problems += [f"two runs gave different bits: {name} in {count} places" for name, count in checked.apart.items()]
    problems += ["wrote to a slot that was not named"] * (not checked.kept)
    found: Row = {"steady": checked.steady, "status": "wrong" if problems else "timed"}
    found |= {"error": error} if math.isfinite(error) else {}  # JSON has no other numbers
    return found | ({"reason": "; ".join(problems)} if problems else {})


def _sentence(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _timed_call(case: Case, each: Contestant, device: torch.device, stack: ExitStack) -> clocks.Call:
    """Return what runs a contestant once for each of the case's tables: captured in a graph, unless it cannot be."""
    caches = {name: cache.clone() for name, cache in case.caches.items()}

    def calls() -> None:
        for table in case.tables:
            each.calls.timed(caches, table)

    with each.within():
        if each.name != "torch":  # which may wait for the device
            try:
                return stack.enter_context(clocks.captured(calls, device))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # waits for it, too
                pass
        calls()
        return calls


def deadline(seconds: float | None) -> Callable[[], bool]:
    """Return what says whether so many seconds have gone by since this call; None: it never does."""
    end = math.inf if seconds is None else time.monotonic() + seconds
    return lambda: time.monotonic() > end


def run(
    builds: Mapping[str, Sequence[Build]],
    device: torch.device,
    *,
    names: Sequence[str] = (),
    late: Callable[[], bool] = bool,
    progress: Progress = lambda step, done, total: None,
    rates: Rates | None = None,
) -> Row:
    """Measure cases, and return all that was found, as JSON has it; when interrupted (Ctrl-C), what was found so far.

    Args:
        builds: what builds each case, by op.
        device: where.
        names: of backends; none: all that run there.
        late: says when nothing new is to begin.
        progress: called with the op, how many of its cases are done, and of how many.
        rates: of the device; None: they are measured.
    """
    rows = []
    with allow_jit(), torch.inference_mode():
        rates = rates or Rates.of(device)
        try:
            for op in builds:
                for row in _of_op(op, builds[op], device, names, rates, late, progress):
                    rows.append(row)  # one by one: those of a list that is interrupted would be lost
        except KeyboardInterrupt:
            pass
    reached = all(each["status"] != "not reached" for row in rows for each in row["contestants"])
    finished = reached and len(rows) == sum(map(len, builds.values()))
    return facts(device) | {"rates": rates._asdict(), "finished": finished, "rows": rows}


def _of_op(
    op: str,
    builds: Sequence[Build],
    device: torch.device,
    names: Sequence[str],
    rates: Rates,
    late: Callable[[], bool],
    progress: Progress,
) -> Iterable[Row]:
    for done, build in enumerate(builds):
        progress(op, done, len(builds))
        if late():
            break
        torch.manual_seed(0)
        try:
            yield measured(build(device), names, device, rates, late)
        except RuntimeError as error:  # memory, most of all
            yield {"op": op, "case": f"case {done + 1}", "failed": _sentence(error), "contestants": []}
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
    progress(op, len(builds), len(builds))


def facts(device: torch.device) -> Row:
    """Return what the figures were made on and with."""
    try:
        import triton
    except ImportError:
        of_triton = "absent"
    else:
        of_triton = triton.__version__
    versions = {"mamba_ops": mamba_ops.__version__, "torch": torch.__version__, "triton": of_triton}
    return {
        "kind": KIND,
        "date": date.today().isoformat(),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions | {"python": platform.python_version(), **peers.versions()},
    }
