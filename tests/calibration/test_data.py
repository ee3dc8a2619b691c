"""The calibration data that a pass needs, and what is said where it does not serve."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.backends.onnx import OnnxTarget
from qgraph.calibration.data import calibration_feeds, not_finite
from qgraph.errors import CalibrationError
from qgraph.pipeline.context import Context

FEEDS = [{"x": np.full(2, i, np.float32)} for i in range(3)]


@pytest.mark.parametrize(("most", "count"), [(None, 3), (2, 2), (9, 3)])
def test_the_first_feeds_are_given_in_order(most: int | None, count: int) -> None:
    feeds = calibration_feeds(Context(OnnxTarget(), calibration=FEEDS), most)
    assert [int(feed["x"][0]) for feed in feeds] == list(range(count))


@pytest.mark.parametrize("nothing", [None, []])
def test_who_has_none_is_told_to_give_some(nothing: list[object] | None) -> None:
    with pytest.raises(CalibrationError, match=r"^this needs calibration data: give some"):
        calibration_feeds(Context(OnnxTarget(), calibration=nothing))  # type: ignore[arg-type]


def test_what_is_not_finite_is_named() -> None:
    assert str(not_finite("'x'")).startswith("'x' becomes NaN or infinite on the calibration data")
