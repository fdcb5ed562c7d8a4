"""Watches code that calls torch.compile itself: scripts, training loops, and the processes that they start."""

import contextlib
from collections.abc import Iterator

import torch

from mamba_ops.audit import _torch
from mamba_ops.audit.absent_code import traced_as_if_present
from mamba_ops.audit.answers import note_absence
from mamba_ops.audit.eager import hear_fallbacks
from mamba_ops.audit.processes import watch_processes
from mamba_ops.audit.report import Report


@contextlib.contextmanager
def watch(
    target: str = "watched code", report: Report | None = None, *, absent_device: str | None = None
) -> Iterator[Report]:
    """Within the block, record what torch.compile does with the user's own code, here and in processes started there.

    Args:
        target: what the report calls it.
        report: filled in as things become known. None: a new one, which is complete after the block.
        absent_device: a device that is not present, for which the code is traced; this cannot be undone in the process.
            Values that it asks for are taken to be 1; where that cannot be, the block ends. The report says so.
    """
    from mamba_ops.audit.collect import Collector

    report = report if report is not None else Report(target)
    report.torch, report.finished = str(torch.__version__), False
    collector = Collector(report, watches=True)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    report.device, report.absent = absent_device or str(accelerator or "cpu"), absent_device is not None
    as_if: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if absent_device is not None:
        note_absence(report, torch.device(absent_device))
        as_if = traced_as_if_present(absent_device, collector.assumption)
    try:
        with (
            watch_processes(collector),
            hear_fallbacks(collector, compiled=True),
            collector.listen(),
            as_if,
            collector.one_call("watched"),
        ):
            yield report
    except _torch.needs_values_errors() as error:
        if absent_device is None:
            raise
        collector.stop(str(error))
    finally:
        if any(finding.hides for finding in report.findings):
            report.notes.append(
                "What stands behind a break that gave a whole function up was not looked for, as the code would run "
                "once more: mend that break, or audit the model by a factory."
            )
        report.notes += _torch.losses()
        report.finished = True
        report.sort()
