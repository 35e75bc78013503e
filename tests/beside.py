"""Work that goes on beside a test's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def beside(work: Callable[[threading.Event], T]) -> Iterator[Future[T]]:
    """`work` in a thread until the block ends, however it ends.

    A test that fails must not leave it going on.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(work, stop)
        finally:
            stop.set()
