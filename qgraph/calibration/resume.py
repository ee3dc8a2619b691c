"""What a long pass has finished, kept in files, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import annotated
from qgraph.graph.text.printer import to_text
from qgraph.io.feeds import Feed
from qgraph.numerics.quantized import Arrays
from qgraph.numerics.stats import Stats
from qgraph.pipeline.context import Context

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

    def result(self, step: int) -> Arrays | None:
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

    def finish(self, pass_name: str, context: Context) -> None:
        """Every step has its result: forget the state, and warn if anything could not be kept."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / "state.npz").unlink()
        if self.failure is not None:
            context.remark("warning", pass_name, "", "", f"nothing is kept: {self.failure}")

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


def kept_for(
    work: object, name: str, model: ir.Model, feeds: Iterable[Feed], context: Context
) -> Resumable:
    """Where results are kept that depend on this model, with its weights and specs, on this data,
    and on `work`: what is done, its parameters in its repr. Without a cache folder in the context
    nothing is kept."""
    if context.cache is None:
        return Resumable(None)
    digest = hashlib.blake2b(to_text(model).encode(), digest_size=16)
    digest.update(f"{work} {context.seed} {context.target.saturates}".encode())
    for node, specs in annotated(model):
        digest.update(f"{node.name} {[(i, str(s)) for i, s in specs.items()]}".encode())
    for feed in feeds:
        for key, data in sorted(feed.items()):
            digest.update(f"{key} {data.dtype} {data.shape}".encode())
            digest.update(np.ascontiguousarray(data).tobytes())
    return Resumable(Path(context.cache) / f"{name}-{digest.hexdigest()}")


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, EOFError, KeyError, ValueError, BadZipFile):
        return None


def stats_file(probe: ir.Model, context: Context) -> Path | None:
    """Where the statistics that this graph, its weights included, finds in this data are kept."""
    if context.cache is None or context.calibration is None:
        return None
    digest = hashlib.blake2b(to_text(probe).encode(), digest_size=16)
    for feed in context.calibration:
        for name, data in sorted(feed.items()):
            digest.update(f"{name} {data.dtype} {data.shape}".encode())
            digest.update(np.ascontiguousarray(data).tobytes())
    return Path(context.cache) / f"calibration-{digest.hexdigest()}.npz"


def write_stats(path: Path, stats: Mapping[str, Stats]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}|{k}": v for name, s in stats.items() for k, v in s.to_arrays().items()}
    aside = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(aside, **arrays)  # type: ignore[arg-type]
    aside.replace(path)


def read_stats(path: Path, names: Collection[str]) -> dict[str, Stats] | None:
    """What was kept of these values, or None where nothing whole was."""
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    try:
        with path.open("rb") as file, np.load(file) as stored:
            for key in stored.files:
                name, _, part = key.rpartition("|")
                parts[name][part] = stored[key]
        return {name: Stats.from_arrays(arrays) for name, arrays in parts.items()}
    except (OSError, EOFError, KeyError, ValueError, BadZipFile):
        return None
