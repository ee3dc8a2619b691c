"""Groups of elements that share a scale, and the first scale of each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.numerics.groups import first_scales, shape_of
from qgraph.numerics.spec import PerToken, QuantSpec


def test_two_bits_need_a_third_of_the_range() -> None:
    w = np.random.default_rng(0).standard_normal((1, 4096)).astype(np.float32)
    spec = QuantSpec(ir.DataType.INT8, bits=2)
    scale, _ = first_scales(w, spec)
    assert 0.8 < scale[0] < 1.3  # -2, -1, 0, 1 steps of about one standard deviation


def test_rows_of_zeros_get_a_scale_of_the_others() -> None:
    spec = QuantSpec(ir.DataType.INT8, bits=4)
    scale, _ = first_scales(np.array([[0, 0], [7, 7], [0.7, 0.7]], np.float32), spec)
    assert scale[0] == pytest.approx(scale[1:].mean())
    assert first_scales(np.zeros((2, 3), np.float32), spec)[0].tolist() == [1, 1]


def test_a_token_is_no_group_of_a_weight() -> None:
    assert shape_of((3, 4), QuantSpec(ir.DataType.UINT8, PerToken())) == ()


def test_rows_that_are_not_finite_get_a_scale_of_one() -> None:
    spec = QuantSpec(ir.DataType.INT8, bits=4)
    rows = np.array([[np.inf, 1], [np.nan, 1], [7, -7]], np.float32)
    with np.errstate(invalid="ignore"):
        scale, zero = first_scales(rows, spec)
    assert scale[:2].tolist() == [1, 1]
    assert np.isfinite(scale[2])
    assert zero.tolist() == [0, 0, 0]
