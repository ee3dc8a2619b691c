"""Products of u8 and s8 that are added in int16, and weights that cannot overflow it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.reference import Float, Int, dequantize, quantize


def can_saturate(q: Int, activation_max: int | Int) -> NDArray[np.bool_]:
    """Which weight pairs can overflow int16 in `vpmaddubsw`: a[2k]·w[2k] + a[2k+1]·w[2k+1].

    Args:
        q: integer weights, int32, pairs along the first axis (the reduction axis K), shape (K, N).
        activation_max: largest unsigned activation that can occur, one or one a pair (K // 2, 1).

    Returns:
        bool (K // 2, N): the pair can exceed 32,767 or fall below -32,768.
    """
    a, b = q[0 : q.shape[0] // 2 * 2 : 2], q[1::2]
    high = np.maximum(a, 0) + np.maximum(b, 0)
    low = np.minimum(a, 0) + np.minimum(b, 0)
    return np.asarray((high * activation_max > 32767) | (low * activation_max < -32768))


def repair_saturation(q: Int, activation_max: int | Int) -> Int:
    """Move each pair that can overflow to the nearest pair that cannot (least squares).

    Both weights of an offending pair give up half of the excess; all other weights stay. In a
    Gaussian channel of 8-bit weights 1 to 7 % of the pairs are offending (more in short columns),
    so this alone costs more than 7-bit weights would: see :func:`quantize_unsaturated`.

    Args, returns: as :func:`can_saturate`; the result has the shape of `q`.
    """
    fixed = q.copy()
    even = q.shape[0] // 2 * 2
    a, b = fixed[0:even:2], fixed[1:even:2]
    for sign, bound in ((1, 32767), (-1, 32768)):
        limit = bound // np.maximum(activation_max, 1)
        excess = np.where((sign * a > 0) & (sign * b > 0), sign * (a + b) - limit, 0)
        excess = np.maximum(excess, 0)
        take = np.minimum((excess + 1) // 2, sign * a * (excess > 0))
        take = np.maximum(take, excess - np.maximum(sign * b, 0))
        a -= sign * take
        b -= sign * (excess - take)
    return fixed


def quantize_unsaturated(w: Float, scale: Float, activation_max: int | Int) -> tuple[Int, Float]:
    """Symmetric int8 columns in which no pair can overflow, at the least squared error.

    Widening the scale makes offending pairs rare, repair takes care of the rest: each column gets
    the factor between 1 and 127/64 (7-bit weights: nothing to repair) at which the two together
    cost least. For Gaussian columns that is about 1.6 and 4 dB of SQNR; repair alone costs 12-24.
    (Not :func:`reference.search_clipping`: ranges grow here, only in columns that need it, and the
    integers that count are those after the repair.)

    Args:
        w: (K, N), pairs along K.
        scale: (N,), that covers the weights.
        activation_max: largest unsigned activation that can occur.

    Returns:
        q (int32 in -127..127, shape of w) and scale (N,).
    """
    q, scale = quantize(w, scale, 0, -127, 127), scale.copy()
    open_ = np.flatnonzero(can_saturate(q, activation_max).any(axis=0))
    best = np.full(open_.size, np.inf)
    columns, narrow = w[:, open_], scale[open_]
    for factor in np.linspace(1, 127 / 64, 6, dtype=np.float32):
        wide = narrow * factor
        tried = repair_saturation(quantize(columns, wide, 0, -127, 127), activation_max)
        error = np.square(dequantize(tried, wide, 0) - columns, dtype=np.float64).sum(axis=0)
        better = error < best
        best[better] = error[better]
        q[:, open_[better]], scale[open_[better]] = tried[:, better], wide[better]
    return q, scale
