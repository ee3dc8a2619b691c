"""The references themselves, held to values worked out by hand and to exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from qgraph.backends.cuda.packing import aligned, pad_columns, row_sums
from qgraph.backends.cuda.references import fits_int32, int8_linear, quantize_per_token

STEP, FLOOR = 1 / 127, 2.0**-60


def test_values_are_rounded_half_to_even_clamped_and_moved_by_128() -> None:
    x = np.array([[127, 0.5, 1.5, -2.5, -127, 0]], np.float32)
    q, largest = quantize_per_token(x, STEP, 128, FLOOR)
    assert q.shape == (1, 64)
    assert q[0, :6].tolist() == [127, 0, 2, -2, -127, 0]
    assert not q[0, 6:].any()
    assert largest.tolist() == [127]
    q, _ = quantize_per_token(np.maximum(x, 0), 1 / 255, 0, FLOOR)
    assert (q[0, :4].astype(int) + 128).tolist() == [255, 1, 3, 0]


def test_tokens_of_zeros_infinities_and_no_numbers() -> None:
    x = np.zeros((2, 2, 3), np.float16)
    x[0, 1, 0], x[1, 0, 2] = np.inf, np.nan
    q, largest = quantize_per_token(x, STEP, 128, FLOOR)
    assert q.shape == (4, 64)
    assert largest[:2].tolist() == [np.float32(FLOOR), np.inf]
    assert np.isnan(largest[2])
    assert (q[1, :3].tolist(), q[2, :3].tolist()) == ([-128, 0, 0], [-128, -128, -128])
    assert quantize_per_token(x[:0], STEP, 128, FLOOR)[0].shape == (0, 64)
    assert quantize_per_token(np.zeros((2, 0), np.float32), STEP, 128, FLOOR)[1].shape == (2,)


@pytest.mark.parametrize("zero", [128, 32, 0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_product_is_near_the_exact_one(zero: int, dtype: type) -> None:
    r = np.random.default_rng(zero)
    q = pad_columns(r.integers(-128, 128, (3, 70)).astype(np.int8))
    w = pad_columns(r.integers(-127, 128, (5, 70)).astype(np.int8))
    w[:, 70:] = 0
    scale, bias = (
        r.random(5, np.float32) * np.float32(0.01),
        r.standard_normal(5).astype(np.float32),
    )
    largest = r.random(3, np.float32)
    sums = None if zero == 128 else row_sums(w)
    y = int8_linear(q, largest, w, scale, sums, bias, zero, np.dtype(dtype))
    assert y.dtype == dtype
    digits = {2: 7 if dtype == ml_dtypes.bfloat16 else 10, 4: 23}[y.dtype.itemsize]
    for m in range(3):
        for n in range(5):
            acc = sum((int(a) + 128 - zero) * int(b) for a, b in zip(q[m], w[n], strict=True))
            product = acc * Fraction(float(scale[n])) * Fraction(float(largest[m]))
            exact, terms = product + Fraction(float(bias[n])), abs(product) + 1
            assert abs(Fraction(float(y[m, n])) - exact) < terms * Fraction(2) ** (1 - digits)


def test_sums_that_could_overflow_are_known() -> None:
    assert [fits_int32(k, 128) for k in (131071, 131072)] == [True, False]
    assert [fits_int32(k, 0) for k in (65793, 65794)] == [True, False]
    q = np.full((1, 65728), 127, np.int8)
    w = np.full((1, 65728), -128, np.int8)
    one = np.ones(1, np.float32)
    y = int8_linear(q, one, w, one, row_sums(w), None, 0, np.dtype(np.float32))
    assert y[0, 0] == np.float32(-255 * 128 * 65728)


def test_columns_are_filled_up_to_whole_pieces() -> None:
    assert [aligned(k) for k in (0, 1, 64, 65)] == [0, 64, 64, 128]
    whole = np.ones((2, 64), np.int8)
    assert pad_columns(whole) is whole
    assert row_sums(pad_columns(whole[:, :3])).tolist() == [3, 3]
