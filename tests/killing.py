"""Processes that die at a chosen operation on files."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def killed_at(moment: int, work: Callable[[], object], number: int) -> int:
    """Do `work` in a fork that gets the signal `number` before operation `moment` that changes
    files, if it comes that far.

    Returns:
        its status, or minus the signal that ended it.
    """
    left = moment

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        mode = arguments[1] if event == "open" else None
        if event in _CHANGES or (isinstance(mode, str) and set(mode) & set("wxa")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    with warnings.catch_warnings(action="ignore"):  # of forking beside threads
        child = os.fork()
    if child == 0:
        status: object = 1
        sys.addaudithook(count)
        try:
            status = work()
        finally:
            os._exit(status if isinstance(status, int) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
