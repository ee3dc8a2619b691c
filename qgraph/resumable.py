"""What a long pass has finished, kept in files, so that an interrupted run goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

Arrays = Mapping[str, np.ndarray]
OVERHEAD = 0.1
"""Largest share of the time that may go into keeping states."""


@dataclass
class Resumable:
    """A folder with the results of each step, and the state after one of the last of them.

    Results are kept at once, and for good. A state is large, worth nothing when the next one is
    there, and is kept as often as :data:`OVERHEAD` allows.

    Attributes:
        folder: named after all that the results depend on; None: nothing is kept.
        failure: why the last attempt to write failed, or None.
    """

    folder: Path | None
    failure: str | None = None
    _last: float = 0.0
    _cost: float = 0.0

    def result(self, step: int) -> dict[str, np.ndarray] | None:
        """What was kept of this step, if anything whole was."""
        return None if self.folder is None else _read(self.folder / f"{step}.npz")

    def keep_result(self, step: int, arrays: Arrays) -> None:
        """Keep what this step has found."""
        self._write(f"{step}.npz", arrays)

    def state(self) -> dict[str, np.ndarray] | None:
        """The last state that was kept."""
        return None if self.folder is None else _read(self.folder / "state.npz")

    def keep_state(self, arrays: Callable[[], Arrays]) -> None:
        """Keep a state, if enough has happened since the last one."""
        began = time.monotonic()
        if self.folder is None or (began - self._last) * OVERHEAD < self._cost:
            return
        self._write("state.npz", arrays())
        self._last = time.monotonic()
        self._cost = self._last - began

    def finish(self) -> None:
        """Every step has its result: forget the state."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / "state.npz").unlink()

    def _write(self, name: str, arrays: Arrays) -> None:
        if self.folder is None or self.failure is not None:
            return
        aside = self.folder / f"{os.getpid()}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            aside.replace(self.folder / name)
        except OSError as error:
            self.failure = f"{self.folder} cannot be written: {error.strerror}"
            with suppress(OSError):
                aside.unlink()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, EOFError, KeyError, ValueError, BadZipFile):
        return None
