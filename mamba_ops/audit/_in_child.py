"""Runs as `sitecustomize` in each Python that a watched script starts; see `mamba_ops.audit.processes`.

It is copied into a folder of its own, needs nothing but Python, and waits for torch.compile to be imported.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = os.environ.get("MAMBA_OPS_AUDIT_FOLDER", "")
_ROOT = os.environ.get("MAMBA_OPS_AUDIT_ROOT", "")


def _announce(ending: str = "started") -> None:
    with contextlib.suppress(OSError):  # the watched script has ended
        Path(_FOLDER, f"{os.getpid()}.{ending}").write_text(str(os.getppid()))


class _Finder(importlib.abc.MetaPathFinder):
    """Begins to listen when torch._dynamo has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _listen()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _listen() -> None:
    try:
        if importlib.util.find_spec("mamba_ops") is None:
            sys.path.append(_ROOT)
        from mamba_ops.audit.processes import listen_in_child

        listen_in_child(_FOLDER)
    except Exception:  # this process must run as it would without us
        _announce("failed")


def _run_next() -> None:
    """Run the sitecustomize that this one stands before, if there is one."""
    here = Path(__file__).parent
    paths = [path for path in sys.path if Path(path or ".").resolve() != here.resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if _FOLDER and Path(_FOLDER).is_dir():
    _announce()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_announce)
    sys.meta_path.insert(0, _Finder())
_run_next()
