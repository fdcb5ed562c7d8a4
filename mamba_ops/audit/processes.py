"""The processes that a watched script starts: workers, ranks, other programs in Python; one report holds them all.

A forked process has what listens already. A new one finds `sitecustomize` on its path, which is `_in_child`. Each
writes its report to a file whenever there is something new, as it may be ended at any time. A process that did neither,
such as `python -I`, was not watched, and the report begins with that.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.process
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

import torch

from mamba_ops.audit.outcomes import CallRow, Event, Recompile
from mamba_ops.audit.report import Report

if TYPE_CHECKING:
    from mamba_ops.audit.collect import Collector

_PACKAGE = Path(__file__).resolve().parents[1]
_PYTHON = re.compile(r"python[\d.]*(\.exe)?$")
_PYTHON_IN_SHELL = re.compile(r"\b(python[\d.]*|torchrun|accelerate|deepspeed)\b")
_MAIN = "the script itself"


class _Session:
    """Where this process writes, and what listens in it."""

    def __init__(self, folder: Path, collector: "Collector") -> None:
        self.folder, self.collector = folder, collector
        self.begin = time.perf_counter()

    def become(self) -> None:
        """Begin a report of this process's own."""
        self.begin = time.perf_counter()
        report = Report(sys.argv[0] if sys.argv else "", torch=str(torch.__version__), finished=False)
        report.calls.append(CallRow(_name_of_process()))
        self.collector.begin_anew(report, self.write)

    def write(self) -> None:
        """Write the report of this process, so that its end loses nothing."""
        report = self.collector.report
        report.target = report.calls[0].shapes = _name_of_process()
        report.calls[0].seconds = round(time.perf_counter() - self.begin, 3)
        new = self.folder / f"{os.getpid()}.new"
        with contextlib.suppress(OSError):  # the watched script has ended
            new.write_text(report.to_json(), encoding="utf-8")
            new.replace(self.folder / f"{os.getpid()}.json")


_session: _Session | None = None
_until_the_end = contextlib.ExitStack()  # kept, as what it holds would be undone with it


def rank() -> int | None:
    """Return the number of this process in a distributed run, as torchrun gives it; None in a run of one process."""
    number, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdigit() and size.isdigit() and int(size) > 1 else None


def name_of_rank(number: int) -> str:
    """Return what findings call a process of a distributed run."""
    return f"rank {number}"


def _name_of_process() -> str:
    distributed = torch.distributed
    is_distributed = distributed.is_available() and distributed.is_initialized()
    number = distributed.get_rank() if is_distributed else rank()
    if number is not None:
        return name_of_rank(number)
    name = multiprocessing.current_process().name
    return name if name != "MainProcess" else f"process {os.getpid()}"


def listen_in_child(folder: str) -> None:
    """Record what torch.compile does in this process from now on; called when a process imports torch.compile."""
    global _session
    from mamba_ops.audit.collect import Collector

    collector = Collector(Report(""), watches=True)
    _until_the_end.enter_context(collector.listen())
    _session = _Session(Path(folder), collector)
    _session.become()


def _forked() -> None:
    if _session is not None:
        with contextlib.suppress(OSError):
            Path(_session.folder, f"{os.getpid()}.started").write_text(str(os.getppid()))
        _session.become()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextlib.contextmanager
def watch_processes(collector: "Collector") -> Iterator[None]:
    """Within the block, watch the processes that this one starts; after it, the collector's report holds theirs."""
    global _session
    report, started = collector.report, list[tuple[int, int]]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        site = folder / "site"
        site.mkdir()
        shutil.copy(_PACKAGE / "audit" / "_in_child.py", site / "sitecustomize.py")
        path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        told = {"MAMBA_OPS_AUDIT_FOLDER": name, "MAMBA_OPS_AUDIT_ROOT": str(_PACKAGE.parent), "PYTHONPATH": path}
        stack.enter_context(mock.patch.dict(os.environ, told))
        _note_starts(stack, started)
        before, _session = _session, _Session(folder, collector)
        try:
            yield
        finally:
            _session = before
            _merge_folder(report, folder, started)


def _note_starts(stack: contextlib.ExitStack, started: list[tuple[int, int]]) -> None:
    """Until the stack closes, note the Python processes that are started: this process's id, theirs."""
    start, popen = multiprocessing.process.BaseProcess.start, subprocess.Popen.__init__

    def start_and_note(process: Any) -> None:
        start(process)
        started.append((os.getpid(), process.pid))

    def popen_and_note(process: Any, args: Any, *more: Any, **options: Any) -> None:
        popen(process, args, *more, **options)
        if _is_python(args):
            started.append((os.getpid(), process.pid))

    stack.enter_context(mock.patch.object(multiprocessing.process.BaseProcess, "start", start_and_note))
    stack.enter_context(mock.patch.object(subprocess.Popen, "__init__", popen_and_note))


def _is_python(args: Any) -> bool:
    """Return whether a command runs Python: by its name, or by the first line of its script."""
    if isinstance(args, (str, bytes)):
        return _PYTHON_IN_SHELL.search(os.fsdecode(args)) is not None
    if isinstance(args, os.PathLike):
        args = [args]
    words = [os.fsdecode(word) for word in args]
    program = shutil.which(words[0]) if words else None
    if program is None:
        return False
    if _PYTHON.search(Path(program).name):
        return True
    with contextlib.suppress(OSError), Path(program).open("rb") as file:
        return b"python" in (file.readline(200) if file.read(2) == b"#!" else b"")
    return False


def _merge_folder(report: Report, folder: Path, started: list[tuple[int, int]]) -> None:
    watched = {int(file.stem): file for file in folder.glob("*.started")}
    parents = {int(file.read_text() or 0) for file in watched.values()}  # a shell is no Python, but started one
    failed = {int(file.stem) for file in folder.glob("*.failed")}
    here = os.getpid()
    missed = {pid for parent, pid in started if parent == here and pid not in watched and pid not in parents} | failed
    children = [Report.from_json(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    children = sorted((child for child in children if child.graphs or child.findings), key=lambda child: child.target)
    for finding in report.findings if children else ():
        finding.processes = (_MAIN,)
    for child in children:
        add_process(report, child)
    report.unwatched += len(missed)


def add_process(report: Report, child: Report) -> None:
    """Add what was found in another process, whose name is the report's target; its calls follow the report's."""
    before = len(report.calls)
    for graph in child.graphs:
        graph.call += before
        graph.compile_id = _in_process(child, graph.compile_id)
    for finding in child.findings:
        finding.processes = (child.target,)
        report.add(finding)
    report.graphs += child.graphs
    report.recompiles += _renamed(child, child.recompiles, before)
    report.events += _renamed(child, child.events, before)
    report.compile_seconds |= {_in_process(child, name): value for name, value in child.compile_seconds.items()}
    report.calls += child.calls
    report.notes += [note for note in child.notes if note not in report.notes]


_Made = TypeVar("_Made", Event, Recompile)


def _renamed(child: Report, made: Sequence[_Made], before: int) -> list[_Made]:
    """Return what a process made, in the calls after the first so many, and under names that no other process has."""
    return [
        dataclasses.replace(one, call=one.call + before, compile_id=_in_process(child, one.compile_id)) for one in made
    ]


def _in_process(child: Report, compile_id: str) -> str:
    return f"{compile_id} in {child.target}"
