"""The measured table: how much faster than float each kind of quantized operator runs on this host.

Each entry is measured once, by two tiny models run in turn, and kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.backends.cpu.case import Case
from qgraph.backends.cpu.isa import host_isa, host_model
from qgraph.backends.cpu.probes import build
from qgraph.errors import QGraphError
from qgraph.io.files import aside, read_json, write

VERSION = 6
"""Raise it when the probes change: tables of other versions are measured anew."""
ROUNDS, MOST_ROUNDS = 7, 35
SECONDS = 0.004
"""Each timing repeats its model for at least this long."""
CLOSE = (0.8, 1.3)
"""Ratios near those that decide are measured in more rounds: there, noise would decide."""


def cache_folder() -> Path:
    """Where qgraph keeps what it measured: `$QGRAPH_CACHE`, else the user's cache folder."""
    if given := os.environ.get("QGRAPH_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "qgraph"
    try:
        return Path.home() / ".cache" / "qgraph"
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / f"qgraph-{os.getuid()}"


@dataclass
class Table:
    """Speedups over float by case; missing ones are measured when asked for."""

    path: Path
    speedups: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_host(cls) -> Table:
        """The table of this CPU and this onnxruntime."""
        import onnxruntime

        name = re.sub(r"\W+", "-", f"{host_model()} {host_isa()} ort {onnxruntime.__version__}")
        path = cache_folder() / f"cpu-v{VERSION}-{name}.json"
        return cls(path, _read(path))

    def speedup(self, case: Case) -> float:
        """Float time / quantized time of this case on this host."""
        key = str(case)
        if key not in self.speedups:
            # Other processes may have measured in the meantime.
            self.speedups = _read(self.path) | self.speedups | {key: round(measure(case), 3)}
            self._store()
        return self.speedups[key]

    def _store(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with aside(self.path) as unfinished:
                unfinished.write_text(json.dumps(self.speedups, indent=1, sort_keys=True))
        except OSError:
            return  # an unwritable cache only costs measuring again

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(sorted(self.speedups.items()))


@dataclass(frozen=True)
class Decisions:
    """The figures that decided, in a file of the user's: the next compilation decides alike.

    Attributes:
        path: of a JSON file with speedups by case; it need not be there yet.
    """

    path: Path

    def speedup(self, case: Case, host: Table) -> float:
        """What the file says of this case; else what `host` says, which is added to the file.

        Raises:
            QGraphError: the file holds something else, or cannot be written.
        """
        figures = self.figures()
        if str(case) not in figures:
            figures[str(case)] = host.speedup(case)
            write(self.path, json.dumps(figures, indent=1, sort_keys=True) + "\n")
        return figures[str(case)]

    def figures(self) -> dict[str, float]:
        """All that the file says.

        Raises:
            QGraphError: it holds something else.
        """
        figures = _read(self.path)
        if not figures and self.path.exists() and self.path.stat().st_size:
            raise QGraphError(f"{self.path} holds no decisions: remove it or give another name")
        return figures


def _read(path: Path) -> dict[str, float]:
    """What a table file holds; nothing where it is missing or broken."""
    try:
        stored = {str(k): float(v) for k, v in read_json(path).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return {k: v for k, v in stored.items() if 0 < v < np.inf}


def measure(case: Case) -> float:
    """Run the float and the quantized form in turn; the ratio of their best times."""
    from qgraph.io.session import open_session

    sessions: list[Any] = []
    feed: dict[str, np.ndarray] = {}
    for quantized in (False, True):
        model, feed = build(case, quantized)
        sessions.append(open_session(model, threads=1))
    repeats = [_repeats(session, feed) for session in sessions]
    best = [np.inf, np.inf]
    for number in range(1, MOST_ROUNDS + 1):
        for index, session in enumerate(sessions):
            best[index] = min(best[index], _time(session, feed, repeats[index]))
        if number >= ROUNDS and not CLOSE[0] < best[0] / best[1] < CLOSE[1]:
            break
    return float(best[0] / best[1])


def _repeats(session: Any, feed: dict[str, np.ndarray]) -> int:
    _time(session, feed, 2)
    return max(1, int(SECONDS / _time(session, feed, 1)))


def _time(session: Any, feed: dict[str, np.ndarray], repeats: int) -> float:
    """Seconds of one run. CPU time of this thread: other programs on the machine do not count."""
    began = time.thread_time()
    for _ in range(repeats):
        session.run(None, feed)
    return (time.thread_time() - began) / repeats
