"""What is known: namespaces, ops and backends. Filled by op.py and backend.py, read by selection.py."""

import sys
import threading
import warnings
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from mamba_ops.registry import errors

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Backend
    from mamba_ops.registry.op import Namespace, Op

lock = threading.RLock()  # for all process-wide state of the registry
namespaces: dict[str, "Namespace"] = {}
ops: dict[str, "Op[...]"] = {}  # by qualified name, in declaration order
backends: dict[str, "Backend"] = {}
_loaded: set[str] = set()  # namespaces whose plug-ins are imported, or being imported
_looked_at: set[str] = set()  # those whose are


def caller() -> str:
    """Return `file:line` of whoever called the function that asks."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def load_entry_points() -> None:
    """Import other packages' backends, once per namespace; a broken one is reported and does not stop the rest."""
    if _looked_at.issuperset(namespaces):
        return
    with lock:
        for name in [n for n in namespaces if n not in _loaded]:
            _loaded.add(name)
            for entry in entry_points(group=f"{name}.backends"):
                try:
                    entry.load()
                except Exception as error:
                    problem = f"backend plug-in {entry.name} ({entry.value}) could not be loaded: {error!r}"
                    warnings.warn(problem, RuntimeWarning, stacklevel=3)
            _looked_at.add(name)


def refuse_duplicate(
    kind: str, name: str, known: "dict[str, Namespace] | dict[str, Op[...]] | dict[str, Backend]"
) -> None:
    """Raise if the name is taken, pointing at who took it."""
    if (first := known.get(name)) is not None:
        raise errors.duplicate(kind, name, first.source)
