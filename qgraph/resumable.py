"""What a long pass has finished, kept in files, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnx_ir as ir

from qgraph.annotation import annotated
from qgraph.context import Context, Feed
from qgraph.text import to_text
from qgraph.weights import Quantized

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


def to_arrays(weights: Sequence[Quantized | None]) -> dict[str, np.ndarray]:
    """Weights, none of them from a table, as they are kept. See :func:`from_arrays`."""
    kept = {"count": np.array(len(weights))}
    for i, w in enumerate(weights):
        if w is not None:
            layout = np.array([-1 if w.axis is None else w.axis, w.repaired, w.block])
            parts = {"q": w.q, "scale": w.scale, "zero": w.zero, "layout": layout}
            kept |= {f"{i}.{part}": data for part, data in parts.items()}
    return kept


def from_arrays(kept: Arrays) -> list[Quantized | None]:
    """The weights of :func:`to_arrays`."""
    found: list[Quantized | None] = []
    for i in range(int(kept["count"])):
        if f"{i}.q" not in kept:
            found.append(None)
            continue
        q, scale, zero = (kept[f"{i}.{part}"] for part in ("q", "scale", "zero"))
        axis, repaired, block = kept[f"{i}.layout"].tolist()
        found.append(Quantized(q, scale, zero, None if axis < 0 else axis, repaired, block))
    return found


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, EOFError, KeyError, ValueError, BadZipFile):
        return None
