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
from mamba_ops.audit.report import Report
from mamba_ops.audit.run import recorded
from mamba_ops.audit.tries import NotApplicableError, Tweak, applied, mark, outcome, together, tweaks_for
from mamba_ops.commands.audit.target import Options, load_calls, run_here
from mamba_ops.commands.options import configured

SECONDS = 60.0  # in all
_POLL = 0.05
_LEAST, _TIMES = 10.0, 4.0  # seconds that a try may take: these, or as many times those without a change
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mamba_ops.commands.audit.tried import main; main(*sys.argv[2:])"
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a child says of a change: the outcome, None if it does not fit, and changes for what came to be seen."""

    tried: Try | None
    more: tuple[Tweak, ...] = ()


Wanted = tuple[Tweak, tuple[str, ...]]  # a change, and the fingerprints of the findings that it may mend


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
    end = time.monotonic() + seconds
    left, answers = _run_all(options, wanted, end, progress)
    tries = [answer.tried for answer in answers if answer.tried is not None]
    best = together(wanted, tries)
    known = {tried.change for tried in tries}
    while best is not None and not left:  # what stood behind a break is seen once that is gone
        best = functools.reduce(Tweak.__or__, (more for answer in answers for more in answer.more), best)
        if str(best) in known:
            break
        known.add(str(best))
        left, answers = _run_all(options, [(best, ())], end, progress)
        tries += [answer.tried for answer in answers if answer.tried is not None]
    report.tries += tries
    if left:
        names = "; ".join(str(tweak) for tweak, _ in left)
        report.notes.append(f"Not tried within {seconds:g} s (--try-seconds): {names}.")


def _run_all(
    options: Options, wanted: list[Wanted], end: float, progress: Callable[[str], None]
) -> tuple[list[Wanted], list[Answer]]:
    """Return what was not reached, and the answers; a child that was ended by a change is followed by another one."""
    answers: list[Answer] = []
    while wanted and time.monotonic() < end:
        done = _run_child(options, wanted, end, progress)
        if not done:  # not even the calls without a change came to an end
            break
        answers += done
        wanted = wanted[len(done) :]
    return wanted, answers


def _run_child(options: Options, wanted: list[Wanted], end: float, progress: Callable[[str], None]) -> list[Answer]:
    """Return the answers, as far as a child came."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers")
        answers.touch()
        facts = json.dumps([[dataclasses.asdict(tweak), findings] for tweak, findings in wanted])
        command = [
            sys.executable,
            "-c",
            _BOOTSTRAP,
            json.dumps(sys.path),
            json.dumps({**dataclasses.asdict(options), "trace": None}),
        ]
        process = subprocess.Popen(
            [*command, facts, str(answers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return _follow(process, answers, wanted, end, progress)
        finally:
            _kill(process)


def _follow(
    process: "subprocess.Popen[bytes]",
    answers: Path,
    wanted: list[Wanted],
    end: float,
    progress: Callable[[str], None],
) -> list[Answer]:
    """Wait for a child's answers, one a line: first that without a change, then one for each change."""
    done: list[Answer] = []
    count, limit, since = 0, float("inf"), time.monotonic()
    while count <= len(wanted):
        ended = process.poll() is not None  # before the file is read: it is complete then
        lines = answers.read_text(encoding="utf-8").split("\n")[:-1]
        for line in lines[count:]:
            facts = json.loads(line)
            if count:
                more = tuple(Tweak(**tweak) for tweak in facts["more"])
                done.append(Answer(Try.read(facts["tried"]) if facts["tried"] else None, more))
            else:
                limit = max(_LEAST, _TIMES * facts)
            if count < len(wanted):
                progress(f"trying {wanted[count][0]}")
            count, since = count + 1, time.monotonic()
        if count > len(wanted) or time.monotonic() > end:
            break
        took = time.monotonic() - since
        if ended or took > limit:
            if count:
                tweak, findings = wanted[count - 1]
                how = f"crashed, {_status(process.returncode)}" if ended else f"ended after {took:.0f} s"
                done.append(Answer(Try(str(tweak), findings, problem=how, ours=tweak.ours)))
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


def main(options_text: str, wanted_text: str, answers: str) -> None:
    """Make the calls without a change, then with each, and write a line about each to a file."""
    options = Options(**json.loads(options_text))
    wanted = [(Tweak(**facts), tuple(findings)) for facts, findings in json.loads(wanted_text)]
    with Path(answers).open("a", encoding="utf-8") as file, configured(options.backend, options.device):

        def answer(facts: object) -> None:
            file.write(json.dumps(facts) + "\n")
            file.flush()

        torch.compile(torch.relu, backend="eager")(torch.ones(1))  # what the first compile loads is no change's cost
        begin = time.monotonic()
        before = _calls(options, Tweak())
        answer(time.monotonic() - begin)
        for tweak, findings in wanted:
            try:
                after = _calls(options, tweak)
            except NotApplicableError:
                answer(dataclasses.asdict(Answer(None)))
            except Exception as error:
                sentence = f"raised {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
                answer(dataclasses.asdict(Answer(Try(str(tweak), findings, problem=sentence, ours=tweak.ours))))
            else:
                script = options.arguments is not None
                more = tuple(one for one, _ in tweaks_for(after, ours=False, script=script) if not one.mark)
                answer(dataclasses.asdict(Answer(outcome(tweak, findings, before, after), more)))


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
