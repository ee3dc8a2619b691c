"""Signals that end the command clear up first, as an interrupt from the keyboard does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(BaseException):
    """Raised where the program is when it is asked to end.

    Attributes:
        status: that a shell shows for a program which the signal has ended.
    """

    def __init__(self, number: int) -> None:
        self.status = 128 + number


@contextmanager
def raised() -> Iterator[None]:
    """Meanwhile, SIGTERM and SIGHUP raise :class:`Terminated` in the main thread, once.

    Signals that are ignored or handled already stay so.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # in a child, such as a worker that loads data
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in taken:
            signal.signal(other, signal.SIG_IGN)  # nothing disturbs clearing up
        raise Terminated(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
