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


def captured(
    model: ir.Model, values: Sequence[ir.Value], context: Context, rows: int = 512
) -> Iterator[tuple[ir.Value, Rows]]:
    """Tokens of each value: vectors along its last axis, evenly spread over the first feeds.

    The first token of a feed is always among them: in language models it is unlike all others.
    The model runs piece by piece, as it was when the first value was asked for: it may be rewritten
    meanwhile.

    Args:
        values: computed floats of the main graph, of rank 1 or more.
        context: with calibration data.
        rows: about how many tokens of each value, at most.

    Yields:
        each value with an array (tokens, channels).

    Raises:
        CalibrationError: there is no calibration data, or the model does not run on it.
    """
    feeds = first_feeds(context)
    each = -(-rows // len(feeds))
    walk = Walk(model.clone(), [str(value.name) for value in values], feeds)
    for value in values:
        yield value, np.concatenate([_picked(data, each) for data in walk.advance()])


def first_feeds(context: Context) -> list[Feed]:
    """Those of the calibration data that :func:`captured` runs.

    Raises:
        CalibrationError: there is no calibration data.
    """
    return calibration_feeds(context, FEEDS)


def _picked(data: NDArray[np.floating], rows: int) -> Rows:
    """At most `rows` tokens, one in every so many."""
    tokens = data.reshape(-1, data.shape[-1])
    step = max(len(tokens) - 1, 0) // rows + 1
    return tokens[::step].astype(np.float32)
