"""What calibration learns of a value, and the range that follows from it.

Statistics are streaming, mergeable and of fixed size: neither the order of the samples nor how they
were batched changes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qgraph.errors import CalibrationError
from qgraph.numerics.histogram import BitHistogram, Double, quantile
from qgraph.numerics.noise import decibels
from qgraph.numerics.ranges import entropy_range, mse_range, percentile_range
from qgraph.numerics.spec import QuantSpec

__all__ = [
    "BitHistogram",
    "Stats",
    "Wanted",
    "entropy_range",
    "find_range",
    "mse_range",
    "percentile_range",
    "token_sqnr_db",
]


@dataclass(frozen=True)
class Wanted:
    """What to collect of one value besides its extremes.

    Attributes:
        histogram: the histogram of all elements.
        channel_mean_axis: mean for each index of this axis.
        channel_range_axis: smallest and largest value for each index of this axis.
        token_power: histogram of the mean square of each vector along the last axis.
    """

    histogram: bool = False
    channel_mean_axis: int | None = None
    channel_range_axis: int | None = None
    token_power: bool = False


@dataclass(frozen=True)
class Stats:
    """What calibration knows of one value.

    Class attributes:
        version: to be raised whenever the same data gives other statistics than before: those of
            older versions are not taken from the cache.

    Attributes:
        count: number of elements seen.
        low, high: extremes of the finite elements; (inf, -inf) before any was seen.
        histogram: of all elements.
        channel_low, channel_high, channel_mean: float64, 1-D along a channel axis.
        token_power: histogram of the mean square of each token, the vector along the last axis.
    """

    version: ClassVar[int] = 1

    count: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    histogram: BitHistogram | None = field(default=None, repr=False)
    channel_low: Double | None = field(default=None, repr=False)
    channel_high: Double | None = field(default=None, repr=False)
    channel_mean: Double | None = field(default=None, repr=False)
    token_power: BitHistogram | None = field(default=None, repr=False)

    @classmethod
    def of(cls, x: NDArray[np.generic], wanted: Wanted) -> Stats:
        """The statistics of one array."""
        if x.size == 0:
            return cls()
        wide = x if x.dtype.kind == "f" else np.asarray(x, np.float64)
        finite = wide[np.isfinite(wide)]
        channel_low = channel_high = channel_mean = histogram = token_power = None
        with np.errstate(invalid="ignore", over="ignore"):
            if wanted.histogram:
                histogram = BitHistogram.of(wide)
            if wanted.token_power:
                token_power = BitHistogram.of(np.square(wide, dtype=np.float64).mean(axis=-1))
            if wanted.channel_mean_axis is not None:
                others = _others(wide.ndim, wanted.channel_mean_axis)
                channel_mean = wide.mean(axis=others, dtype=np.float64)
            if wanted.channel_range_axis is not None:
                others = _others(wide.ndim, wanted.channel_range_axis)
                channel_low = wide.min(axis=others).astype(np.float64)
                channel_high = wide.max(axis=others).astype(np.float64)
        return cls(
            count=x.size,
            low=float(finite.min(initial=np.inf)),
            high=float(finite.max(initial=-np.inf)),
            histogram=histogram,
            channel_low=channel_low,
            channel_high=channel_high,
            channel_mean=channel_mean,
            token_power=token_power,
        )

    def merge(self, other: Stats) -> Stats:
        """The statistics of both sets of elements: what both know; an empty one knows nothing."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        merged = Stats(count, min(self.low, other.low), max(self.high, other.high))
        if self.histogram is not None and other.histogram is not None:
            merged = replace(merged, histogram=self.histogram.merge(other.histogram))
        if self.token_power is not None and other.token_power is not None:
            merged = replace(merged, token_power=self.token_power.merge(other.token_power))
        if self.channel_low is not None and other.channel_low is not None:
            merged = replace(merged, channel_low=np.minimum(self.channel_low, other.channel_low))
        if self.channel_high is not None and other.channel_high is not None:
            merged = replace(merged, channel_high=np.maximum(self.channel_high, other.channel_high))
        if self.channel_mean is not None and other.channel_mean is not None:
            total = self.channel_mean * self.count + other.channel_mean * other.count
            merged = replace(merged, channel_mean=total / count)
        return merged

    def divided(self, factors: NDArray[np.floating[Any]]) -> Stats:
        """What is known of the value after division by positive factors, one for each channel.

        Extremes and means follow exactly; histograms, whose elements have no channel, are dropped.
        Statistics without channel extremes, along the last axis, know nothing of the quotient.

        Args:
            factors: (channels,).
        """
        if self.channel_low is None or self.channel_high is None:
            return Stats()
        low, high = self.channel_low / factors, self.channel_high / factors
        mean = None if self.channel_mean is None else self.channel_mean / factors
        return Stats(
            self.count, float(low.min()), float(high.max()),
            channel_low=low, channel_high=high, channel_mean=mean,
        )  # fmt: skip

    @property
    def channel_peak(self) -> Double | None:
        """Largest magnitude of each channel, None where channel extremes were not collected."""
        if self.channel_low is None or self.channel_high is None:
            return None
        return np.maximum(-self.channel_low, self.channel_high)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything as arrays by name, for `numpy.savez`; :meth:`from_arrays` reads them back."""
        arrays: dict[str, NDArray[np.generic]] = {
            "count": np.asarray(self.count, np.int64),
            "range": np.asarray([self.low, self.high], np.float64),
        }
        for name in _CHANNEL_FIELDS:
            if (vector := getattr(self, name)) is not None:
                arrays[name] = vector
        for name in _HISTOGRAM_FIELDS:
            if (histogram := getattr(self, name)) is not None:
                used = np.flatnonzero(histogram.counts)
                arrays[name] = np.stack([used, histogram.counts[used]])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Stats:
        """The inverse of :meth:`to_arrays`."""
        low, high = np.asarray(arrays["range"], np.float64).tolist()
        parts: dict[str, Any] = {
            name: np.asarray(arrays[name], np.float64) for name in _CHANNEL_FIELDS if name in arrays
        }
        for name in _HISTOGRAM_FIELDS:
            if name in arrays:
                used, counts = np.asarray(arrays[name], np.int64)
                parts[name] = BitHistogram()
                parts[name].counts[used] = counts
        return cls(int(np.asarray(arrays["count"])), low, high, **parts)

    def __str__(self) -> str:
        return f"[{self.low:.4g}, {self.high:.4g}] n={self.count}"


_CHANNEL_FIELDS = ("channel_low", "channel_high", "channel_mean")
_HISTOGRAM_FIELDS = ("histogram", "token_power")


def _others(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if i != axis % rank)


def find_range(stats: Stats, spec: QuantSpec) -> tuple[float, float]:
    """The range [low, high], 0 included, to quantize a value with these statistics to.

    Raises:
        CalibrationError: nothing finite was seen, the range is found at run time (`dynamic`), or
            `spec.observer` needs a histogram that was not collected.
    """
    if spec.dynamic:
        raise CalibrationError("a dynamic range is found at run time: use a static observer here")
    if not stats.low <= stats.high:
        raise CalibrationError(
            "no finite value was seen in calibration: check the calibration data"
        )
    if spec.observer in ("minmax", "absmax"):
        return min(stats.low, 0.0), max(stats.high, 0.0)
    centers, counts = _need(stats.histogram, spec.observer).bins()
    if spec.observer == "percentile":
        return percentile_range(centers, counts, spec, stats.low, stats.high)
    if spec.observer == "entropy":
        return entropy_range(centers, counts, spec, stats.low, stats.high)
    return mse_range(centers, counts, spec, stats.low, stats.high)


def _need(histogram: BitHistogram | None, what: str) -> BitHistogram:
    if histogram is None:
        raise CalibrationError(f"'{what}' needs a histogram: calibrate again, asking for one")
    return histogram


def token_sqnr_db(stats: Stats, scale: float) -> float:
    """SQNR in dB of the median token, quantized with one `scale` for all tokens.

    A scale set by a spiking token ruins all others, which the SQNR over all elements hides: the
    spike holds most of the power. Tokens of zeros do not count, any scale holds them exactly; where
    no others were seen, nothing is known and the result is -inf.

    Raises:
        CalibrationError: the power of the tokens was not collected.
    """
    centers, counts = _need(stats.token_power, "token SQNR").bins()
    alive = centers > 0
    if not alive.any():
        return float("-inf")
    return decibels(quantile(centers[alive], counts[alive], 0.5), scale**2 / 12)
