"""A time limit for Python code that comes from a file, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class TookTooLong(Exception):
    """Raised within :func:`time_limit`."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLong` in the body, between two of its instructions, once it has run that long.

    Unlike a signal this works in every thread, and it replaces no signal handler. It cannot interrupt a single call of
    C code.
    """
    body, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False
    begun = threading.Event()

    def stop() -> None:
        begun.wait()  # a short limit ends while the timer is still being started, which must not be interrupted
        with lock:
            if not over:
                _raise_in(body, ctypes.py_object(TookTooLong))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        begun.set()
        yield
    finally:
        with lock:
            over = True
            _raise_in(body, None)  # takes back an exception that has not been raised yet
        timer.cancel()
