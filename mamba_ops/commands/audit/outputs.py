"""What the subcommand reads and writes: reports as files of several forms, and as text."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mamba_ops.audit.merging import merge
from mamba_ops.audit.outputs.github import annotations
from mamba_ops.audit.outputs.issue import issue
from mamba_ops.audit.outputs.sarif import sarif
from mamba_ops.audit.processes import rank
from mamba_ops.audit.report import Report
from mamba_ops.audit.show import show, show_changes
from mamba_ops.commands.options import fail

_STDOUT = "-"


@dataclass(frozen=True)
class Outputs:
    """The files that were asked for; in a process of torchrun, each gets the rank into its name.

    Attributes:
        json, html, sarif, issue: files. None: not written. "-" is stdout, for the JSON and the issue.
        github: whether annotations are printed.
    """

    json: Path | None = None
    html: Path | None = None
    sarif: Path | None = None
    issue: Path | None = None
    github: bool = False

    @property
    def trace(self) -> str | None:
        """The folder for torch's trace, beside the page; None without a page or without tlparse, which shows it."""
        if self.html is None or shutil.which("tlparse") is None:
            return None
        html = _of_rank(self.html, rank())
        return str(html.with_suffix(".trace"))

    @property
    def take_stdout(self) -> bool:
        """Whether stdout is a file, so that the text goes to stderr."""
        return _STDOUT in (str(self.json), str(self.issue))

    def write(self, report: Report, console: Console, before: Report | None = None) -> None:
        """Write a report to all files, and print it."""
        number = rank()
        if number is not None and not report.ranks:
            report.ranks = (number,)
        try:
            if self.json is not None:
                _write(self.json, report.to_json() + "\n", number)
            if self.html is not None:
                from mamba_ops.audit.html import page

                _write(self.html, page(report, before, _parsed(self.trace)), number)
            if self.sarif is not None:
                _write(self.sarif, sarif(report, before) + "\n", number)
            if self.issue is not None:
                _write(self.issue, issue(report), number)
        except OSError as error:
            fail(f"{error.filename} cannot be written: {error.strerror}")
        show(report, console)
        if before is not None:
            show_changes(report, before, console)
        for line in annotations(report) if self.github else ():
            console.print(line, markup=False, soft_wrap=True)


def _parsed(folder: str | None) -> str | None:
    """Let tlparse make pages of a trace; return the address of the first, relative to a page beside the folder."""
    logs = sorted(Path(folder).glob("*.log"), key=lambda log: log.stat().st_mtime) if folder is not None else []
    if folder is None or not logs:
        return None
    pages = Path(folder, "tlparse")
    command = ["tlparse", str(logs[-1]), "--overwrite", "--no-browser", "-o", str(pages)]
    try:
        subprocess.run(command, capture_output=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{Path(folder).name}/tlparse/index.html" if (pages / "index.html").is_file() else None


def _of_rank(file: Path, number: int | None) -> Path:
    return file if number is None else file.with_suffix(f".rank{number}{file.suffix}")


def _write(file: Path, text: str, number: int | None) -> None:
    if str(file) == _STDOUT:
        sys.stdout.write(text)
    else:
        _of_rank(file, number).write_text(text, encoding="utf-8")


def read_report(file: Path) -> Report:
    """Read what --json wrote; end the command with a sentence if it is something else."""
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}")
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{file} is no report: {error}")


def read_merged(files: Sequence[str]) -> Report:
    """Read reports, and return one: that of several ranks if there are several."""
    reports = [read_report(Path(file)) for file in files]
    if len(reports) == 1:
        return reports[0]
    try:
        return merge(reports)
    except ValueError as error:
        fail(error)
