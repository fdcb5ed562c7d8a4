"""The one object that knows what is registered and what is selected.

What is selected is a `Snapshot`: a swap makes another one current, and an op remembers its decisions by snapshot, so
that a swap back finds them again. `use_backend` is local to a context (a thread, an asyncio task); `configure` and the
environment are process-wide.
"""

import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from mamba_ops.registry.snapshot import NO_REQUESTS, DecisionCache, Request, Requests, Snapshot

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Backend
    from mamba_ops.registry.capture import Captured
    from mamba_ops.registry.namespace import Namespace
    from mamba_ops.registry.op import Op
    from mamba_ops.registry.selection import Selection

T = TypeVar("T")


class Dispatcher:
    """What is registered, and what is selected."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # for all changes; a child process that is forked has it free
        self.namespaces: dict[str, Namespace] = {}
        self.ops: dict[str, Op[...]] = {}  # by qualified name, in the order of declaration
        self.backends: dict[str, Backend] = {}
        self.active: ContextVar[Requests] = ContextVar("requests of use_backend in a context", default=NO_REQUESTS)
        self.configured: Request | None = None  # what `configure` asks for
        self.captured: dict[Op[...], Captured] = {}  # ops in graphs that callers captured, and what they ran on
        self.recorders: tuple[list[Selection], ...] = ()  # the lists to which `record_selections` now appends
        self.renewals = 0  # how often caches were renewed
        self.listeners: list[Callable[[], None]] = []  # called, with the lock held, when the selection may have changed
        self._environments: dict[str, Request] = {}
        self._snapshots: dict[tuple[Requests, Request | None], Snapshot] = {}
        self._generations = itertools.count(1)
        self._plugins: dict[str, bool] = {}  # namespaces: whether all their entry points are loaded
        if hasattr(os, "register_at_fork"):
            release = self.lock.release
            os.register_at_fork(before=self.lock.acquire, after_in_parent=release, after_in_child=release)

    def current(self) -> Snapshot:
        """Return what is selected in this context."""
        return self.snapshot(self.active.get())

    def snapshot(self, active: Requests) -> Snapshot:
        """Return what is selected where these requests are active."""
        key = active, self.configured
        if (found := self._snapshots.get(key)) is None:
            with self.lock:
                found = self._snapshots.setdefault(key, Snapshot(self, *key, next(self._generations)))
        return found

    def override(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """Within the block, this context selects as a snapshot says."""
        return within(self.active, snapshot.active)

    def environment(self, namespace: str) -> Request:
        """Return what `<NAMESPACE>_BACKEND` and `<NAMESPACE>_CHECK` ask for; they are read once."""
        with self.lock:
            if namespace not in self._environments:
                from mamba_ops.registry.request import from_environment

                self._environments[namespace] = from_environment(self.namespaces[namespace])
            return self._environments[namespace]

    def decisions(self, op: "Op[...]", named: Snapshot | None = None) -> DecisionCache:
        """Return what an op has decided under a snapshot, by default the current one."""
        with self.lock:
            snapshot = self.current() if named is None else named
            key = snapshot, bool(self.recorders), named is not None
            if (cache := op._all_decisions.get(key)) is None:
                cache = op._all_decisions[key] = DecisionCache(snapshot, is_foreign=named is not None)
            if named is None:
                op._decisions[snapshot.active] = cache
            return cache

    def changed(self) -> None:
        """Forget all decisions: what is registered has changed, or which caches are new."""
        with self.lock:
            self._snapshots.clear()
            for op in self.ops.values():
                op._all_decisions.clear()
            self.reselect()

    def reselect(self) -> None:
        """Let each op's next call look at what is selected; called with the lock held."""
        for op in self.ops.values():
            op._decisions.clear()
        for listener in self.listeners:
            listener()

    def remove_namespace(self, name: str) -> None:
        """Forget a namespace, its ops and what its environment variable asks for."""
        with self.lock:
            self.namespaces.pop(name, None)
            self._environments.pop(name, None)
            for op in [op for op in self.ops.values() if op.namespace == name]:
                del self.ops[op.qualname]
                self.captured.pop(op, None)
            self.changed()

    def load_entry_points(self) -> None:
        """Import other packages' backends, once per namespace; a broken one is reported and does not stop the rest."""
        if all(map(self._plugins.get, self.namespaces)):
            return
        with self.lock:
            for name in [n for n in self.namespaces if n not in self._plugins]:
                self._plugins[name] = False  # a backend that is being imported may come here again
                for entry in entry_points(group=f"{name}.backends"):
                    try:
                        entry.load()
                    except Exception as error:
                        problem = f"backend plug-in {entry.name} ({entry.value}) could not be loaded: {error!r}"
                        warnings.warn(problem, RuntimeWarning, stacklevel=3)
                self._plugins[name] = True


@contextmanager
def within(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Within the block, a variable has a value in this context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def caller() -> str:
    """Return `file:line` of the call of the function that asks."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def device_of(arguments: Mapping[str, Any]) -> Any:
    """Return the device that a call runs on."""
    return next(argument.device for argument in arguments.values() if isinstance(argument, Tensor))


dispatcher = Dispatcher()
