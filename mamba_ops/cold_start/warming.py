"""Calls a model's layers, or ops, in every way in which they may be called, so that no later call has to compile."""

import gc
import inspect
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mamba_ops.cold_start.arguments import check_names
from mamba_ops.cold_start.layers import (
    Layer,
    before_calls_of,
    call_norm,
    calls_of,
    layers_of,
    on_device,
    rehearsal_of,
    torchs_norms_of,
    training_calls_of,
    with_many_rows,
)
from mamba_ops.cold_start.loading import Load, Loader, cores, seconds_by_kernel
from mamba_ops.ops._triton import _triton
from mamba_ops.registry import Op, Selection, backends, generation, ops, record_selections, use_backend
from mamba_ops.registry.backend import COMPOSED
from mamba_ops.registry.errors import unknown
from mamba_ops.registry.jit import allow_jit
from mamba_ops.registry.selection import prewarm

_log = logging.getLogger("mamba_ops")

Dtypes = tuple[torch.dtype | None, torch.dtype]
"""Of the activations and of the states."""


class Row(NamedTuple):
    """One op in one way in which it is called.

    Attributes:
        op: qualified name.
        backend: the backend that ran it.
        variant: the layer and what it did, or the op's sample.
        seconds: the time to compile its kernels, in parallel processes, or to read them from disk.
        cached: whether all its kernels were compiled before: loaded in this process, or on disk.
    """

    op: str
    backend: str
    variant: str
    seconds: float
    cached: bool


class WarmUp(list[Row]):
    """The rows of a warm-up, and its totals.

    Attributes:
        seconds: how long all of it took.
        compiled, loaded: how many kernels were compiled, and read from disk.
        slowest: every kernel, its number of variants and the seconds for all of them, the slowest first.
        peak_bytes: the most memory of the device that it used at one time. It is free again, in torch's allocator, for
            example for the first request.
        skipped: a sentence for each layer or sample that was left out.
        configurations: a line for each op and its static sizes: the launch configurations of its Triton kernels, and
            the table or rule that they come from.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        super().__init__(rows)
        self.seconds = 0.0
        self.compiled = self.loaded = self.peak_bytes = 0
        self.slowest: list[tuple[str, int, float]] = []
        self.skipped: list[str] = []
        self.configurations: list[str] = []

    def __str__(self) -> str:
        summary = f"{len(self)} variants of {len({row.op for row in self})} ops in {self.seconds:.2f} s"
        summary += f", {self.compiled} kernels compiled, {self.loaded} read from disk"
        summary += f", {self.peak_bytes / 2**20:.0f} MiB at most" if self.peak_bytes else ""
        if self.compiled and self.slowest:
            kernel, count, seconds = self.slowest[0]
            summary += f"; the slowest kernel is {kernel}, {count} variants in {seconds:.2f} s"
        return "; ".join([summary, *(f"skipped {reason}" for reason in self.skipped)])


Calls = Iterable[tuple[str, Callable[[], object]]]
"""Calls and their names; generated one by one, so that tensors live no longer than their call."""
Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and its total."""


class _Unit(NamedTuple):
    """A kind of layer, or an op with some sizes, that is warmed up once.

    Attributes:
        before: calls without ops, made first.
        after: calls that are repeated at the end.
    """

    name: str
    key: tuple[Any, ...]
    calls: Callable[[], Calls]
    backend: str | None
    before: Callable[[], Calls] = tuple
    after: Callable[[], Calls] = tuple


_done: dict[tuple[Any, ...], list[Row]] = {}
"""The rows of every unit that was warmed up in this process."""


def warm_up(
    what: nn.Module | Sequence[Op[...] | str],
    device: torch.device,
    pairs: Sequence[Dtypes],
    sizes: Mapping[str, int],
    backends: Sequence[str | None],
    training: bool,
    processes: int | None,
    progress: Progress,
) -> WarmUp:
    """Do what `mamba_ops.warm_up` documents."""
    begin, report = time.perf_counter(), WarmUp()
    check_names(sizes, () if isinstance(what, nn.Module) else _ops(what))
    units: list[_Unit] = []
    for backend in backends:
        common = (str(device), backend or generation())
        for pair in pairs:
            if isinstance(what, nn.Module):
                units += _of_model(what, device, pair, backend, training, common)
            else:
                units += _of_ops(what, device, pair, sizes, backend, training, common)
    new = [unit for unit in units if unit.key not in _done]
    if new:
        _make(new, device, processes, progress, report)
    for unit in units:
        rows = _done.get(unit.key, [])
        report += rows if unit in new else [row._replace(seconds=0.0, cached=True) for row in rows]
    if (launch_config := sys.modules.get("mamba_ops.ops._triton.launch_config")) is not None:
        report.configurations += map(str, launch_config.chosen)
    report.seconds = time.perf_counter() - begin
    _log.info("warm_up: %s", report)
    return report


def _of_model(
    model: nn.Module,
    device: torch.device,
    pair: Dtypes,
    backend: str | None,
    training: bool,
    common: tuple[Any, ...],
) -> Iterator[_Unit]:
    dtype, state_dtype = pair
    if not (layers := layers_of(model)):
        expected = "a model with layers of mamba_ops.layers, or of Transformers after use_mamba_ops(model)"
        raise ValueError(f"warm_up: model_or_ops: got {type(model).__name__}, expected {expected}")
    for layer in layers:

        @cache
        def here(layer: Layer = layer) -> nn.Module:
            return on_device(layer.module, device, dtype)

        def calls(layer: Layer = layer, here: Callable[[], nn.Module] = here) -> Calls:
            return calls_of(layer, here(), state_dtype)

        def before(layer: Layer = layer, here: Callable[[], nn.Module] = here) -> Calls:
            norms = torchs_norms_of(model) if layer is layers[0] else []  # of all of the model
            yield from (("a norm", partial(call_norm, on_device(norm, device, dtype))) for norm in norms)
            yield from before_calls_of(here())

        def after(here: Callable[[], nn.Module] = here) -> Calls:
            return rehearsal_of(here(), state_dtype)

        def steps(layer: Layer = layer, here: Callable[[], nn.Module] = here) -> Calls:
            return training_calls_of(layer, here())

        yield _Unit(layer.name, (*common, *layer.kind, *pair), calls, backend, before, after)
        if training:
            yield _Unit(layer.name, (*common, *layer.kind, *pair, "training"), steps, backend)


def _of_ops(
    what: Sequence[Op[...] | str],
    device: torch.device,
    pair: Dtypes,
    sizes: Mapping[str, int],
    backend: str | None,
    training: bool,
    common: tuple[Any, ...],
) -> Iterator[_Unit]:
    for whole in _ops(what):
        for op in (whole, *(whole.companions if training else ())):
            names = _names_of_sizes(op, whole)
            wanted: dict[str, Any] = {n: size for n, size in sizes.items() if n in names}
            wanted |= {n: d for n, d in zip(("dtype", "state_dtype"), pair, strict=True) if d and n in names}
            calls = partial(_samples_of, op, device, wanted, by_rows=op.by_rows or whole.by_rows)
            yield _Unit(op.qualname, (*common, op.qualname, tuple(sorted(wanted.items(), key=str))), calls, backend)


def _names_of_sizes(op: Op[...], whole: Op[...]) -> set[str]:
    """Return what samples of an op, or of one of its companions, are functions of; all companions' of the same."""
    names = inspect.signature((op if op is whole else whole.forward_op).sampler).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in names.values())
    return {*names, *(inspect.signature(whole.sampler).parameters if passed_on else ())}


def _samples_of(op: Op[...], device: torch.device, sizes: dict[str, Any], by_rows: bool) -> Calls:
    samples = iter(op.sampler(device, **sizes))
    while True:
        with _DrawnOnDevice(device):
            if (sample := next(samples, None)) is None:
                return
        call = partial(op, *sample.args, **sample.kwargs)
        yield sample.name, call
        if by_rows:
            yield f"{sample.name}, many rows", with_many_rows(call)


def _ops(what: Sequence[Op[...] | str]) -> list[Op[...]]:
    """Return ops by their names."""
    known = ops()
    for item in what:
        if isinstance(item, str) and item not in known:
            raise unknown("op", item, known)
    return [known[item] if isinstance(item, str) else item for item in what]


class _DrawnOnDevice(TorchFunctionMode):
    """Draws the random numbers of samples on the device; without it they are drawn on the CPU, as tests need them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.rand, torch.randn) and "device" not in kwargs:
            kwargs = {n: v for n, v in kwargs.items() if n != "generator"} | {"device": self.device}
        return function(*args, **kwargs)


# -- making the calls -------------------------------------------------------------------------------------------------


def _make(units: list[_Unit], device: torch.device, processes: int | None, progress: Progress, report: WarmUp) -> None:
    """Load the kernels that the calls need, then make the calls; their rows go to `_done`."""
    module = torch.get_device_module(device)
    measures = device.type != "cpu" and hasattr(module, "max_memory_allocated")
    if measures:
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
    rows: dict[tuple[int, str], list[Row]] = {}
    later: dict[tuple[int, str], list[Load]] = {}
    random_state = torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type)

    def call_all(what: str, call: Callable[[int, str, Callable[[], object]], None]) -> None:
        for number, unit in enumerate(units):
            progress(what, number, len(units))
            for variant, run in _tried(unit, unit.calls, report):
                call(number, variant, run)
            if device.type != "cpu":
                module.synchronize(device)
        progress(what, len(units), len(units))

    def first(number: int, variant: str, run: Callable[[], object]) -> None:
        ran.clear()
        with loader.requesting() if loader else nullcontext() as request:
            run()
        rows[number, variant] = []
        if request is not None and request.skipped:
            later[number, variant] = request.loads
        else:
            loads = request.loads if request else []
            rows[number, variant] += [_row(r, variant, loads, seen=loader is not None) for r in dict.fromkeys(ran)]

    def again(number: int, variant: str, run: Callable[[], object]) -> None:
        if (loads := later.get((number, variant))) is not None:
            assert loader is not None  # for mypy: it skipped a launch
            ran.clear()
            with loader.collecting() as more:
                run()
            rows[number, variant] += [_row(r, variant, [*loads, *more], seen=True) for r in dict.fromkeys(ran)]

    compiles = _triton_compiles(device)
    hashing = threading.Thread(target=_triton.hash_sources) if compiles and device.type != "cpu" else None
    loader = Loader(device, processes or cores(), hashing) if compiles and _triton.has_hooks() else None
    with random_state, torch.no_grad(), allow_jit():
        # From here on, so that a worker that is needed in any case imports torch beside the projections.
        with record_selections() as ran, loader.active() if loader else nullcontext():
            if hashing is not None:
                hashing.start()
                for unit in units:
                    for _, run in _tried(unit, unit.before, report):
                        run()
            call_all("calling each once", first)
            if loader is not None and later:
                loader.wait(progress)
                call_all("calling what was compiled", again)
        prewarm()
        gc.collect()  # now, rather than in the first request
        for unit in units:  # fills the processor's caches, so that the first request is as fast as later ones
            for _, run in _tried(unit, unit.after, report):
                run()
        if device.type != "cpu":
            module.synchronize(device)
    for number, unit in enumerate(units):
        _done[unit.key] = [row for (at, _), of_call in rows.items() if at == number for row in of_call]
    loads = list(loader.loads.values()) if loader else []
    report.compiled = sum(load.from_disk is False for load in loads)
    report.loaded = sum(load.from_disk is True for load in loads)
    report.slowest = seconds_by_kernel(loads)
    if measures:
        report.peak_bytes = module.max_memory_allocated(device) - before


def _tried(unit: _Unit, calls: Callable[[], Calls], report: WarmUp) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield some of a unit's calls, on its backend; a call that raises is skipped, with a sentence in the report."""

    def guarded(variant: str, run: Callable[[], object]) -> None:
        try:
            with use_backend(unit.backend) if unit.backend else nullcontext():
                run()
        except (AttributeError, TypeError, ValueError) as error:
            skip(f"{unit.name}, {variant}", error)

    def skip(what: str, error: Exception) -> None:
        sentence = f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if sentence not in report.skipped:
            report.skipped.append(sentence)

    try:
        for variant, run in calls():
            yield variant, partial(guarded, variant, run)
    except (AttributeError, TypeError, ValueError) as error:
        skip(unit.name, error)


def _row(selection: Selection, variant: str, loads: list[Load], *, seen: bool) -> Row:
    """Return the row of one op; kernels of the ops inside a composed op count as its own.

    `seen`: whether Triton's loads were seen. Those of other backends cannot be seen.
    """
    composed = selection.backend == COMPOSED.name
    own = [load for load in loads if load.op == selection.op or composed]
    watched = seen and (composed or selection.backend == "triton")
    cached = watched and all(load.from_disk for load in own)
    return Row(selection.op, selection.backend, variant, sum(load.seconds for load in own), cached)


def _triton_compiles(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for the device."""
    triton = next((backend for backend in backends() if backend.requires == "triton"), None)
    if triton is None or triton.why_unusable(device.type) is not None:
        return False
    from mamba_ops.ops._triton.common import INTERPRETED

    return not INTERPRETED
