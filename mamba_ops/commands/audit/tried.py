"""Tries the changes that need none of the code, in a child process: one that hangs or crashes changes nothing else."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mamba_ops.audit import _torch
from mamba_ops.audit.outcomes import Try
from mamba_ops.audit.recorded import recorded
from mamba_ops.audit.report import Report
from mamba_ops.audit.tries import Facts, NotApplicableError, Tweak, applied, mark, outcome, together, tweaks_for
from mamba_ops.commands.audit.target import Options, load_calls, run_here
from mamba_ops.commands.options import configured

SECONDS = 60.0  # in all
_POLL = 0.05
_LEAST, _TIMES = 10.0, 4.0  # seconds that a try may take: these, or as many times those without a change
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mamba_ops.commands.audit.tried import main; main(*sys.argv[2:])"
)


Wanted = tuple[Tweak, tuple[str, ...]]  # a change, and the fingerprints of the findings that it may mend


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a child says of a change.

    Attributes:
        facts: what came of it; None if it does not fit the target, or did not come to an end.
        problem: how it ended, in that case.
        more: changes for what came to be seen with it.
    """

    facts: Facts | None = None
    problem: str = ""
    more: tuple[Tweak, ...] = ()

    @classmethod
    def read(cls, text: str) -> "Answer":
        """Return what a child wrote."""
        facts = json.loads(text)
        more = tuple(Tweak(**tweak) for tweak in facts["more"])
        return cls(Facts.read(facts["facts"]) if facts["facts"] else None, facts["problem"], more)


def try_changes(options: Options, report: Report, seconds: float, progress: Callable[[str], None]) -> None:
    """Try what may mend a report's findings, and add the outcomes to it.

    Args:
        options: of the audit that made the report.
        report: a finished one.
        seconds: in all; what was not reached by then is listed in a note.
        progress: called with each change that is tried.
    """
    script = options.arguments is not None
    wanted = tweaks_for(report, ours=not (script or options.ours or options.train), script=script)
    if not wanted:
        return
    # Our ops first, where they stand first: the calls without them may take much longer.
    first = sum(tweak.is_ours for tweak, _ in wanted) if wanted[0][0].is_ours else 0
    wanted.insert(first, (Tweak(), ()))
    runs = _Runs(options, report, time.monotonic() + seconds, progress)
    left = runs.run(wanted)
    best = together(wanted, runs.tries)
    known = {tried.change for tried in runs.tries}
    while best is not None and not left:  # what stood behind a break is seen once that is gone
        best = functools.reduce(Tweak.__or__, runs.more, best)
        if str(best) in known:
            break
        known.add(str(best))
        left = runs.run([(best, ())])
    report.tries += runs.tries
    if left := [(tweak, findings) for tweak, findings in left if tweak != Tweak()]:
        names = "; ".join(str(tweak) for tweak, _ in left)
        report.notes.append(f"Not tried within {seconds:g} s (--try-seconds): {names}.")


class _Runs:
    """Runs changes in child processes, one after the other, until the time is over."""

    def __init__(self, options: Options, report: Report, end: float, progress: Callable[[str], None]) -> None:
        self.options, self.end, self.progress = options, end, progress
        self.without = Facts.of(report)  # those of the audit, until the calls without a change have been made anew
        self.limit = float("inf")  # seconds for one change
        self.more: list[Tweak] = []
        self._answers: list[tuple[Wanted, Answer]] = []

    @property
    def tries(self) -> list[Try]:
        """The outcomes; those of changes that do not fit are left out."""
        tries = []
        for (tweak, findings), answer in self._answers:
            if answer.problem:
                tries.append(Try(str(tweak), findings, problem=answer.problem, ours=tweak.is_ours))
            elif answer.facts is not None:
                tries.append(outcome(tweak, findings, self.without, answer.facts))
        return tries

    def run(self, wanted: list[Wanted]) -> list[Wanted]:
        """Return what was not reached; a child that was ended by a change is followed by another one."""
        while wanted and time.monotonic() < self.end:
            done = self._run_child(wanted)
            for (tweak, findings), answer in zip(wanted, done, strict=False):
                if tweak != Tweak():
                    self._answers.append(((tweak, findings), answer))
                    self.more += answer.more
                elif answer.facts is not None:
                    self.without = answer.facts
            if not done:
                break
            wanted = wanted[len(done) :]
        return wanted

    def _run_child(self, wanted: list[Wanted]) -> list[Answer]:
        """Return the answers, as far as a child came."""
        with tempfile.TemporaryDirectory() as folder:
            answers = Path(folder, "answers")
            answers.touch()
            command = [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path)]
            command.append(json.dumps({**dataclasses.asdict(self.options), "trace": None}))
            command += [json.dumps([dataclasses.asdict(tweak) for tweak, _ in wanted]), str(answers)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                return self._follow(process, answers, wanted)
            finally:
                _kill(process)

    def _follow(self, process: "subprocess.Popen[bytes]", answers: Path, wanted: list[Wanted]) -> list[Answer]:
        """Wait for a child's answers: a line when it begins, and one for each change."""
        done: list[Answer] = []
        count, since = 0, time.monotonic()
        while count <= len(wanted):
            ended = process.poll() is not None  # before the file is read: it is complete then
            lines = answers.read_text(encoding="utf-8").split("\n")[:-1]
            for line in lines[count:]:
                took, since = time.monotonic() - since, time.monotonic()
                if count:
                    done.append(Answer.read(line))
                    if wanted[count - 1][0] == Tweak():
                        self.limit = max(_LEAST, _TIMES * took)
                if count < len(wanted):
                    self.progress(f"trying {wanted[count][0]}")
                count += 1
            took = time.monotonic() - since
            if count > len(wanted) or time.monotonic() > self.end:
                break
            if ended or (count and took > self.limit):
                if count:
                    how = f"crashed, {_status(process.returncode)}" if ended else f"ended after {took:.0f} s"
                    done.append(Answer(problem=how))
                break
            time.sleep(_POLL)
        return done


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"status {code}"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a child and the processes that it began."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


# -- in the child -----------------------------------------------------------------------------------------------------


def main(options_text: str, tweaks_text: str, answers: str) -> None:
    """Make the calls with each change, and write a line about each to a file."""
    options = Options(**json.loads(options_text))
    script = options.arguments is not None
    with Path(answers).open("a", encoding="utf-8") as file, configured(options.backend, options.device):

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()

        torch.compile(torch.relu, backend="eager")(torch.ones(1))  # what the first compile loads is no change's cost
        write("begin")
        for facts in json.loads(tweaks_text):
            answer = Answer()
            try:
                report = _calls(options, Tweak(**facts))
            except NotApplicableError:
                pass
            except Exception as error:
                answer = Answer(problem=f"raised {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
            else:
                more = tuple(one for one, _ in tweaks_for(report, ours=False, script=script) if not one.mark)
                answer = Answer(Facts.of(report, repeated=not script), more=more)
            write(json.dumps(dataclasses.asdict(answer)))


def _calls(options: Options, tweak: Tweak) -> Report:
    """Make the calls of an audit anew, and one more, which takes the time of a call that compiles nothing."""
    if options.arguments is not None:
        report = Report(options.target)
        with applied(tweak, None):
            run_here(options, report, lambda step: None)
        return report
    model, calls = load_calls(options)
    device = torch.device(options.device)
    with applied(tweak | Tweak(ours=options.ours), model):
        calls = [*calls, calls[-1]]
        if tweak.mark:
            mark(calls, tweak.mark)
        is_present = device.type == "cpu" or torch.get_device_module(device).is_available()
        if is_present:
            model, calls = model.to(device), _torch.map_tensors(lambda tensor: tensor.to(device), calls)
        return recorded(model, calls, device, train=options.train, dynamic=tweak.dynamic or None, mode=options.mode)
