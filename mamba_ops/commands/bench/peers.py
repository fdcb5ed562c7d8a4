"""Kernels of other projects, which ours are compared with: used if they can be imported, never required.

An op names its peers (`bench_peer`): each takes one of its cases, arranges the inputs once as its own layers would, and
returns the call to time.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

from mamba_ops.ops._common.bench import Call, Calls, Case
from mamba_ops.registry import Op

PACKAGES = {
    "vLLM": "vllm",
    "mamba_ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
    "fla": "fla",
    "FlashInfer": "flashinfer",
}
"""Projects, and the packages that they are imported as."""
Arrange = Callable[[Case], Call | Calls]
"""Makes a peer's call of a case. It raises ImportError where the peer is absent."""


def module(name: str) -> ModuleType:
    """Import a peer's module; those of the folder that MAMBA_OPS_PEERS names come before installed ones.

    Raises:
        ImportError: it is not there, or what it imports is not.
    """
    if folder := os.environ.get("MAMBA_OPS_PEERS"):
        folder = str(Path(folder).resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module(name)


def of(op: Op[...]) -> dict[str, Arrange]:
    """Return an op's peers by name."""
    return {name: partial(arrange, module=module) for name, arrange in op.bench_peers.items()}


def present(known: Mapping[str, Arrange], case: Case) -> tuple[dict[str, Calls], dict[str, Exception]]:
    """Return the calls of those peers that are here and take a case, and of the others why not: an ImportError, a
    NotTaken, or what another version of a peer raises that is not as we know it."""
    found: dict[str, Calls] = {}
    absent: dict[str, Exception] = {}
    for name, arrange in known.items():
        try:
            calls = arrange(case)
        except Exception as error:
            absent[name] = error
        else:
            found[name] = calls if isinstance(calls, Calls) else Calls(calls, calls)
    return found, absent


def versions() -> dict[str, str]:
    """Return which projects are here: name to version."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = str(getattr(module(package), "__version__", "of no stated version"))
        except Exception as error:  # of a library that it loads, say
            sentence, _, _ = str(error).partition("\n")
            found[name] = f"absent ({sentence})"
    return found
