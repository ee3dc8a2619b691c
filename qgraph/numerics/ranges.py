"""From a histogram to the range to quantize over: percentile, entropy, squared error.

Pure functions on `centers` and `counts` as from `histogram.BitHistogram.bins`;
`low` and `high` are the exact extremes of the data. Every range holds 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qgraph.numerics.histogram import Counts, Double, edges, fold, quantile, support
from qgraph.numerics.reference import scale_zero_point
from qgraph.numerics.spec import QuantSpec

_PER_LEVEL = 4
"""Bins for each quantization level when entropy compares distributions."""


def percentile_range(
    centers: Double,
    counts: Counts,
    spec: QuantSpec,
    low: float = -np.inf,
    high: float = np.inf,
    percent: float = 99.99,
) -> tuple[float, float]:
    """The range that holds `percent` of the elements.

    Symmetric: that percentile of the magnitudes. Asymmetric: each tail loses half of the rest.
    """
    if spec.symmetric:
        magnitudes, folded = fold(centers, counts)
        t = quantile(magnitudes, folded, percent / 100, 0.0, max(-low, high))
        return _clip(t, *support(centers, low, high))
    rest = (1 - percent / 100) / 2
    least = quantile(centers, counts, rest, low, high)
    most = quantile(centers, counts, 1 - rest, low, high)
    return min(least, 0.0), max(most, 0.0)


def entropy_range(
    centers: Double, counts: Counts, spec: QuantSpec, low: float = -np.inf, high: float = np.inf
) -> tuple[float, float]:
    """The clipping whose quantized distribution is nearest to the true one by KL divergence.

    As in TensorRT's calibrator (Migacz, "8-bit Inference with TensorRT", 2017): for each threshold,
    P is the clipped distribution with the outliers in its last bins, Q the distribution inside the
    threshold flattened over each level. Done better where the bit histogram allows it: the bins are
    resampled for each threshold, so an outlier does not coarsen all others; exact zeros, which any
    range represents, do not vote; at most 1 % of the others is clipped.
    """
    least, most = support(centers, low, high)
    nonzero = centers != 0
    if spec.width > 8 or not nonzero.any():
        return least, most
    a, b = edges(centers[nonzero], low, high)
    cumulative = np.concatenate([[0], np.cumsum(counts[nonzero])]) / counts[nonzero].sum()
    points, mass = _staircase(a, b, cumulative)
    top = max(-least, most)
    magnitudes, folded = fold(centers[nonzero], counts[nonzero])
    floor = quantile(magnitudes, folded, 0.99, 0.0, top)
    best, best_divergence = top, np.inf
    for t in np.geomspace(top, max(floor, top * 2.0**-12), 96):
        start, stop = (-t, t) if spec.symmetric else _clip(t, least, most)
        grid = np.linspace(start, stop, (spec.qmax - spec.qmin + 1) * _PER_LEVEL + 1)
        cdf = np.interp(grid, points, mass)
        cdf[0] *= start > least  # nothing lies below the extreme, however much lies on it
        divergence = _divergence(np.diff(cdf), cdf[0], 1 - cdf[-1])
        if divergence < best_divergence:
            best, best_divergence = t, divergence
    return _clip(best, least, most)


def _divergence(inside: Double, below: float, above: float) -> float:
    """KL divergence in nats of the flattened, clipped distribution from the clipped one."""
    levels = inside.reshape(-1, _PER_LEVEL)
    flat = np.repeat(levels.mean(axis=1), _PER_LEVEL)
    flat = (flat + 1e-9) / (flat.sum() + 1e-9 * flat.size)
    p = inside.copy()
    p[:_PER_LEVEL] += below / _PER_LEVEL
    p[-_PER_LEVEL:] += above / _PER_LEVEL
    used = p > 0
    return float((p[used] * np.log(p[used] / flat[used])).sum())


def mse_range(
    centers: Double, counts: Counts, spec: QuantSpec, low: float = -np.inf, high: float = np.inf
) -> tuple[float, float]:
    """The clipping with the smallest expected squared error, rounding and clipping together.

    Both ends are first clipped at one magnitude (down to 2**-12 of the largest); an asymmetric
    range then moves each end by itself.
    """
    least, most = support(centers, low, high)
    top = max(-least, most)
    if top == 0:
        return 0.0, 0.0
    # below half of the finest step, all candidates round to 0 alike
    matters = np.abs(centers) > top * 2.0**-20
    mass = Mass.of(centers[matters], counts[matters], low, high)
    step = 2.0 ** (-1 / 5)
    t = _best(mass, spec, least, most, top * step ** np.arange(61), top * step ** np.arange(61))
    fine = np.append(1.0, np.geomspace(step, 1 / step, 24))
    near = max(-t[0], t[1]) * fine
    start, stop = _best(mass, spec, least, most, near, near)
    if spec.symmetric:
        return start, stop
    wide = np.append(1.0, np.geomspace(0.5, 2, 40))
    for factors in (wide, fine):
        start, stop = _best(mass, spec, least, most, -start * factors, np.full(factors.size, stop))
        start, stop = _best(mass, spec, least, most, np.full(factors.size, -start), stop * factors)
    return start, stop


def _best(
    mass: Mass, spec: QuantSpec, least: float, most: float, below: Double, above: Double
) -> tuple[float, float]:
    """The best of the ranges [-below, above], each cut to [least, most]; the first of equals."""
    lows, highs = np.maximum(-below, least), np.minimum(above, most)
    best = int(np.argmin(mass.squared_error(lows, highs, spec)))
    return float(lows[best]), float(highs[best])


def _clip(t: float, least: float, most: float) -> tuple[float, float]:
    return max(-float(t), least), min(float(t), most)


def _staircase(a: Double, b: Double, cumulative: Double) -> tuple[Double, Double]:
    """Points (value, mass up to it) of the cumulative distribution."""
    points = np.stack([a, b], axis=1).reshape(-1)
    return points, np.stack([cumulative[:-1], cumulative[1:]], axis=1).reshape(-1)


@dataclass(frozen=True)
class Mass:
    """A histogram as a density: constant between edges, and atoms (0, or a bin cut to one value).

    With F the antiderivative of the squared error, a bin [a, b] of c elements adds
    c·(F(b) - F(a))/(b - a): summed over bins, a weight for each edge.
    """

    points: Double
    weights: Double
    atoms: Double
    atom_counts: Double

    @classmethod
    def of(cls, centers: Double, counts: Counts, low: float, high: float) -> Mass:
        a, b = edges(centers, low, high)
        flat = b > a
        density = counts[flat] / (b[flat] - a[flat])
        points, where = np.unique(np.concatenate([a[flat], b[flat]]), return_inverse=True)
        weights = np.bincount(where, np.concatenate([-density, density]), minlength=points.size)
        return cls(points, weights.astype(np.float64), a[~flat], counts[~flat].astype(np.float64))

    def squared_error(self, lows: Double, highs: Double, spec: QuantSpec) -> Double:
        """Summed squared error of quantizing over each of the ranges [lows, highs], both 1-D."""
        scale, zero = scale_zero_point(lows.astype(np.float32), highs.astype(np.float32), spec)
        s = scale.astype(np.float64)[:, None]
        bottom, top = (spec.qmin - zero)[:, None], (spec.qmax - zero)[:, None]

        def steps(x: Double) -> tuple[Double, Double]:
            u = x / s
            k = np.clip(np.rint(u), bottom, top)
            return k, u - k

        k, rest = steps(self.points)
        # antiderivative of (u - k)²: each whole cell adds 1/12, the last one or the tail rest³/3
        noise = (k / 12 + rest * rest * rest / 3) @ self.weights * s[:, 0] ** 3
        _, rest = steps(self.atoms)
        return np.asarray(np.maximum(noise + rest**2 @ self.atom_counts * s[:, 0] ** 2, 0.0))
