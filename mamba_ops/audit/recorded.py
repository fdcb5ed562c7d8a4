"""The calls of an audit made anew, for a change that is tried: in a process that exists for that."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mamba_ops.audit.collect import Collector
from mamba_ops.audit.eager import add_hidden_syncs
from mamba_ops.audit.report import Report
from mamba_ops.audit.run import Arguments, _compile, _first, _install, _trace_absent, quiet_torch


def recorded(
    fn: Callable[..., Any],
    calls: Sequence[Arguments],
    device: torch.device,
    *,
    train: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
) -> Report:
    """Return a report of calls as in `audit`, without copies and notes.

    Args:
        fn, calls: what is called, on the device where that is present.
        device, train, dynamic, mode: as for `audit`.

    Raises:
        ModelError: the model fails without the compiler.
    """
    is_absent = device.type != "cpu" and not torch.get_device_module(device).is_available()
    report = Report("", str(device), is_absent, torch=str(torch.__version__))
    collector = Collector(report, fn)
    with quiet_torch(), warnings.catch_warnings(), torch.set_grad_enabled(train):
        warnings.simplefilter("ignore")
        can_trace = is_absent and _install(device, report)
        syncs = _first(collector, fn, calls[0], device)
        if can_trace:
            _trace_absent(collector, fn, calls, device, dynamic, lambda step: None, runs_here=False)
        elif not is_absent:
            _compile(collector, fn, calls, device, train, dynamic, mode, lambda step: None)
        add_hidden_syncs(collector, syncs or ())
    return report
