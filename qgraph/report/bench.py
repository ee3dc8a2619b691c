"""Comparing models side by side: speed as a ratio, outputs as a signal-to-noise ratio.

Times on a shared machine drift by tens of percent, ratios of neighbouring runs hardly do. So all
models run in one process, one after the other for every feed, and each run is compared with the
first model's run of the same feed in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph.errors import QGraphError
from qgraph.io.feeds import Feed
from qgraph.io.kv_cache import complete_feed
from qgraph.io.models import load
from qgraph.io.session import OpenSession, open_session, run
from qgraph.numerics.noise import decibels
from qgraph.pipeline.progress import Progress, silent

_Outputs = dict[str, np.ndarray]
_Runner = Callable[[Feed], _Outputs]


@dataclass(frozen=True)
class Result:
    """One model against the first one.

    Attributes:
        name: its path, or the graph's name.
        speedup: median over all runs of the first model's time over this one's; above 1 is faster.
        low, high: the quartiles of that.
        sqnr_db: energy of the first model's float outputs over that of the difference, in dB;
            inf where they are equal, nan where there is nothing to compare.
        milliseconds: median time of a run. It holds for this machine at this moment only.
    """

    name: str
    speedup: float
    low: float
    high: float
    sqnr_db: float
    milliseconds: float

    def __str__(self) -> str:
        spread = f"{self.speedup:.2f}x ({self.low:.2f} to {self.high:.2f})"
        return f"{self.name}: {spread}, {self.sqnr_db:.1f} dB"


def benchmark(
    models: Sequence[ir.Model | str | Path],
    feeds: Iterable[Feed],
    rounds: int = 15,
    progress: Progress = silent,
    open_session: OpenSession = open_session,
) -> list[Result]:
    """Run models interleaved on the same feeds, with all of onnxruntime's optimizations.

    Args:
        models: the first is what the others are compared with.
        feeds: each is run in each round; caches and masks of language models are filled in.
        rounds: how often; one more before them warms up.
        open_session: of the target that they are compared on.

    Raises:
        QGraphError: there is no model or no feed, or a model does not run on them.
    """
    given = list(feeds)
    if not models or not given or rounds < 1:
        raise QGraphError("nothing to compare: give at least one model, one feed and one round")
    names = [m.graph.name or "model" if isinstance(m, ir.Model) else str(m) for m in models]
    runners = [_runner(m, name, open_session) for m, name in zip(models, names, strict=True)]
    noise = [(0.0, 0.0)] * len(runners)
    for feed in given:
        outputs = [runner(feed) for runner in runners]
        for index, mine in enumerate(outputs):
            signal, error = _energies(mine, outputs[0])
            noise[index] = (noise[index][0] + signal, noise[index][1] + error)
    seconds: list[list[float]] = [[] for _ in runners]
    for number, _ in enumerate(progress(range(rounds), "comparing", rounds)):
        # The order turns from round to round, so that nobody always runs on a cold or a warm cache.
        turned = [(number + i) % len(runners) for i in range(len(runners))]
        for feed in given:
            for index in turned:
                began = time.perf_counter()
                runners[index](feed)
                seconds[index].append(time.perf_counter() - began)
    return [
        _result(*row) for row in zip(names, [seconds[0]] * len(names), seconds, noise, strict=True)
    ]


def cpu_ratio(
    reference: ir.Model,
    model: ir.Model,
    feed: Feed,
    rounds: int = 7,
    seconds: float = 2.0,
    open_session: OpenSession = open_session,
) -> float:
    """Best CPU time of `reference` over that of `model`, one thread, run in turn on one feed.

    A first impression that other programs on the machine hardly disturb; :func:`benchmark` measures
    what users get.

    Args:
        seconds: stop after about this long, but not before each has run twice.
        open_session: of the target that they are compared on.

    Raises:
        Exception: whatever onnxruntime raises where a model does not run.
    """
    sessions = [open_session(m, threads=1, arena=False) for m in (reference, model)]
    best = [float("inf")] * 2
    began = time.perf_counter()
    for number in range(rounds + 1):
        for index, session in enumerate(sessions):
            start = time.thread_time()
            run(session, feed)
            if number:  # the first run only warms up
                best[index] = min(best[index], time.thread_time() - start)
        if number >= 2 and time.perf_counter() - began > seconds:
            break
    return best[0] / best[1]


def _runner(model: ir.Model | str | Path, name: str, open_session: OpenSession) -> _Runner:
    loaded = model if isinstance(model, ir.Model) else load(model)
    session = open_session(loaded)
    names = [str(value.name) for value in loaded.graph.outputs]

    def call(feed: Feed) -> _Outputs:
        try:
            return dict(zip(names, run(session, complete_feed(loaded, feed)), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            reason = str(error).splitlines()[0]
            raise QGraphError(f"{name} does not run on this data: {reason}") from error

    return call


def _result(
    name: str, reference: list[float], seconds: list[float], noise: tuple[float, float]
) -> Result:
    ratios = np.array(reference) / np.array(seconds)
    low, middle, high = (float(q) for q in np.percentile(ratios, [25, 50, 75]))
    signal, error = noise
    sqnr = decibels(signal, error) if signal != 0 else float("nan")
    return Result(name, middle, low, high, sqnr, 1e3 * float(np.median(seconds)))


def _energies(outputs: _Outputs, reference: _Outputs) -> tuple[float, float]:
    """Energy of the float outputs of the reference, and of the difference from it."""
    signal = error = 0.0
    for name, theirs in reference.items():
        ours = outputs.get(name)
        if not isinstance(theirs, np.ndarray) or theirs.dtype.kind != "f":
            continue
        if not isinstance(ours, np.ndarray) or ours.shape != theirs.shape:
            return float("nan"), float("nan")
        finite = np.isfinite(theirs)  # masks of -inf say nothing
        wide = theirs.astype(np.float64)[finite]
        signal += float(np.square(wide).sum())
        error += float(np.square(ours.astype(np.float64)[finite] - wide).sum())
    return signal, error
