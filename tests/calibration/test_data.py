"""The calibration data that a pass needs, and what is said where it does not serve."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.backends.onnx import OnnxTarget
from qgraph.calibration.data import calibration_feeds, first_samples, not_finite, samples_in
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


def test_samples_are_rows_that_all_inputs_share() -> None:
    x, past = np.zeros((3, 5)), np.zeros((3, 2, 0, 4))
    assert samples_in({"x": x, "past": past}) == 3
    assert samples_in({"x": x, "edges": np.zeros((2, 9))}) == 1
    assert samples_in({"x": x, "step": np.array(7)}) == 1
    assert samples_in({"x": x[:0]}) == 1
    assert samples_in({}) == 1


def test_the_first_samples_of_feeds_that_hold_several() -> None:
    feeds = [{"x": np.full((n, 2), n)} for n in (2, 3, 4)]
    first, second = first_samples(iter(feeds), 3)
    assert (first.held, first.used, second.held, second.used) == (2, 2, 3, 1)
    assert [len(part) for part in first.samples(np.zeros((2, 7)))] == [1, 1]
    assert [len(part) for part in second.samples(np.zeros((3, 7)))] == [1]
    assert [len(part) for part in second.samples(np.zeros((21, 7)))] == [21]
    (scalar,) = second.samples(np.array(1))
    assert scalar.ndim == 0
