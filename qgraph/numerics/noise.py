"""Measures of error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two powers: inf without noise, else -inf without a signal."""
    if noise <= 0:
        return float("inf")
    return float("-inf") if signal <= 0 else 10 * float(np.log10(signal / noise))


def sqnr_db(reference: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    """Signal-to-quantization-noise ratio, 10·log10(Σ ref² / Σ (ref - other)²) dB; inf if equal."""
    ref = np.asarray(reference, np.float64)
    noise = float(np.square(ref - np.asarray(other, np.float64)).sum())
    signal = float(np.square(ref).sum())
    return decibels(signal, noise)


def unit_power(x: NDArray[Any]) -> NDArray[Any]:
    """Factors (tokens, 1) that bring tokens to a mean square of 1; 0 for tokens of zeros."""
    power = (np.einsum("...k,...k->...", x, x) / x.shape[-1])[..., np.newaxis]
    return np.where(power > 0, 1 / np.sqrt(np.maximum(power, 1e-30)), 0).astype(x.dtype)


def relative_noise(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Power of the difference over power of the reference, with an eye on every token.

    That is the geometric mean of two figures. In one, of all tokens together, a language model's
    first token may outweigh the rest a thousand times; in the other, the mean of each token's own,
    it counts no more than any other, though attention leans on it everywhere.

    Args:
        reference, other: (tokens, channels).

    Returns:
        0 or more; 0 for a reference of zeros.
    """
    signal = np.square(reference, dtype=np.float64).sum(axis=-1)
    noise = np.square(np.subtract(reference, other, dtype=np.float64)).sum(axis=-1)
    alive = signal > 0
    if not alive.any():
        return 0.0
    return float(np.sqrt(noise.sum() / signal.sum() * (noise[alive] / signal[alive]).mean()))


def relative_energy(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Energy of the difference over that of the reference, summed in float64."""
    energy = float(np.square(reference, dtype=np.float64).sum())
    return float(np.square(reference.astype(np.float64) - other).sum()) / max(energy, 1e-30)


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """Largest difference over the largest magnitude; inf for other shapes or new NaNs."""
    if reference.shape != other.shape:
        return float("inf")
    if reference.dtype.kind not in "fiub" or not reference.size:
        return 0.0 if np.array_equal(reference, other) else float("inf")
    ref, out = reference.astype(np.float64), other.astype(np.float64)
    same = (ref == out) | (np.isnan(ref) & np.isnan(out))
    if same.all():
        return 0.0
    finite = ref[np.isfinite(ref)]
    difference = np.abs(ref[~same] - out[~same])
    if not np.isfinite(difference).all():
        return float("inf")
    return float(difference.max() / max(np.abs(finite).max(initial=0.0), 1e-12))
