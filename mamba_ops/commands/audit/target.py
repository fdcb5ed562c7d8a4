"""What `mamba-ops audit` does, without its options: finds the target, audits it here or in a child process."""

import contextlib
import dataclasses
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from mamba_ops.audit.limit import at_most
from mamba_ops.audit.report import Report
from mamba_ops.audit.run import ModelError, audit, quiet_torch, watch
from mamba_ops.audit.source_locations import is_audit_code, is_user_code
from mamba_ops.commands.audit.models import SHAPES, ModelNameError, build

TRANSFORMERS = "transformers:"


@dataclasses.dataclass
class Options:
    """The options of one audit; a child process gets them as JSON."""

    target: str
    device: str = "cpu"
    shapes: list[list[int]] | None = None
    mode: str | None = None
    train: bool = False
    copies: bool = False
    layers: int | None = None
    full: bool = False
    ours: bool = False
    limit: float | None = None


class ReportedError(Exception):
    """The command ends with status 2, and the reason is printed already."""


class UserError(Exception):
    """The command ends with status 2: a sentence; the cause is an error in the user's code, if any."""


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


def run(options: Options, report: Report, progress: Callable[[str], None]) -> Report:
    """Audit a target; `report` holds what is known if it is interrupted.

    Raises:
        UserError: nothing could be audited.
    """
    if is_absent(options.device):
        if options.train:
            raise UserError(
                f"{options.device} is not present on this machine, and it cannot be given gradients; "
                "leave --train out, or take --device cpu"
            )
        return _in_child(options, report)
    return run_here(options, report, progress)


def run_here(options: Options, report: Report, progress: Callable[[str], None]) -> Report:
    """Audit a target in this process."""
    report.target = options.target
    with _user_errors(), at_most(options.limit), contextlib.ExitStack() as stack:
        progress("loading the model")
        model, calls = _load(options)
        (args, kwargs), *more = calls
        if options.ours:
            stack.enter_context(_on_our_ops(model))
        shapes = options.shapes
        if options.mode and is_absent(options.device):
            report.notes.append(
                f"--mode {options.mode} was left out: Inductor does not run for a device that is not here."
            )
        if shapes is None and options.target.startswith(TRANSFORMERS):
            shapes = [list(shape) for shape in SHAPES]
        audit(
            model,
            *args,
            shapes=shapes,
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
    return report


def _load(options: Options) -> tuple[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    if options.target.startswith(TRANSFORMERS):
        model, kwargs = build(options.target.removeprefix(TRANSFORMERS), layers=options.layers, full=options.full)
        return model.train(options.train), [((), kwargs)]
    if options.layers or options.full or options.ours:
        raise UserError(f"--layers, --full and --ours are for {TRANSFORMERS}NAME alone")
    from mamba_ops.commands.targets import load_target

    found = load_target(options.target, torch.device("cpu"))
    return found.model.train(options.train), [(call.args, dict(call.kwargs or {})) for call in found.calls]


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
    """Print the user's own traceback: from the user's first frame to the audit's, which intercepts the ops."""
    if error.__cause__ is None:
        return
    shown = traceback.TracebackException.from_exception(error.__cause__)
    inside = itertools.dropwhile(lambda frame: not is_user_code(frame.filename), shown.stack)
    frames = list(itertools.takewhile(lambda frame: not is_audit_code(frame.filename), inside))
    if frames:
        shown.stack = traceback.StackSummary.from_list(frames)
    sys.stderr.writelines(shown.format())


# -- a device that is not present --------------------------------------------------------------------------------------

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mamba_ops.commands.audit.target import child; child(sys.argv[2], sys.argv[3])"
)


def _in_child(options: Options, report: Report) -> Report:
    """Audit in a child process, as an absent device stays in its process for good; its progress goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "report.json")
        command = [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), json.dumps(vars(options)), str(answer)]
        # Interpreted kernels are Python that Dynamo would trace; the device would be given compiled ones.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        process = subprocess.Popen(
            command, env=environment, stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL
        )
        interrupted = False
        try:
            process.wait()
        except KeyboardInterrupt:  # the child was interrupted too, and writes what it knows
            interrupted = True
            with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        if answer.exists():
            vars(report).update(vars(Report.from_json(answer.read_text(encoding="utf-8"))))
        if process.returncode == 2:
            raise ReportedError  # by the child
        if not (answer.exists() or interrupted):
            raise UserError(f"the child process for {options.device} ended with status {process.returncode}")
    return report


def _has_descriptor() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def _print_step(step: str) -> None:
    sys.stderr.write(f"{step} ...\n")
    sys.stderr.flush()


def child(options_text: str, answer: str) -> NoReturn:
    """Audit in this process and write the report; what the user's code prints goes to stderr."""
    options = Options(**json.loads(options_text))
    report = Report(options.target, options.device, absent=True, finished=False)
    status = 0
    try:
        run_here(options, report, _print_step)
    except UserError as error:
        report.finished = False
        show_cause(error)
        sys.stderr.write(f"mamba-ops: {error}\n")
        status = 2
    except KeyboardInterrupt:
        report.finished = False
        status = 130
    Path(answer).write_text(report.to_json(), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the streams of an absent device cannot be closed


# -- a script of the user's -------------------------------------------------------------------------------------------


def run_script(script: str, arguments: list[str], limit: float | None = None) -> tuple[Report, BaseException | None]:
    """Run a script as Python would, watching torch.compile; also return the exception that ended it, if any."""
    path = Path(script)
    if not path.is_file():
        raise UserError(f"there is no file {script}")
    ended: BaseException | None = None
    argv, paths = sys.argv, list(sys.path)
    sys.argv, sys.path[:] = [script, *arguments], [str(path.resolve().parent), *sys.path]
    try:
        with watch(script) as report:
            try:
                with quiet_torch(), warnings.catch_warnings(), at_most(limit):
                    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._dynamo")
                    runpy.run_path(script, run_name="__main__")
            except SystemExit as error:
                ended = error if error.code not in (None, 0) else None
            except BaseException as error:
                ended = error
    finally:
        sys.argv, sys.path[:] = argv, paths
    report.finished = not isinstance(ended, KeyboardInterrupt)
    return report, ended
