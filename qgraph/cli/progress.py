"""Progress bars on a terminal: what is done, how long it will take, how much memory it took."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qgraph.pipeline.progress import Item, silent
from qgraph.pipeline.progress import Progress as Display


def display() -> Display:
    """Bars on standard error if that is a terminal, else nothing.

    Returns:
        a function `progress(items, title, total)` that yields `items` and shows how far they are;
        loops inside loops get a line each.
    """
    return _Bars(Console(stderr=True)) if sys.stderr.isatty() else silent


def peak_memory() -> int:
    """The most bytes this process has held at once, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Memory(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{peak_memory() / 1e9:.1f} GB", style="dim")


class _Bars:
    """One live display that all loops share: rich allows no second one on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            _Memory(),
            console=console,
            transient=True,
        )

    def __call__(
        self, items: Iterable[Item], title: str, total: int | None = None
    ) -> Iterator[Item]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        if not self._progress.tasks:
            self._progress.start()
        task = self._progress.add_task(title, total=total)
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()
