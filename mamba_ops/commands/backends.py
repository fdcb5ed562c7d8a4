"""`mamba-ops backends`: which backend runs which op on this machine, and why the others do not."""

import os

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mamba_ops import registry
from mamba_ops.commands.options import Config, Device, configured, devices, fail
from mamba_ops.registry import Backend, RegistryError, explain


def backends(device: Device = None, backend: Config = None) -> None:
    """Say which backend runs which op here, and why not the others."""
    console = Console(highlight=False, markup=False)  # "[triton]" is an extra, not a style
    with configured(backend, device):
        try:
            for where in [device] if device else devices():
                _show(console, where)
        except RegistryError as error:
            fail(error)
    order = registry.backends()
    console.print("Default order: " + ", ".join(f"{known.name} {known.priority}" for known in order))
    requested = os.environ.get("MAMBA_OPS_BACKEND")
    console.print(f"MAMBA_OPS_BACKEND={requested} is in force" if requested else "MAMBA_OPS_BACKEND is not set")
    if backend is not None:
        console.print(f"--backend {backend} is in force")


def _show(console: Console, device: torch.device) -> None:
    """Print the table of one device: what the first sample of each op runs on. Below it stand what asked for that, if
    anything did, and the reason of each backend that does not run there by default.
    """
    order = registry.backends()
    reasons = {backend.name: _why_not(backend, device) for backend in order}
    table = Table(title=f"On {device}", title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("op", no_wrap=True)
    for heading in [*reasons, "runs on"]:
        table.add_column(heading)
    bound_by: list[str] = []
    for op in sorted((op for op in registry.ops().values() if not op.returns), key=lambda op: op.name):
        has_kernel = {name: name in op.kernels for name in reasons}
        marks = [("no" if reason else "yes") if has_kernel[name] else "-" for name, reason in reasons.items()]
        sample = op.make_samples(device)[0]
        explanation = explain(op, *sample.args, **sample.kwargs)
        if explanation.bound_by:
            bound_by.append(explanation.bound_by)
        table.add_row(op.name, *marks, (explanation.backend or "nothing") + (" *" if explanation.bound_by else ""))
    console.print(table)
    if bound_by:
        console.print(f"*: asked for by {', '.join(dict.fromkeys(bound_by))}", soft_wrap=True)
    for name, reason in reasons.items():
        if reason:
            console.print(f"{name}: {reason}", soft_wrap=True)
    console.print()


def _why_not(backend: Backend, device: torch.device) -> str | None:
    """Return why a backend does not run on a device by default, or None if it does."""
    reason = backend.why_unusable(device.type)
    if reason and backend.why_unusable(device.type, by_name=True) is None:
        return f"only if asked for by name ({reason})"
    return reason
