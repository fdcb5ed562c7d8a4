"""A limit of time for what has none of its own, such as a compile."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_AGAIN = 5.0  # seconds, for whoever swallows even this
_SOON = 0.05  # and where it cannot be raised now, or what was raised in a destructor is lost
_PATIENCE = 10.0  # in all, for what must not end half way


class TimeIsUp(KeyboardInterrupt):
    """The limit has passed. Like Ctrl-C it goes past every `except Exception` on its way."""


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise `TimeIsUp` within the block once so much time has passed, or at its end; None: never.

    An import, and the begin and end of a `with` block, are waited for: half a module, or a mode of torch's that nobody
    ends, would be there for the rest of the process. It needs a timer that interrupts, which Unix has, in the main
    thread; elsewhere there is no limit. Of two that are nested the one that ends first counts.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not on_main or not hasattr(signal, "setitimer"):
        yield
        return

    start, passed, over = time.monotonic(), False, False
    around = set(_frames(sys._getframe()))

    def stop(_: int, frame: FrameType | None) -> None:
        nonlocal passed
        if over:  # the alarm came while it was turned off
            return
        passed = True
        within = (f for f in _frames(frame) if f not in around)
        if time.monotonic() < start + seconds + _PATIENCE and any(map(_must_not_end_half_way, within)):
            signal.setitimer(signal.ITIMER_REAL, _SOON, _AGAIN)
            return
        raise _time_is_up(seconds)

    def lost(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, TimeIsUp):
            signal.setitimer(signal.ITIMER_REAL, _SOON, _AGAIN)
        else:
            tell(unraisable)

    left, interval = signal.getitimer(signal.ITIMER_REAL)
    if left and left < seconds:
        yield
        return
    tell, sys.unraisablehook = sys.unraisablehook, lost
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        over = True
        around.clear()  # a frame that holds itself would keep all of them, and what they hold
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        sys.unraisablehook = tell
        if left:
            used = time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left - used, 0.001), interval)
    if passed:  # it waited until now, or somebody swallowed it
        raise _time_is_up(seconds)


def _time_is_up(seconds: float) -> TimeIsUp:
    return TimeIsUp(f"more than {seconds:.0f} s")


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _must_not_end_half_way(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name in ("__enter__", "__exit__") or code.co_filename == "<frozen importlib._bootstrap>"
