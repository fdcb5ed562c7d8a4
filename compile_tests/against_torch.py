"""Holds audits to torch's own records: the same calls under `mamba-ops audit` and under torch's structured trace.

`python -m compile_tests --against-torch TARGET` lists the graph breaks and recompiles that either has alone. Torch's
are those of a process of its own, in which nothing but torch.compile runs: the trace is what TORCH_TRACE writes.
"""

import contextlib
import dataclasses
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mamba_ops.audit.report import Report
from mamba_ops.audit.run import quiet_torch
from mamba_ops.audit.source_locations import is_user_code
from mamba_ops.commands.audit.target import Options, load_calls, run_here

_LINE = re.compile(r'^\s*File "([^"]+)", line (\d+), in', re.MULTILINE)
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from compile_tests import against_torch; against_torch._main()"
)
_SECONDS = 900  # for one side of one target


@dataclasses.dataclass
class Comparison:
    """What an audit and torch say about the same calls.

    Attributes:
        target: what was called.
        breaks: lines of graph breaks that torch logs.
        missed, false: lines of breaks that torch has alone, and that the audit has alone.
        elsewhere: breaks that the audit has at another line of the same stack, as "torch's -> the audit's".
        recompiles: how many torch logs.
        recompiles_missed, recompiles_false: torch's names for recompiles that torch, or the audit, has alone.
        seconds, seconds_of_audit: processor seconds of the bare compiles and calls, and of the audit without tries and
            without what it looks for behind breaks.
        seconds_behind: of that.
        ratio: of the two; of several runs, the median.
    """

    target: str
    breaks: int = 0
    missed: list[str] = dataclasses.field(default_factory=list)
    false: list[str] = dataclasses.field(default_factory=list)
    elsewhere: list[str] = dataclasses.field(default_factory=list)
    recompiles: int = 0
    recompiles_missed: list[str] = dataclasses.field(default_factory=list)
    recompiles_false: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    seconds_of_audit: float = 0.0
    seconds_behind: float = 0.0
    ratio: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether neither has anything alone."""
        return not (self.missed or self.false or self.recompiles_missed or self.recompiles_false)


def compare_with_torch(target: str, *, times: int = 1, **options: Any) -> Comparison:
    """Run a target of `mamba-ops audit` both ways, each in a process of its own.

    Args:
        target: as for the command.
        times: how often the seconds are measured: the two ways take turns, and the medians are told.
        options: as for the command.

    Raises:
        RuntimeError: one of the two did not come to an end; the message has its output.
    """
    made = Options(target, **options)
    found = compare(target, _side("bare", made), _side("audited", made))
    pairs = [(found.seconds, found.seconds_of_audit, found.seconds_behind)]
    for _ in range(times - 1):
        bare, audited = _side("timed", made), _side("audited", made)
        pairs.append((bare["seconds"], audited["seconds"], audited["seconds_behind"]))
    found.seconds, found.seconds_of_audit, found.seconds_behind = map(statistics.median, zip(*pairs, strict=True))
    found.ratio = statistics.median(audited / bare for bare, audited, _ in pairs)
    return found


def compare(target: str, torch_has: dict[str, Any], audit_has: dict[str, Any]) -> Comparison:
    """Return what either has alone, from what the two processes said."""
    report = Report.from_json(audit_has["report"])
    found = Comparison(target, seconds=torch_has["seconds"], seconds_of_audit=audit_has["seconds"])
    found.seconds_behind = audit_has["seconds_behind"]
    found.ratio = found.seconds_of_audit / found.seconds
    met = [f for f in report.findings if f.breaks and f.where is not None and f.behind is None]
    lines = {str(finding.where) for finding in met}  # torch does not meet what stands behind a break
    stacks: dict[str, set[str]] = {}
    for stack in torch_has["breaks"]:
        user = [line for line in stack if is_user_code(line.rpartition(":")[0])] or stack
        stacks.setdefault(user[-1], set()).update(user)
    found.breaks = len(stacks)
    for line, stack in stacks.items():
        if line not in lines:
            others = sorted(lines.intersection(stack) - stacks.keys())
            if others:
                found.elsewhere.append(f"{line} -> {', '.join(others)}")
            else:
                found.missed.append(line)
    found.false = sorted(lines.difference(*[set(), *stacks.values()])) if stacks else sorted(lines)
    of_torch = Counter(torch_has["recompiles"])
    of_audit = Counter(made.compile_id for made in report.recompiles)
    found.recompiles = sum(of_torch.values())
    found.recompiles_missed = sorted((of_torch - of_audit).elements())
    found.recompiles_false = sorted((of_audit - of_torch).elements())
    return found


def _side(side: str, options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), side, json.dumps(vars(options)), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if not answer.exists():
            raise RuntimeError(f"{options.target}: {side}: status {done.returncode}\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


# -- in a child -------------------------------------------------------------------------------------------------------


def _main() -> None:
    _, _, side, facts, answer = sys.argv
    options = Options(**json.loads(facts))
    Path(answer).write_text(json.dumps({"bare": _bare, "timed": _timed, "audited": _audited}[side](options)))


def _bare(options: Options) -> dict[str, Any]:
    """Time the calls under torch.compile alone, then make them once more under torch's trace."""
    seconds, _ = _call(options)
    torch.compiler.reset()
    with _trace() as records:
        _, raised = _call(options)
    found = _read(records)
    if raised:  # where the compiler fails, the trace has no break
        found["breaks"].append([f"{file}:{line}" for file, line in _LINE.findall(raised)])
    return {"seconds": seconds, **found}


def _timed(options: Options) -> dict[str, Any]:
    return {"seconds": _call(options)[0]}


def _call(options: Options) -> tuple[float, str]:
    """Return the seconds of the compiles and calls, and the compiler's error with torch's stack of the user's code."""
    torch.manual_seed(0)  # the same weights and inputs on both sides
    model, calls = load_calls(options)
    raised = ""
    begin = time.process_time()
    with torch.set_grad_enabled(options.train), quiet_torch():
        try:
            compiled = torch.compile(model, backend="aot_eager")
            for args, kwargs in calls:
                compiled(*args, **kwargs)
        except Exception as error:
            raised = str(error).partition("from user code:")[2]
    return time.process_time() - begin, raised


def _audited(options: Options) -> dict[str, Any]:
    report, steps = Report(options.target), list[tuple[str, float]]()
    torch.manual_seed(0)
    run_here(options, report, lambda name: steps.append((name, time.process_time())))
    end = time.process_time()
    begin = next(at for name, at in steps if name != "loading the model")
    behind = end - next((at for name, at in steps if name == "behind the breaks"), end)
    return {"seconds": end - begin - behind, "seconds_behind": behind, "report": report.to_json()}


class _Keep(logging.Handler):
    """Keeps what torch would write to the file of TORCH_TRACE."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[dict[str, Any], str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((dict(record.metadata), str(record.payload)))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _trace() -> Iterator[list[tuple[dict[str, Any], str]]]:
    log, keep = logging.getLogger("torch.__trace"), _Keep()
    log.addHandler(keep)
    try:
        yield keep.records
    finally:
        log.removeHandler(keep)


def _read(records: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """Return the stacks of graph breaks, each line as "file:line", and the names of recompiles."""
    breaks, recompiles = [], []
    for metadata, payload in records:
        name = metadata.get("artifact", {}).get("name")
        if name == "dynamo_graph_break_reason":
            told = payload.partition("\nTraceback (most recent call last)")[0]
            stack = [f"{file}:{line}" for file, line in _LINE.findall(told)]
            if heading := re.search(r"Graph break in user code at (.+:\d+)", told):
                stack.append(heading[1])
            breaks.append(stack)
        elif name == "recompile_reasons":
            recompiles.append(f"{metadata['frame_id']}/{metadata['frame_compile_id']}")
    return {"breaks": [stack for stack in breaks if stack], "recompiles": recompiles}


# -- the command ------------------------------------------------------------------------------------------------------


def show(found: Comparison) -> Iterator[str]:
    """Yield a comparison as lines of text."""
    behind = f", {found.seconds_behind:.1f} s behind breaks" if found.seconds_behind else ""
    yield (
        f"{found.target}: {found.breaks} break lines, {len(found.missed)} missed, {len(found.false)} false; "
        f"{found.recompiles} recompiles, {len(found.recompiles_missed)} missed, {len(found.recompiles_false)} false; "
        f"{found.seconds:.1f} s bare, {found.seconds_of_audit:.1f} s audited ({found.ratio:.2f}x){behind}"
    )
    told = {
        "torch alone breaks at": found.missed,
        "the audit alone breaks at": found.false,
        "the audit has another line of the stack,": found.elsewhere,
        "torch alone recompiles": found.recompiles_missed,
        "the audit alone recompiles": found.recompiles_false,
    }
    yield from (f"  {what} {line}" for what, lines in told.items() for line in lines)


def main(target: str, times: int) -> int:
    """Print the comparison of a target, or of all packages' targets that are installed for "all"; 1 if they differ."""
    from compile_tests.pypi_targets import installed

    differ, console = 0, Console(highlight=False)
    for one in installed() if target == "all" else [target]:
        try:
            found = compare_with_torch(one, times=times)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            console.print(f"{one}: not compared, {error}", markup=False)
            differ += 1
            continue
        console.print("\n".join(show(found)), markup=False, soft_wrap=True)
        differ += not found.agrees
    return int(bool(differ))
