"""The calibration data that a pass needs, and what is said where it does not serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from numpy.typing import NDArray

from qgraph.errors import CalibrationError
from qgraph.io.feeds import Feed
from qgraph.pipeline.context import Context

NEEDED = "needs calibration data: give some typical inputs"
"""What is said, after who needs it, where there is none."""
NEEDED_OR_DYNAMIC = (
    f"{NEEDED} (calibration=..., or -c on the command line), or use the recipe 'dynamic'"
)
"""The same, with all that can be done about it."""
UNREACHED = "calibration data never reached it"
"""Why a value or layer has no statistics, as where a branch was never taken."""

OUT_OF_SIGHT = "it sits where no calibration data can be looked at"
"""Why a layer has none, as in the body of a loop."""


def calibration_feeds(context: Context, most: int | None = None) -> list[Feed]:
    """The calibration data, or its first feeds.

    Raises:
        CalibrationError: there is none.
    """
    feeds = list(islice(context.calibration or (), most))
    if not feeds:
        raise CalibrationError(f"this {NEEDED}")
    return feeds


@dataclass(frozen=True)
class Batch:
    """A feed, which may hold several samples: how many are put together must not matter.

    Attributes:
        feed: the inputs by name.
        held: how many samples it holds: the length of the first axis, if that is the same of all.
        used: how many of them, from the first on, are to be looked at.
    """

    feed: Feed
    held: int
    used: int

    def samples(self, data: NDArray[Any]) -> list[NDArray[Any]]:
        """A value that the model computes from the feed, sample by sample with a first axis of
        length 1; as a whole if its first axis is not that of the samples."""
        if not data.ndim or len(data) != self.held:
            return [data]
        return [data[i : i + 1] for i in range(self.used)]


def samples_in(feed: Feed) -> int:
    """How many samples a feed holds, 1 if its inputs do not have as many rows each."""
    rows = {len(array) if array.ndim else 1 for array in feed.values()}
    return rows.pop() or 1 if len(rows) == 1 else 1


def first_samples(feeds: Iterator[Feed], most: int) -> Iterator[Batch]:
    """The feeds that hold the first `most` samples."""
    while most > 0 and (feed := next(feeds, None)) is not None:
        held = samples_in(feed)
        yield Batch(feed, held, min(held, most))
        most -= held


def not_finite(what: str) -> CalibrationError:
    """The error for values, `what`, that the float model computes and nothing can be made of."""
    return CalibrationError(
        f"{what} becomes NaN or infinite on the calibration data: "
        "check the data, and that the float model is sound on it"
    )
