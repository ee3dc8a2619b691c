"""A few tokens of some values in the float model, for methods that try candidates on real data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.data import calibration_feeds
from qgraph.calibration.walk import Walk
from qgraph.io.feeds import Feed
from qgraph.pipeline.context import Context

Rows = NDArray[np.float32]
FEEDS = 4
"""So many calibration feeds are run. With more, results changed no more than by chance."""


class Capture:
    """Tokens of values: vectors along the last axis, evenly spread over the first feeds.

    The first token of a feed is always among them: in language models it is unlike all others.
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
        feeds = first_feeds(context)
        names = [str(value.name) for value in values]
        self._stops = {value: stop for stop, value in enumerate(values)}
        self._each = -(-rows // len(feeds))
        self._walk = Walk(model.clone(), names, feeds)

    def tokens(self, value: ir.Value) -> Rows:
        """Those of one of the values, (tokens, channels); only in the order of the values.

        Raises:
            CalibrationError: the model does not run on the data.
        """
        self._walk.go_to(self._stops[value])
        return np.concatenate([_picked(data, self._each) for data in self._walk.advance()])


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


def first_feeds(context: Context) -> list[Feed]:
    """Those of the calibration data that :class:`Capture` runs.

    Raises:
        CalibrationError: there is no calibration data.
    """
    return calibration_feeds(context, FEEDS)


def _picked(data: NDArray[np.floating], rows: int) -> Rows:
    """At most `rows` tokens, one in every so many."""
    tokens = data.reshape(-1, data.shape[-1])
    step = max(len(tokens) - 1, 0) // rows + 1
    return tokens[::step].astype(np.float32)
