"""The subcommand: its options, its output and its exit status."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mamba_ops.audit.report import Report
from mamba_ops.commands.audit import target as auditing
from mamba_ops.commands.audit import tried
from mamba_ops.commands.audit.child import ReportedError, run_in_child
from mamba_ops.commands.audit.outputs import Outputs, read_merged, read_report
from mamba_ops.commands.options import Config, configured, fail

FAIL_ON = ("break", "recompile", "fallback", "copy", "jit", "sync", "kernel", "capture", "new")


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="package.module:factory or file.py:factory, which returns (model, inputs); transformers:TYPE or "
            "transformers:FOLDER. With --run, a script; with -m, a module. Or files of --json, one of each rank.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGS]...", help="With --run and -m: the script's; -- before any dash."),
    ] = None,
    script: Annotated[
        bool, typer.Option("--run", help="Run TARGET as a script and watch its own torch.compile.")
    ] = False,
    module: Annotated[
        bool, typer.Option("-m", "--module", help="Run TARGET as `python -m TARGET`, and watch it as --run does.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu; one that is not here is traced as absent.")] = "cpu",
    shapes: Annotated[str | None, typer.Option(help="Leading sizes of the inputs: 1x128,1x129,4x512.")] = None,
    mode: Annotated[str | None, typer.Option(help="As for torch.compile; Inductor runs.")] = None,
    backend: Config = None,
    train: Annotated[bool, typer.Option("--train", help="Compile the backward pass too.")] = False,
    copies: Annotated[bool, typer.Option("--copies", help="Look for copies in what Inductor makes.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Of a model of Transformers.", show_default="2")] = None,
    full: Annotated[bool, typer.Option("--full", help="Keep the sizes of a model of Transformers.")] = False,
    ours: Annotated[bool, typer.Option("--ours", help="Run a model of Transformers on our ops.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write it as data; - for stdout.")
    ] = None,
    html_file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as one page.")] = None,
    sarif_file: Annotated[
        Path | None, typer.Option("--sarif", metavar="FILE", help="Write it as SARIF, for code hosts and editors.")
    ] = None,
    issue_file: Annotated[
        Path | None, typer.Option("--issue", metavar="FILE", help="Write an issue to paste; - for stdout.")
    ] = None,
    github: Annotated[bool, typer.Option("--github", help="Print annotations for GitHub's runner.")] = False,
    fail_on: Annotated[
        str | None, typer.Option(metavar="KINDS", help=f"Exit with 1 on any of {','.join(FAIL_ON)}.")
    ] = None,
    other: Annotated[
        Path | None, typer.Option("--compare", metavar="OTHER.json", help="Say what changed since.", dir_okay=False)
    ] = None,
    try_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="For trying what needs no change of code, in all.",
            show_default=f"{tried.SECONDS:g}; 0 with --run, as a script would run again",
        ),
    ] = None,
    no_try: Annotated[bool, typer.Option("--no-try", help="Try nothing.")] = False,
    limit: Annotated[
        float | None,
        typer.Option(min=1, metavar="SECONDS", help="Audit in a child process, end it then, and show what is known."),
    ] = None,
) -> None:
    """Say why a model breaks under torch.compile, on which line, and what to change."""
    outputs = Outputs(json_file, html_file, sarif_file, issue_file, github)
    console = Console(stderr=outputs.take_stdout, highlight=False)
    errors = Console(stderr=True, highlight=False)
    wanted = [kind.strip() for kind in fail_on.split(",")] if fail_on else []
    if unknown := [kind for kind in wanted if kind not in FAIL_ON]:
        fail(f"--fail-on: got {', '.join(unknown)}, expected some of {', '.join(FAIL_ON)}")
    if "new" in wanted and other is None:
        fail("--fail-on: got new, expected --compare OTHER.json with it: what is new is told from an older report")
    before = read_report(other) if other else None
    if target.endswith(".json"):
        report = read_merged([target, *(arguments or [])])
        outputs.write(report, console, before)
        raise typer.Exit(_status(report, wanted, before) if report.finished else 130)
    script |= module
    seconds = tried.SECONDS if try_seconds is None else try_seconds
    if no_try or (script and try_seconds is None):
        seconds = 0.0
    failed: Exception | None = None
    report = Report(target, device, finished=False)
    try:
        auditing.is_absent(device)
    except RuntimeError:
        fail(f"--device: got {device}, expected cpu, cuda or xpu")
    # What the user's code prints must not be mixed into the JSON.
    printed = contextlib.redirect_stdout(sys.stderr) if outputs.take_stdout else contextlib.nullcontext()
    if script and (shapes or mode or train or copies or layers or full or ours):
        fail(
            "--run goes without --shapes, --mode, --train, --copies, --layers, --full, --ours: the script says the rest"
        )
    try:
        if arguments and not script:
            fail(f"got {' '.join(arguments)} after the target, expected that with --run alone")
        options = auditing.Options(
            target,
            device,
            shapes=auditing.read_shapes(shapes) if shapes else None,
            mode=auditing.read_mode(mode) if mode else None,
            backend=backend,
            train=train,
            copies=copies or "copy" in wanted,  # copies are counted only if they are looked for
            layers=layers,
            full=full,
            ours=ours,
            limit=limit,
            arguments=(arguments or []) if script else None,
            module=module,
            trace=outputs.trace,
        )
        with printed, configured(backend, None if script else device):
            if limit is not None or auditing.is_absent(device):
                auditing.check(options)
                run_in_child(options, report, keep_stdout=script and not outputs.take_stdout)
            else:
                with _shown_steps(errors, target, device, script) as progress:
                    auditing.run_here(options, report, progress)
            if seconds and report.finished:
                with _shown_steps(errors, target, device, script) as progress:
                    tried.try_changes(options, report, seconds, progress)
    except (auditing.UserError, ReportedError) as error:
        failed = error
    except KeyboardInterrupt:
        report.finished = False
    report.sort()
    if failed is None or report.calls:  # else the report is empty
        outputs.write(report, console, before)
    if isinstance(failed, auditing.UserError):
        auditing.show_cause(failed)
        fail(failed)
    if failed is not None:
        raise typer.Exit(2)
    if not report.finished:
        raise typer.Exit(130)
    raise typer.Exit(_status(report, wanted, before))


def _status(report: Report, wanted: Sequence[str], before: Report | None) -> int:
    """Return the exit status of a finished report: 3 where it cannot say that all is well."""
    if report.failing(wanted, before):
        return 1
    return 3 if report.compiled_nothing or (wanted and report.incomplete) else 0


@contextlib.contextmanager
def _shown_steps(console: Console, target: str, device: str, script: bool) -> Iterator[Callable[[str], None]]:
    """Show the steps of an audit: on a terminal the present one, in a log one a line; a script has none."""
    if script or not console.is_terminal:
        yield lambda step: console.print(f"{step} ...", markup=False)
        return
    with console.status(f"{target} on {device}") as status:
        yield status.update
