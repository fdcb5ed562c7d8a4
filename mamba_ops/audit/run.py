"""Runs a model under the collector: eagerly once, then compiled, call after call."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mamba_ops.audit import _torch, absent
from mamba_ops.audit import graph as graphs
from mamba_ops.audit.answers import let_devices_be_entered, note_absence, on_host, present
from mamba_ops.audit.eager import add_hidden_syncs, run_eagerly
from mamba_ops.audit.fronts import fronts
from mamba_ops.audit.isolation import copied, isolated
from mamba_ops.audit.report import Report

if TYPE_CHECKING:
    from mamba_ops.audit.collect import Collector

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class ModelError(RuntimeError):
    """The model failed without the compiler; the cause is the error in user code."""


def audit(
    fn: Callable[..., Any],
    *args: Any,
    shapes: Sequence[Sequence[int]] | None = None,
    device: str | torch.device | None = None,
    train: bool = False,
    calls: Sequence[Any] = (),
    dynamic: bool | None = None,
    mode: str | None = None,
    copies: bool = False,
    more_calls: Sequence[Arguments] = (),
    progress: Callable[[str], None] = lambda step: None,
    report: Report | None = None,
    **kwargs: Any,
) -> Report:
    """Compile a function or a module, call it, and return a report of graph breaks, recompiles and slow paths.

    It resets torch.compile. The model is not changed: a copy of it is called, with copies of its arguments. A model
    that cannot be copied is put back as far as that goes, and a note says so. A device that is not present is traced in
    this process, which cannot be undone: `mamba-ops audit` uses a child process.

    There is no time limit: a compile cannot be stopped safely in the process that runs it. Ctrl-C ends an audit, and
    `report` then holds what was known; `mamba-ops audit --limit` runs it in a child process, and ends that.

    Args:
        fn, args, kwargs: what is called.
        shapes: the leading sizes to call it with, such as `[(1, 128), (4, 512)]`. Each tensor argument that begins as
            the first one does is cut, or repeated, to them. None: as it is.
        device: the device to run on; None: that of the first tensor.
        train: whether the backward pass is compiled too.
        calls: further calls, each a tuple of arguments.
        dynamic: as for torch.compile. None shows the recompiles that a user sees.
        mode: as for torch.compile; Inductor runs, where the device is present.
        copies: whether to look for copies in what Inductor makes: one more compile, which may take minutes.
        more_calls: further calls, each as positional and keyword arguments.
        progress: called with each step that begins.
        report: filled in as things become known, so that an interrupted audit has something to show. None: a new one.

    Raises:
        ModelError: the model fails without the compiler.
        ValueError: shapes or device do not fit.
    """
    from mamba_ops.audit.collect import Collector  # brings torch.compile, which takes seconds

    made = [(args, dict(kwargs)), *((tuple(one), dict(kwargs)) for one in calls), *more_calls]
    if shapes:
        made = [(resize(a, shape), resize(k, shape)) for shape in shapes for a, k in made[:1]] + made[1:]
    first = next(iter(_torch.tensors_in(made[0])), None)
    where = torch.device(device) if device is not None else first.device if first is not None else torch.device("cpu")
    is_absent = where.type != "cpu" and not torch.get_device_module(where).is_available()
    name = type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__qualname__", str(fn))
    report = report if report is not None else Report(name)
    report.device, report.absent, report.torch = str(where), is_absent, str(torch.__version__)
    report.finished = False
    if is_absent and train:
        raise ValueError(
            f"{where} is not present, and gradients cannot be traced for an absent device; leave train out"
        )
    collector = Collector(report, fn)
    report.mixers, report.fronts = collector.layers.mixers, fronts(fn)
    if not is_absent:
        made = _torch.map_tensors(lambda tensor: tensor.to(where), made)
    with quiet_torch(), warnings.catch_warnings(), torch.set_grad_enabled(train):
        warnings.simplefilter("ignore")
        _torch.show_warnings()
        progress("without the compiler")
        can_trace = is_absent and _install(where, report)
        syncs = _first(collector, fn, made[0], where)
        if can_trace:
            _trace_absent(collector, fn, made, where, dynamic, progress, runs_here=syncs is not None)
        elif not is_absent:
            _compile(collector, fn, made, where, train, dynamic, mode, progress)
        if (can_trace or not is_absent) and any(finding.hides for finding in report.findings):
            progress("behind the breaks")
            _look_behind(collector, fn, made, where, dynamic)
        add_hidden_syncs(collector, syncs or ())
        if copies:
            progress("copies, through Inductor")
            if is_absent:
                report.notes.append("Copies were taken from code for the CPU; the device's own code may differ.")
            _find_copies(collector, fn, made[0], None if is_absent else where, dynamic)
        else:
            report.notes.append("Copies for mutated inputs were not looked for; --copies does, through Inductor.")
    report.notes += _torch.losses()
    report.finished = True
    report.sort()
    return report


def _install(device: torch.device, report: Report) -> bool:
    """Return whether an absent device can be traced; a note says why not."""
    try:
        absent.install(device.type)
    except _torch.MissingNameError:  # which the notes list
        report.notes.append(f"{device} is not present, and was not traced.")
        return False
    return True


def resize(value: Any, shape: Sequence[int]) -> Any:
    """Return arguments with other leading sizes: the values are cut, or repeated from the start."""
    first = next(iter(_torch.tensors_in(value)), None)
    if first is None:
        return value
    if first.dim() < len(shape):
        raise ValueError(f"got shape {'x'.join(map(str, shape))}, expected at most {first.dim()} sizes")
    old = tuple(first.shape[: len(shape)])

    def one(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape[: len(shape)]) != old:
            return tensor
        for dim, size in enumerate(shape):
            if size != tensor.shape[dim]:
                tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
        return tensor

    return _torch.map_tensors(one, value)


def describe(made: Arguments) -> str:
    """Return the shapes of a call's tensors, as in "1x128"."""
    sizes = list(dict.fromkeys("x".join(map(str, tensor.shape)) or "()" for tensor in _torch.tensors_in(made)))
    return ", ".join(sizes[:4]) + (", ..." if len(sizes) > 4 else "") or "no tensors"


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Within the block, torch does not log what the report says."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor", "torch.fx", "torch._functorch")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _first(
    collector: "Collector", fn: Any, made: Arguments, where: torch.device
) -> list[tuple[str, tuple[Any, ...]]] | None:
    """Run the first call eagerly, on the CPU if the device is absent; None if it does not run there."""
    absent_device = where.type if collector.report.absent else None
    device = None if absent_device else where
    args, kwargs = copied(made)
    try:
        with isolated(fn, device, collector) as model, collector.listen_to_triton(), contextlib.ExitStack() as stack:
            if absent_device:
                stack.enter_context(present(where))
                stack.enter_context(on_host(where))
            return run_eagerly(collector, lambda: model(*args, **kwargs), absent_device)
    except Exception as error:
        if absent_device is None:
            raise ModelError(f"the model raised {type(error).__name__} without the compiler") from error
        collector.report.notes.append(
            f"The model does not run on this CPU ({type(error).__name__}: {str(error).partition(chr(10))[0]}), so slow "
            "paths and the schemas of its ops were not looked at."
        )
        return None


def _compile(
    collector: "Collector",
    fn: Any,
    calls: Sequence[Arguments],
    device: torch.device,
    train: bool,
    dynamic: bool | None,
    mode: str | None,
    progress: Callable[[str], None],
) -> None:
    torch.compiler.reset()
    inductor = mode is not None or device.type != "cpu"
    options: dict[str, Any] = {"mode": mode} if inductor else {"backend": "aot_eager"}
    with isolated(fn, device, collector) as model, collector.listen():
        compiled: Callable[..., Any] = torch.compile(model, dynamic=dynamic, **options)
        for made in calls:
            shapes = describe(made)
            progress(f"compiled, {shapes}")
            args, kwargs = copied(made)
            with collector.one_call(shapes):
                try:
                    out = compiled(*args, **kwargs)
                    if train:
                        _backward(out)
                    collector.add_failures()  # which torch passed over (suppress_errors)
                except Exception as error:
                    _try_without(collector, fn, made, device)
                    collector.add_failures(error)  # the compiler's: the plain call has not failed
                    break
    torch.compiler.reset()


def _try_without(collector: "Collector", fn: Any, made: Arguments, device: torch.device | None = None) -> None:
    """Make a call without the compiler that failed with it: where that fails too, it is not the compiler's fault."""
    args, kwargs = copied(made)
    try:
        with isolated(fn, device, collector) as model:
            model(*args, **kwargs)
    except Exception as error:
        error.__context__ = None  # the error with the compiler
        raise ModelError(
            f"the model raised {type(error).__name__} without the compiler, called with {describe(made)}"
        ) from error


def _backward(out: Any) -> None:
    leaves = [tensor for tensor in _torch.tensors_in(out) if tensor.requires_grad]
    if leaves:
        torch.autograd.backward([leaf.sum() for leaf in leaves])


def _trace_absent(
    collector: "Collector",
    fn: Any,
    calls: Sequence[Arguments],
    device: torch.device,
    dynamic: bool | None,
    progress: Callable[[str], None],
    *,
    runs_here: bool,
) -> None:
    report = collector.report
    note_absence(report, device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(collector.listen())
        # Dynamo recognises a Triton launch only where a device could run it.
        _torch.let_triton_be_found(stack)
        let_devices_be_entered(stack, device)
        stack.enter_context(present(device))
        tracer = absent.Tracer(fn, device=device.type, dynamic=dynamic, on_assumption=collector.assumption)
        collector.layers.name(tracer.fn)
        for made in calls:
            shapes = describe(made)
            progress(f"traced, {shapes}")
            with collector.one_call(shapes):
                try:
                    tracer(*made[0], **made[1])
                except Exception as error:
                    if runs_here:
                        _try_without(collector, fn, made)
                    if not any(finding.breaks for finding in report.findings):
                        collector.add_failures(error)
                    else:  # Python between two graphs may need values
                        sentence = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                        collector.stop(f"what runs between two graphs failed, {sentence}")
            if tracer.trace.stopped:
                collector.stop(tracer.trace.stopped)
    torch.compiler.reset()


def _look_behind(
    collector: "Collector", fn: Any, calls: Sequence[Arguments], device: torch.device, dynamic: bool | None
) -> None:
    """Add what a function does that a break made Dynamo give up: see `behind`."""
    from mamba_ops.audit import behind  # brings torch.compile

    is_absent = collector.report.absent
    probe = behind.Probe(fn, collector.report.device)

    def make_calls() -> None:
        torch.compiler.reset()
        with isolated(fn, None if is_absent else device, probe) as model, contextlib.ExitStack() as stack:
            if is_absent:
                stack.enter_context(present(device))
                model = absent.Tracer(model, device=device.type, dynamic=dynamic, on_assumption=lambda op: None)
                probe.layers.name(model.fn)
            else:
                model = torch.compile(model, backend="eager", dynamic=dynamic)
            for made in calls:
                args, kwargs = copied(made)
                with probe.one_call(describe(made)):
                    model(*args, **kwargs)

    behind.look(collector, probe, make_calls)
    torch.compiler.reset()


def _find_copies(
    collector: "Collector", fn: Any, made: Arguments, device: torch.device | None, dynamic: bool | None
) -> None:
    """Compile once more, with Inductor and without its caches, and read the graphs that its passes leave."""
    found: list[tuple[str, int, Any]] = []

    def read(passes: Any, module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> None:
        passes(module, *args, **kwargs)
        found.extend(graphs.copies(module))

    torch.compiler.reset()
    args, kwargs = copied(made)
    with isolated(fn, device, collector) as model, contextlib.ExitStack() as stack:
        if not _torch.replace(stack, _torch.COPIES, read):
            return
        stack.enter_context(torch.compiler.config.patch(force_disable_caches=True))  # type: ignore[attr-defined]
        compiled: Callable[..., Any] = torch.compile(model, dynamic=dynamic)
        try:
            compiled(*args, **kwargs)
        except Exception as error:
            collector.report.notes.append(
                f"Inductor did not get through ({type(error).__name__}): there may be copies that are not listed."
            )
    torch.compiler.reset()
    for op, size, stack_of_copy in found:
        message = f"the compiler copies {size:,} bytes before {op} writes" if size else f"a copy before {op} writes"
        collector.add("mutated-input", op, message, stack_of_copy, bytes=size or None)
