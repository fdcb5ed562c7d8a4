"""The subcommand itself: its options, and how it ends."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mamba_ops.audit.report import Report
from mamba_ops.audit.show import show, show_changes
from mamba_ops.commands.audit import target as auditing
from mamba_ops.commands.options import Config, configured, fail

FAIL_ON = ("break", "recompile", "fallback", "copy", "jit", "sync", "kernel", "capture")


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="package.module:factory or file.py:factory, which returns (model, inputs); transformers:TYPE or "
            "transformers:FOLDER. With --run, a script.",
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGS]...", help="With --run: the script's; -- before any dash.")
    ] = None,
    script: Annotated[
        bool, typer.Option("--run", help="Run TARGET as a script and watch its own torch.compile.")
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
    fail_on: Annotated[
        str | None, typer.Option(metavar="KINDS", help=f"Exit with 1 on any of {','.join(FAIL_ON)}.")
    ] = None,
    other: Annotated[
        Path | None, typer.Option("--compare", metavar="OTHER.json", help="Say what changed since.", dir_okay=False)
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="When to stop and show what is known.")
    ] = None,
) -> None:
    """Say why a model breaks under torch.compile, on which line, and what to change."""
    stdout_is_json = json_file is not None and str(json_file) == "-"
    console = Console(stderr=stdout_is_json, highlight=False)
    errors = Console(stderr=True, highlight=False)
    wanted = [kind.strip() for kind in fail_on.split(",")] if fail_on else []
    if unknown := [kind for kind in wanted if kind not in FAIL_ON]:
        fail(f"--fail-on: got {', '.join(unknown)}, expected some of {', '.join(FAIL_ON)}")
    before = _read(other) if other else None
    ended: BaseException | None = None
    failed: Exception | None = None
    report = Report(target, device, finished=False)
    try:
        auditing.is_absent(device)
    except RuntimeError:
        fail(f"--device: got {device}, expected cpu, cuda or xpu")
    # What the user's code prints must not end up in the data.
    printed = contextlib.redirect_stdout(sys.stderr) if stdout_is_json else contextlib.nullcontext()
    if script and (shapes or mode or train or copies or layers or full or ours or device != "cpu"):
        fail("--run goes with --backend, --json, --html, --fail-on, --compare, --limit: the script says the rest")
    try:
        if script:
            with printed, configured(backend, None):
                report, ended = auditing.run_script(target, arguments or [], limit)
        elif arguments:
            fail(f"got {' '.join(arguments)} after the target, expected that with --run alone")
        else:
            sizes = auditing.read_shapes(shapes) if shapes else None
            copies = copies or "copy" in wanted  # copies are counted only if they are looked for
            options = auditing.Options(target, device, sizes, mode, train, copies, layers, full, ours, limit)
            status: Any = errors.status(f"{target} on {device}") if errors.is_terminal else contextlib.nullcontext()
            with printed, status as shown, configured(backend, device):

                def progress(step: str) -> None:
                    if shown is not None:
                        shown.update(step)
                    else:
                        errors.print(f"{step} ...", markup=False)

                auditing.run(options, report, progress)
    except (auditing.UserError, auditing.ReportedError) as error:
        failed = error
    except KeyboardInterrupt:
        report.finished = False
    report.sort()
    if failed is None or report.calls:  # else nothing is known
        _write(report, console, json_file, html_file, before)
    if isinstance(failed, auditing.UserError):
        auditing.show_cause(failed)
        fail(failed)
    if failed is not None:
        raise typer.Exit(2)
    if isinstance(ended, SystemExit):
        errors.print(f"mamba-ops: {target} ended with status {ended.code}", markup=False, soft_wrap=True)
        raise typer.Exit(2)
    if ended is not None and not isinstance(ended, KeyboardInterrupt):
        failure = auditing.UserError(f"{target} raised {type(ended).__name__}")
        failure.__cause__ = ended
        auditing.show_cause(failure)
        fail(failure)
    if not report.finished:
        raise typer.Exit(130)
    raise typer.Exit(1 if report.failing(wanted) else 0)


def _write(
    report: Report, console: Console, json_file: Path | None, html_file: Path | None, before: Report | None
) -> None:
    try:
        if json_file is not None and str(json_file) == "-":
            sys.stdout.write(report.to_json() + "\n")
        elif json_file is not None:
            json_file.write_text(report.to_json() + "\n", encoding="utf-8")
        if html_file is not None:
            from mamba_ops.audit.html import page

            html_file.write_text(page(report, before), encoding="utf-8")
    except OSError as error:
        fail(f"{error.filename} cannot be written: {error.strerror}")
    show(report, console)
    if before is not None:
        show_changes(report, before, console)


def _read(file: Path) -> Report:
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}")
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{file} is no report: {error}")
