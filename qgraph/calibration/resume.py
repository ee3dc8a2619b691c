"""What a long pass has finished, kept in files, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import settled
from qgraph.graph.text.printer import fingerprint
from qgraph.graph.text.tensors import digest
from qgraph.io.feeds import Feed
from qgraph.io.files import aside, sweep
from qgraph.numerics.quantized import Arrays
from qgraph.numerics.stats import Stats
from qgraph.pipeline.context import Context
from qgraph.pipeline.progress import Item

OVERHEAD = 0.1
"""Largest share of the time that may go into keeping states."""


ANEW = "it is computed anew"
"""What is said of results of which the cache holds damaged ones."""
_DIGEST = "qgraph.digest"
"""The entry with a hash of all others."""


class Work(Protocol):
    """What is done: a pass, its parameters in its repr."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int:
        """To be raised whenever it finds other results than before, also through what it calls:
        those of older versions are not taken from the cache."""
        ...


def key(work: Work, model: ir.Model, feeds: Iterable[Feed], context: Context | None = None) -> str:
    """32 hex digits for all that the results of a pass depend on.

    That is what it does, in which version and with which parameters; the graph with its weights,
    specs and statistics, scales and integers that were found already; and the data. Weights in
    files are read in chunks, and none is held.

    Args:
        context: of results that depend on its seed and on its target; None: they do not.
    """
    lines = [f"{type(work)} {work!r} {work.version} {Stats.version}", fingerprint(model)]
    if context is not None:
        lines.append(f"{context.seed} {context.target.saturates}")
    for name, array in settled(model):
        lines.append(f"{name} {_digest({'': array}).hex()}")
    for index, feed in enumerate(feeds):
        lines += [f"{index} {name} {digest(ir.tensor(x), 16)}" for name, x in sorted(feed.items())]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


@dataclass
class Resumable:
    """A folder with the results of each step of a pass, and the state after one of the last steps.

    Results are kept at once, and for good. A state is large, worth nothing when the next one is
    there, and is kept as often as :data:`OVERHEAD` allows.

    Attributes:
        folder: named after all that the results depend on; None: nothing is kept.
        pass_name: of the pass that works here.
        context: gets a warning if anything cannot be kept.
        failure: why the last attempt to write failed, or None.
    """

    folder: Path | None
    pass_name: str
    context: Context
    failure: str | None = None
    _last: float = 0.0
    _cost: float = 0.0

    @classmethod
    def of(cls, work: Work, model: ir.Model, feeds: Iterable[Feed], context: Context) -> Resumable:
        """What is kept of this work on this model, as it is now, and this data: see :func:`key`.
        Without a cache folder in the context nothing is kept."""
        if context.cache is None:
            return cls(None, work.name, context)
        name = f"{work.name}-{key(work, model, feeds, context)}"
        return cls(Path(context.cache) / name, work.name, context)

    def steps(
        self,
        items: Iterable[Item],
        compute: Callable[[Item], Arrays],
        state: Callable[[], Arrays] | None = None,
    ) -> Iterator[tuple[Item, Arrays]]:
        """Every item with the arrays that `compute` makes of it now, or made in an earlier run.

        Args:
            items: the same in every run, in the same order.
            state: what to keep beside the results: where `compute` is after the last item that it
                was called for. :meth:`state` returns it in the next run.
        """
        for step, item in enumerate(items):
            arrays = self.result(step)
            if arrays is None:
                arrays = compute(item)
                self.keep_result(step, arrays)
                if state is not None:
                    self.keep_state(state)
            yield item, arrays
        self.finish()

    def result(self, step: int) -> Arrays | None:
        """What was kept of this step, if anything whole was."""
        return self._read(f"{step}.npz")

    def keep_result(self, step: int, arrays: Arrays) -> None:
        """Keep what this step has found."""
        self._write(f"{step}.npz", arrays)

    def state(self) -> Arrays | None:
        """The last state that was kept."""
        return self._read("state.npz")

    def keep_state(self, arrays: Callable[[], Arrays]) -> None:
        """Keep a state, if enough has happened since the last one."""
        began = time.monotonic()
        if self.folder is None or (began - self._last) * OVERHEAD < self._cost:
            return
        self._write("state.npz", arrays())
        self._last = time.monotonic()
        self._cost = self._last - began

    def finish(self) -> None:
        """Every step has its result: forget the state, and warn if anything could not be kept."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / "state.npz").unlink()
        if self.failure is not None:
            why = f"nothing is kept: {self.failure}"
            self.context.remark("warning", self.pass_name, "", "", why)

    def _read(self, name: str) -> Arrays | None:
        if self.folder is None:
            return None
        try:
            return read(self.folder / name)
        except DamagedError as error:
            self.context.remark("warning", self.pass_name, "", "", f"{error}: {ANEW}")
            return None

    def _write(self, name: str, arrays: Arrays) -> None:
        if self.folder is None or self.failure is not None:
            return
        try:
            write(self.folder / name, arrays)
        except OSError as error:
            self.failure = f"{self.folder} cannot be written: {error.strerror}"


# --- files ----------------------------------------------------------------------------------------


class DamagedError(Exception):
    """A file of the cache is not what was written; the message says which."""


def read(path: Path) -> Arrays | None:
    """The arrays in a file, or None where there is none.

    Raises:
        DamagedError: they are not those that were written, or cannot be read.
    """
    sweep(path.parent)
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        given = arrays.pop(_DIGEST).tobytes()
    except Exception as error:  # whatever the damage leads to
        raise DamagedError(f"{path} cannot be read") from error
    if given != _digest(arrays):
        raise DamagedError(f"{path} is not what was written")
    return arrays


def write(path: Path, arrays: Arrays) -> None:
    """Keep arrays in a file, whose folder is made if need be.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    signed = {**arrays, _DIGEST: np.frombuffer(_digest(arrays), np.uint8)}
    with aside(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **signed)  # type: ignore[arg-type]


def _digest(arrays: Arrays) -> bytes:
    """A hash of names, types, shapes and data."""
    found = hashlib.blake2b(digest_size=16)
    for name, data in sorted(arrays.items()):
        known = data.dtype.str if data.dtype.kind in "biufc" else data.dtype.itemsize
        found.update(f"{name} {known} {data.shape} ".encode())
        found.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return found.digest()


def read_stats(path: Path, names: Collection[str]) -> dict[str, Stats] | None:
    """What :func:`write_stats` kept of these values, or None where there is no such file.

    Raises:
        DamagedError: it is damaged.
    """
    arrays = read(path)
    if arrays is None:
        return None
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for entry, data in arrays.items():
        name, _, part = entry.rpartition("|")
        parts[name][part] = data
    return {name: Stats.from_arrays(own) for name, own in parts.items()}


def write_stats(path: Path, stats: Mapping[str, Stats]) -> None:
    """Keep the statistics of values, by their names.

    Raises:
        OSError: they cannot be written.
    """
    write(path, {f"{name}|{k}": v for name, s in stats.items() for k, v in s.to_arrays().items()})
