"""What `mamba-ops audit` does in one process: finds the target, a model or a script, and audits it."""

import contextlib
import dataclasses
import importlib.util
import itertools
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mamba_ops.audit import _torch
from mamba_ops.audit.answers import on_host, present
from mamba_ops.audit.report import Report
from mamba_ops.audit.run import Arguments, ModelError, audit, quiet_torch, resize
from mamba_ops.audit.source_locations import is_audit_code, is_user_code
from mamba_ops.audit.watching import watch
from mamba_ops.commands.audit.models import SHAPES, ModelNameError, build

TRANSFORMERS = "transformers:"


@dataclasses.dataclass
class Options:
    """The options of one audit; a child process gets them as JSON.

    Attributes:
        target, device, shapes, mode, backend, train, copies, layers, full, ours: as for the command.
        limit: seconds, after which a child process is ended. None: no limit.
        arguments: of a script. None: the target is a model.
        trace: the folder for torch's structured trace. None: no trace.
        module: whether the script is named as a module, as for `python -m`.
    """

    target: str
    device: str = "cpu"
    shapes: list[list[int]] | None = None
    mode: str | None = None
    backend: str | None = None
    train: bool = False
    copies: bool = False
    layers: int | None = None
    full: bool = False
    ours: bool = False
    limit: float | None = None
    arguments: list[str] | None = None
    module: bool = False
    trace: str | None = None


class UserError(Exception):
    """The command ends with status 2: a sentence; the cause is an error in the user's code, if any."""


def read_mode(mode: str) -> str:
    """Return the value of --mode, or raise UserError for one that torch.compile does not have."""
    try:
        torch.compile(lambda: None, mode=mode)
    except RuntimeError as error:
        raise UserError(f"--mode: got {mode}, expected {str(error).partition('one of: ')[2] or error}") from None
    return mode


def read_shapes(text: str) -> list[list[int]]:
    """Read "1x128,4x512".

    Raises:
        UserError: it is something else.
    """
    try:
        shapes = [[int(size) for size in shape.split("x")] for shape in text.split(",")]
    except ValueError:
        raise UserError(f"--shapes: got {text}, expected sizes such as 1x128,4x512") from None
    if any(size < 1 for shape in shapes for size in shape):
        raise UserError(f"--shapes: got {text}, expected sizes of 1 at least")
    return shapes


def is_absent(device: str) -> bool:
    """Return whether a device is not present, so that it has to be traced as absent."""
    kind = torch.device(device).type
    return kind != "cpu" and not torch.get_device_module(kind).is_available()


def check(options: Options) -> None:
    """Raise a UserError for options that do not go together."""
    if options.train and is_absent(options.device):
        raise UserError(
            f"{options.device} is not present on this machine, and it cannot be given gradients; "
            "leave --train out, or take --device cpu"
        )


def run_here(options: Options, report: Report, progress: Callable[[str], None]) -> None:
    """Audit a target in this process; `report` holds what is known if it is interrupted.

    Raises:
        UserError: the target cannot be found or run.
    """
    if options.arguments is not None:
        with _torch.traced_to(options.trace):
            _run_script(options, report)
        return
    with _user_errors(), _torch.traced_to(options.trace), contextlib.ExitStack() as stack:
        progress("loading the model")
        model, calls = load_calls(options)
        if model.training and not options.train:
            report.notes.append("The model is in training mode, as it was made; eval() in the factory changes that.")
        (args, kwargs), *more = calls
        if options.ours:
            stack.enter_context(_on_our_ops(model))
        if options.mode and is_absent(options.device):
            report.notes.append(
                f"--mode {options.mode} was left out: Inductor does not run for a device that is not here."
            )
        audit(
            model,
            *args,
            device=options.device,
            train=options.train,
            mode=options.mode,
            copies=options.copies,
            more_calls=more,
            progress=progress,
            report=report,
            **kwargs,
        )
    report.target = options.target
    here = torch.device(options.device).type != "cpu" and not report.absent
    if here and any("triton" in ran for ran in report.backends.values()):
        from mamba_ops.cold_start.variants import audit_specialization

        progress("asking Triton for variants of the kernels")
        kernels = audit_specialization(options.device)
        report.notes += [kernels.summary, *kernels.problems]


def load_calls(options: Options) -> tuple[Any, list[Arguments]]:
    """Return a model, and the arguments of each call that an audit makes.

    Raises:
        TargetError, ModelNameError, ValueError: it cannot be found, or the shapes do not fit.
    """
    with contextlib.ExitStack() as loading:
        if is_absent(options.device):  # the factory may ask for the device, and make tensors there
            loading.enter_context(present(torch.device(options.device)))
            loading.enter_context(on_host(torch.device(options.device)))
        model, calls = _load(options)
    shapes = options.shapes
    if shapes is None and options.target.startswith(TRANSFORMERS):
        shapes = [list(shape) for shape in SHAPES]
    if shapes:
        (args, kwargs), *more = calls
        calls = [*((resize(args, shape), resize(kwargs, shape)) for shape in shapes), *more]
    return model, calls


def _load(options: Options) -> tuple[Any, list[Arguments]]:
    if options.target.startswith(TRANSFORMERS):
        model, kwargs = build(options.target.removeprefix(TRANSFORMERS), layers=options.layers, full=options.full)
        return model.train(options.train), [((), kwargs)]
    if options.layers or options.full or options.ours:
        raise UserError(f"--layers, --full and --ours are for {TRANSFORMERS}NAME alone")
    from mamba_ops.commands.targets import load_target

    found = load_target(options.target, torch.device("cpu"), as_made=True)
    return found.model.train() if options.train else found.model, [
        (call.args, dict(call.kwargs or {})) for call in found.calls
    ]


def _on_our_ops(model: torch.nn.Module) -> contextlib.AbstractContextManager[object]:
    from mamba_ops.compat.transformers import use_mamba_ops

    return use_mamba_ops(model)


@contextmanager
def _user_errors() -> Iterator[None]:
    from mamba_ops.commands.targets import TargetError

    try:
        yield
    except (TargetError, ModelNameError, ModelError) as error:
        raise UserError(str(error)) from error.__cause__
    except ValueError as error:  # shapes that do not fit
        raise UserError(str(error)) from None


def show_cause(error: UserError) -> None:
    """Print the traceback of an error in user code, without the frames of torch and of the audit around it."""
    if error.__cause__ is None:
        return
    shown = traceback.TracebackException.from_exception(error.__cause__)
    inside = itertools.dropwhile(lambda frame: not is_user_code(frame.filename), shown.stack)
    frames = list(itertools.takewhile(lambda frame: not is_audit_code(frame.filename), inside))
    if frames:
        shown.stack = traceback.StackSummary.from_list(frames)
    sys.stderr.writelines(shown.format())


# -- a script ---------------------------------------------------------------------------------------------------------


def _run_script(options: Options, report: Report) -> None:
    """Run a script or a module as Python would, watching torch.compile."""
    name = options.target
    if not options.module and not Path(name).is_file():
        raise UserError(f"there is no file {name}")
    argv, paths = sys.argv, list(sys.path)
    first = Path.cwd() if options.module else Path(name).resolve().parent
    sys.argv, sys.path[:] = [name, *(options.arguments or ())], [str(first), *sys.path]
    absent_device = options.device if is_absent(options.device) else None
    try:
        if options.module and not _module_exists(name):
            raise UserError(f"there is no module {name} that can be run")
        with watch(name, report, absent_device=absent_device), quiet_torch(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._dynamo")
            if options.module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            raise UserError(f"{name} ended with status {error.code}") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} raised {type(error).__name__}") from error
    finally:
        sys.argv, sys.path[:] = argv, paths


def _module_exists(name: str) -> bool:
    """Return whether there is a module, or a package with a `__main__`."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        return spec is not None
    return False
