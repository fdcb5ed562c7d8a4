"""A limit of time for what has none of its own, such as a compile."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_AGAIN = 2.0  # seconds: what is raised in a destructor is lost


class TimeIsUp(KeyboardInterrupt):
    """The limit has passed. Like Ctrl-C it goes past every `except Exception` on its way."""


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise `TimeIsUp` within the block once so much time has passed; None: never.

    It needs a timer that interrupts, which Unix has, in the main thread; elsewhere there is no limit. Of two that are
    nested the one that ends first counts.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not on_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeIsUp(f"more than {seconds:.0f} s")

    def lost(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, TimeIsUp):  # that comes again
            tell(unraisable)

    left, _ = signal.getitimer(signal.ITIMER_REAL)
    if left and left < seconds:
        yield
        return
    start = time.monotonic()
    tell, sys.unraisablehook = sys.unraisablehook, lost
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        sys.unraisablehook = tell
        if left:
            used = time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left - used, 0.001), _AGAIN)
