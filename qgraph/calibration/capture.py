"""A few tokens of some values in the float model, for methods that try candidates on real data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.data import Batch, calibration_feeds, first_samples, samples_in
from qgraph.calibration.walk import Walk
from qgraph.io.feeds import Feed
from qgraph.pipeline.context import Context

Rows = NDArray[np.float32]
SAMPLES = 4
"""So many samples are run. With more, results changed no more than by chance."""
LEAST = 128
"""More samples are run where those have fewer tokens together."""


class Capture:
    """Tokens of values: vectors along the last axis, evenly spread over the first samples.

    The first token of a sample is always among them: in language models it is unlike all others.
    The model runs piece by piece, as it was when this was made: it may be rewritten meanwhile.
    Nothing runs before it is asked for.
    """

    def __init__(
        self, model: ir.Model, values: Sequence[ir.Value], context: Context, rows: int = 512
    ) -> None:
        """
        Args:
            values: computed floats of the main graph, of rank 1 or more.
            context: with calibration data.
            rows: about how many tokens of each value, at most.

        Raises:
            CalibrationError: there is no calibration data.
        """
        self._batches = first_batches(context)
        names = [str(value.name) for value in values]
        self._stops = {value: stop for stop, value in enumerate(values)}
        self._each = -(-rows // sum(batch.used for batch in self._batches))
        self._walk = Walk(model.clone(), names, [batch.feed for batch in self._batches])

    def tokens(self, value: ir.Value) -> Rows:
        """Those of one of the values, (tokens, channels); only in the order of the values.

        Raises:
            CalibrationError: the model does not run on the data.
        """
        self._walk.go_to(self._stops[value])
        found = zip(self._batches, self._walk.advance(), strict=True)
        return np.concatenate([rows for batch, data in found for rows in self._picked(batch, data)])

    def _picked(self, batch: Batch, data: NDArray[np.floating]) -> Iterator[Rows]:
        samples = batch.samples(data) if data.ndim > 1 else [data]
        for sample in samples:
            yield _picked(sample, self._each * (batch.used // len(samples)))


def captured(
    model: ir.Model, values: Sequence[ir.Value], context: Context, rows: int = 512
) -> Iterator[tuple[ir.Value, Rows]]:
    """Each value with its tokens, see :class:`Capture`.

    Raises:
        CalibrationError: there is no calibration data, or the model does not run on it.
    """
    capture = Capture(model, values, context, rows)
    for value in values:
        yield value, capture.tokens(value)


def first_batches(context: Context) -> list[Batch]:
    """Those of the calibration data that :class:`Capture` runs.

    Raises:
        CalibrationError: there is no calibration data.
    """
    (first,) = calibration_feeds(context, 1)
    samples = max(SAMPLES, -(-LEAST // _tokens(first)))
    return list(first_samples(iter(context.calibration or ()), samples))


def first_feeds(context: Context) -> list[Feed]:
    """The feeds of :func:`first_batches`."""
    return [batch.feed for batch in first_batches(context)]


def _tokens(feed: Feed) -> int:
    """About how many tokens a sample has: numbers that are one each, or vectors of floats."""
    vectors = (
        array.size // (array.shape[-1] if array.dtype.kind == "f" and array.ndim else 1)
        for array in feed.values()
        if array.size
    )
    return max(1, max(vectors, default=1) // samples_in(feed))


def _picked(data: NDArray[np.floating], rows: int) -> Rows:
    """At most `rows` tokens, one in every so many."""
    tokens = data.reshape(-1, data.shape[-1])
    step = max(len(tokens) - 1, 0) // rows + 1
    return tokens[::step].astype(np.float32)
