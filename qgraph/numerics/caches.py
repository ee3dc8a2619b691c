"""Scales of what attention remembers: keys and values of all positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.reference import SMALLEST_SCALE

Array = NDArray[Any]


def value_peaks(values: Array) -> Array:
    """The largest magnitude of each channel, float32 (heads, size).

    Args:
        values: float32 (batch, heads, positions, size), at least one position.
    """
    peaks: Array = np.abs(values).max(axis=(0, 2))
    return peaks


def key_peaks(keys: Array, rotary: int, interleaved: bool = False) -> Array:
    """The largest magnitude that each channel can have at any position, float32 (heads, size).

    Rotary embedding turns pairs of channels into each other by an angle that grows with the
    position: √(k₁² + k₂²) stays what it is, and bounds both channels at positions that calibration
    has not seen, too.

    Args:
        keys: float32 (batch, heads, positions, size), at least one position, after the rotation.
        rotary: channels that are turned, the first ones; 0 without rotary embedding.
        interleaved: pairs are (0, 1), (2, 3), ...; else (0, rotary / 2), (1, rotary / 2 + 1), ...
    """
    turned, half = keys[..., :rotary], rotary // 2
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    length = np.sqrt(first**2 + second**2)
    both = [length, length]
    pairs = np.stack(both, -1).reshape(turned.shape) if interleaved else np.concatenate(both, -1)
    return value_peaks(np.concatenate([pairs, keys[..., rotary:]], axis=-1))


def cache_scales(peaks: Array, bits: int) -> Array:
    """Steps of symmetric integers that reach these peaks.

    Args:
        peaks: float32 (heads, size).

    Returns:
        float32 (1, heads, 1, size).
    """
    steps = np.maximum(peaks, SMALLEST_SCALE) / ((1 << (bits - 1)) - 1)
    result: Array = steps.astype(np.float32)[np.newaxis, :, np.newaxis]
    return result


def round_cache(values: Array, scales: Array, bits: int) -> Array:
    """What a cache of so many bits gives back: float32 (batch, heads, positions, size)."""
    limit = 1 << (bits - 1)
    result: Array = np.clip(np.rint(values / scales), -limit, limit - 1) * scales
    return result
