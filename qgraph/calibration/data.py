"""The calibration data that a pass needs, and what is said where it does not serve."""

from __future__ import annotations

from itertools import islice

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


def not_finite(what: str) -> CalibrationError:
    """The error for values, `what`, that the float model computes and nothing can be made of."""
    return CalibrationError(
        f"{what} becomes NaN or infinite on the calibration data: "
        "check the data, and that the float model is sound on it"
    )
