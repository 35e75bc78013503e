"""SIGTERM and SIGINT as an event, in a way that no moment of their coming can lose."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def stop_event(again: Callable[[], object] | None = None) -> threading.Event:
    """Set by the first SIGTERM or SIGINT; `again` is called by those that come once it is.

    Whoever waits for it waits with a timeout, again and again: the kernel may give a signal to
    another thread (as it does while a tracer has the main one stopped), and Python's handlers run
    when the main thread next wakes. And the event is set by a thread of its own: a handler that
    interrupts a wait may find the event's lock held by itself.
    """
    stop = threading.Event()

    def heard(number: int, frame: object) -> None:
        if not stop.is_set():
            threading.Thread(target=stop.set, daemon=True).start()
        elif again is not None:
            again()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    return stop
