"""Histograms of floats that need no range in advance, and what can be read off them.

Bins are the top bits of the float32 pattern: every magnitude is resolved to about 1.5 %, and adding
is a shift and a count. The functions take `centers` and `counts` as from :meth:`BitHistogram.bins`
and spread each bin evenly between its edges; `low` and `high`, the exact extremes of the data, cut
the outermost bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Double = NDArray[np.float64]
Counts = NDArray[np.int64]

_SHIFT = 17
_BINS = 1 << (32 - _SHIFT)
_NEGATIVE = _BINS // 2
_CHUNK = 1 << 20
_LARGEST = float(np.finfo(np.float32).max)


def _patterns() -> NDArray[np.float32]:
    """The middle of every bin, by bin number; the bins of 0 and -0 stand for 0."""
    middle = ((np.arange(_BINS, dtype=np.uint32) << _SHIFT) | (1 << (_SHIFT - 1))).view(np.float32)
    middle[[0, _NEGATIVE]] = 0.0
    return middle


class BitHistogram:
    """Counts of float32 values by sign, exponent and the first 6 bits of the mantissa.

    Args:
        counts: int64 (32768,), by bin number; owned by the histogram. None = empty.
    """

    def __init__(self, counts: Counts | None = None) -> None:
        self.counts: Counts = np.zeros(_BINS, np.int64) if counts is None else counts

    @classmethod
    def of(cls, x: NDArray[np.generic]) -> BitHistogram:
        """The histogram of one array."""
        histogram = cls()
        histogram.add(x)
        return histogram

    def add(self, x: NDArray[np.generic]) -> None:
        """Count the elements of `x`, of any shape, layout and real dtype."""
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
        bits = flat.view(np.uint32)
        for start in range(0, flat.size, _CHUNK):
            top = bits[start : start + _CHUNK] >> _SHIFT
            self.counts += np.bincount(top, minlength=_BINS)

    def merge(self, other: BitHistogram) -> BitHistogram:
        """The histogram of both sets of values."""
        return BitHistogram(self.counts + other.counts)

    @property
    def nonfinite(self) -> int:
        """How many values were NaN or infinite; no other number here includes them."""
        return int(self.counts[~np.isfinite(_patterns())].sum())

    @property
    def count(self) -> int:
        """How many finite values were counted."""
        return int(self.counts.sum()) - self.nonfinite

    def bins(self) -> tuple[Double, Counts]:
        """Centers (float64, ascending) and counts of the occupied bins; 0 has a bin of its own."""
        centers, counts = _patterns(), self.counts.copy()
        counts[0] += counts[_NEGATIVE]
        counts[_NEGATIVE] = 0
        used = np.flatnonzero(np.isfinite(centers) & (counts > 0))
        order = used[np.argsort(centers[used])]
        return centers[order].astype(np.float64), counts[order]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitHistogram) and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]


def edges(centers: Double, low: float, high: float) -> tuple[Double, Double]:
    """Lower and upper edge of the bins, cut to [low, high]; both 0 for the bin of 0."""
    bits = centers.astype(np.float32).view(np.uint32) >> _SHIFT << _SHIFT
    near = bits.view(np.float32).astype(np.float64)
    far = (bits + (1 << _SHIFT)).view(np.float32).astype(np.float64)
    far = np.where(centers == 0, 0.0, np.clip(far, -_LARGEST, _LARGEST))
    a, b = np.minimum(near, far), np.maximum(near, far)
    return np.clip(a, low, high), np.clip(b, low, high)


def support(centers: Double, low: float, high: float) -> tuple[float, float]:
    """The extremes, from the bins where they are not given, widened to hold 0."""
    if not centers.size:
        return 0.0, 0.0
    a, b = edges(centers[[0, -1]], low, high)
    return min(float(a[0]), 0.0), max(float(b[-1]), 0.0)


def fold(centers: Double, counts: Counts) -> tuple[Double, Counts]:
    """The histogram of the magnitudes."""
    magnitudes, where = np.unique(np.abs(centers), return_inverse=True)
    return magnitudes, np.bincount(where, counts).astype(np.int64)


def quantile(
    centers: Double, counts: Counts, q: float, low: float = -np.inf, high: float = np.inf
) -> float:
    """The value that a fraction `q` of the elements does not exceed; 0 for an empty histogram."""
    if not centers.size:
        return 0.0
    a, b = edges(centers, low, high)
    cumulative = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    bin_ = min(int(np.searchsorted(cumulative[1:], q)), centers.size - 1)
    inside = (q - cumulative[bin_]) / (cumulative[bin_ + 1] - cumulative[bin_])
    return float(a[bin_] + (b[bin_] - a[bin_]) * min(inside, 1.0))
