"""The one object that knows what is registered and what is selected.

What is selected is a `Snapshot`, which never changes: a swap makes another one current. An op remembers its decisions
by snapshot, so that a swap back finds them again. `use_backend` is local to a context (a thread, an asyncio task);
`configure` and the environment are process-wide.
"""

import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mamba_ops.registry import capture, errors
from mamba_ops.registry.decision_cache import DecisionCache
from mamba_ops.registry.snapshot import NO_REQUESTS, Request, Requests, Snapshot

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Backend
    from mamba_ops.registry.namespace import Namespace
    from mamba_ops.registry.op import Op


class Dispatcher:
    """What is registered, and what is selected.

    Attributes:
        lock: for all changes. A child process that is forked has it free.
        namespaces, ops, backends: what is registered, by name; ops by qualified name, in the order of declaration.
        configured: what `configure` asks for.
        recorders: the lists to which `record_selections` now appends.
        renewals: how often caches were renewed.
        listeners: called, with the lock held, when something else may be selected than before.
        follow: called with the snapshot that is now current in this context.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.namespaces: dict[str, Namespace] = {}
        self.ops: dict[str, Op[...]] = {}
        self.backends: dict[str, Backend] = {}
        self.configured: Request | None = None
        self.recorders: tuple[list[Any], ...] = ()
        self.renewals = 0
        self.listeners: list[Callable[[], None]] = []
        self.follow: Callable[[Snapshot], None] = lambda snapshot: None
        self._environments: dict[str, Request] = {}
        self._snapshots: dict[Hashable, Snapshot] = {}
        self._selected: dict[Requests, Snapshot] = {}  # those with the request of `configure` that is in force
        self._generations = itertools.count(1)
        self._active: ContextVar[Requests] = ContextVar("active requests", default=NO_REQUESTS)
        self._plugins: set[str] = set()  # namespaces whose entry points are loaded, or being loaded
        self._complete: set[str] = set()  # those whose are
        if hasattr(os, "register_at_fork"):
            release = self.lock.release
            os.register_at_fork(before=self.lock.acquire, after_in_parent=release, after_in_child=release)

    # -- what is selected -----------------------------------------------------------------------------------------

    @property
    def active(self) -> Requests:
        """The requests of `use_backend` in this context."""
        return self._active.get()

    def current(self) -> Snapshot:
        """Return what is selected in this context."""
        return self.snapshot(self._active.get())

    def snapshot(self, active: Requests) -> Snapshot:
        """Return what is selected where these requests are active."""
        if (found := self._selected.get(active)) is None:
            with self.lock:
                requests = (*active.requests, *([self.configured] if self.configured else ()))
                if (found := self._snapshots.get((active, self.configured))) is None:
                    found = Snapshot(self, active, requests, next(self._generations))
                    self._snapshots[active, self.configured] = found
                self._selected[active] = found
        return found

    @contextmanager
    def override(self, snapshot: Snapshot) -> Iterator[None]:
        """Within the block, this context selects as a snapshot says."""
        before = self._active.get()
        self._active.set(snapshot.active)
        try:
            yield
        finally:
            self._active.set(before)

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
            active = self._active.get()
            snapshot = self.current() if named is None else named
            key = snapshot, bool(self.recorders), named is not None
            if (cache := op._all_decisions.get(key)) is None:
                cache = op._all_decisions[key] = DecisionCache(snapshot, is_foreign=named is not None)
            if named is None:
                op._decisions[active] = cache
            return cache

    # -- changes --------------------------------------------------------------------------------------------------

    def activate(self, active: Requests) -> None:
        """Let this context's `use_backend` requests be these."""
        self._active.set(active)
        snapshot = self.snapshot(active)
        self.follow(snapshot)
        capture.warn_of_swap(snapshot)

    def configure(self, request: Request | None) -> None:
        """Put a request in force for the process."""
        with self.lock:
            self.configured = request
            self._reselect()
        capture.warn_of_swap(self.current())

    def record(self, recorder: list[Any], *, stop: bool = False) -> None:
        """Append all runs of ops to a list from now on, or no longer."""
        with self.lock:
            self.recorders = (*(r for r in self.recorders if r is not recorder), *(() if stop else (recorder,)))
            self._reselect()

    def changed(self) -> None:
        """Forget all decisions: what is registered has changed, or which caches are new."""
        with self.lock:
            self._snapshots.clear()
            for op in self.ops.values():
                op._all_decisions.clear()
            self._reselect()

    def _reselect(self) -> None:
        """Let each op's next call look at what is selected."""
        self._selected.clear()
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
                capture.forget(op)
            self.changed()

    # -- registration ---------------------------------------------------------------------------------------------

    def load_entry_points(self) -> None:
        """Import other packages' backends, once per namespace; a broken one is reported and does not stop the rest."""
        if self._complete.issuperset(self.namespaces):
            return
        with self.lock:
            for name in [n for n in self.namespaces if n not in self._plugins]:
                self._plugins.add(name)
                for entry in entry_points(group=f"{name}.backends"):
                    try:
                        entry.load()
                    except Exception as error:
                        problem = f"backend plug-in {entry.name} ({entry.value}) could not be loaded: {error!r}"
                        warnings.warn(problem, RuntimeWarning, stacklevel=3)
                self._complete.add(name)

    def refuse_duplicate(self, kind: str, name: str, known: Mapping[str, Any]) -> None:
        """Raise if a name is taken, pointing at the first registration."""
        if (first := known.get(name)) is not None:
            raise errors.duplicate(kind, name, first.source)


def caller() -> str:
    """Return `file:line` of the call of the function that asks."""
    frame = sys._getframe(2)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def device_of(arguments: Mapping[str, Any]) -> Any:
    """Return the device that a call runs on."""
    return next(argument.device for argument in arguments.values() if isinstance(argument, Tensor))


dispatcher = Dispatcher()
