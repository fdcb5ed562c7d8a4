"""An audit in a child process: for a time limit, and for an absent device, which stays in its process for good.

The child writes the report whenever it has changed. So it can be ended at any time, even where its target hangs in C.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mamba_ops.audit.report import Report
from mamba_ops.commands.audit.target import Options, UserError, is_absent, run_here, show_cause
from mamba_ops.commands.options import configured

_SNAPSHOTS = 0.5  # seconds between two, and between two looks at the clock
_TO_END = 3.0  # seconds for an interrupted child to end by itself
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mamba_ops.commands.audit.child import main; main(sys.argv[2], sys.argv[3])"
)


class ReportedError(Exception):
    """The command ends with status 2, and the child has printed the reason."""


def run_in_child(options: Options, report: Report, *, keep_stdout: bool = False) -> None:
    """Audit a target in a child process; what it prints goes to stderr.

    Args:
        options: of the audit. The limit begins when the child begins with the target.
        report: filled in with the last report that the child wrote.
        keep_stdout: whether what the target prints on stdout may go there.

    Raises:
        ReportedError: the target cannot be found or run.
        UserError: the child died.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "report.json")
        facts = json.dumps(dataclasses.asdict(options))
        command = [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), facts, str(answer)]
        environment = dict(os.environ)
        if is_absent(options.device):
            # Interpreted kernels are Python that Dynamo would trace; the device would be given compiled ones.
            environment.pop("TRITON_INTERPRET", None)
        stdout = None if keep_stdout else sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdout=stdout)
        interrupted = over = False
        try:
            over = not _ends_in_time(process, answer, options.limit)
        except KeyboardInterrupt:  # the terminal interrupted the child too
            interrupted = True
            _wait(process, 30)
        finally:
            _end(process)
        if answer.exists():
            vars(report).update(vars(Report.from_json(answer.read_text(encoding="utf-8"))))
    if over:
        report.finished = False
        report.notes.append(f"{options.target} was ended at the limit of {options.limit:g} s.")
    elif interrupted:
        report.finished = False
    elif process.returncode == 2:
        raise ReportedError
    elif process.returncode not in (0, 130):
        raise UserError(f"the child process for {options.target} ended with status {process.returncode}")


def _ends_in_time(process: "subprocess.Popen[bytes]", answer: Path, limit: float | None) -> bool:
    """Wait for the child; False once the limit has passed since its first report."""
    begin: float | None = None
    while not _wait(process, None if limit is None else _SNAPSHOTS / 5):
        if begin is None and answer.exists():
            begin = time.monotonic()
        if begin is not None and limit is not None and time.monotonic() > begin + limit:
            return False
    return True


def _wait(process: "subprocess.Popen[bytes]", seconds: float | None) -> bool:
    """Return whether the child ends within this time."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the child: by Ctrl-C, which lets it clean up, and for good if it does not react."""
    if process.poll() is None and os.name == "posix":
        process.send_signal(signal.SIGINT)
        _wait(process, _TO_END)
    if process.poll() is None:
        process.kill()
        process.wait()


def _has_descriptor() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


# -- in the child -----------------------------------------------------------------------------------------------------


def main(options_text: str, answer: str) -> NoReturn:
    """Audit in this process, and write the report to a file."""
    options = Options(**json.loads(options_text))
    report = Report(options.target, options.device, absent=is_absent(options.device), finished=False)
    status = 0
    with _snapshots(report, Path(answer)):
        try:
            with configured(options.backend, options.device):
                run_here(options, report, _print_step)
        except UserError as error:
            show_cause(error)
            sys.stderr.write(f"mamba-ops: {error}\n")
            status = 2
        except KeyboardInterrupt:
            report.finished = False
            status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the streams of an absent device cannot be closed


@contextlib.contextmanager
def _snapshots(report: Report, answer: Path) -> Iterator[None]:
    """Write the report now, at the end, and in between from another thread whenever it has changed."""
    written = ""
    done = threading.Event()

    def write() -> None:
        nonlocal written
        text = report.to_json()
        if text != written:
            new = answer.with_suffix(".new")
            new.write_text(text, encoding="utf-8")
            new.replace(answer)  # in one step: the parent may read it at any time
            written = text

    def watch() -> None:
        while not done.wait(_SNAPSHOTS):
            with contextlib.suppress(RuntimeError):  # the report changed while it was read: the next time
                write()

    write()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        write()


def _print_step(step: str) -> None:
    sys.stderr.write(f"{step} ...\n")
    sys.stderr.flush()
