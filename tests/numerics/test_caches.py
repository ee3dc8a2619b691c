"""Scales of keys and values."""

from __future__ import annotations

import numpy as np
import pytest

from qgraph.numerics.caches import cache_scales, key_peaks, round_cache, value_peaks


def rotated(keys: np.ndarray, positions: np.ndarray, rotary: int, interleaved: bool) -> np.ndarray:
    """Rotary embedding, written out: keys (positions, size)."""
    angles = positions[:, np.newaxis] / 10000 ** (np.arange(rotary // 2) * 2 / rotary)
    pairs = np.arange(rotary // 2)
    first, second = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + rotary // 2)
    turned = keys.copy()
    turned[:, first] = keys[:, first] * np.cos(angles) - keys[:, second] * np.sin(angles)
    turned[:, second] = keys[:, first] * np.sin(angles) + keys[:, second] * np.cos(angles)
    return turned


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [0, 8, 16])
def test_keys_stay_within_their_range_at_any_position(rotary: int, interleaved: bool) -> None:
    keys = np.random.default_rng(rotary).normal(size=(20, 16)).astype(np.float32)
    near = rotated(keys, np.arange(20), rotary, interleaved)
    peaks = key_peaks(near[np.newaxis, np.newaxis], rotary, interleaved)
    for start in (100, 3000, 30000):
        far = rotated(keys, start + np.arange(20), rotary, interleaved)
        assert (np.abs(far).max(axis=0) <= peaks[0] * (1 + 1e-5)).all()
    plain = value_peaks(near[np.newaxis, np.newaxis])
    np.testing.assert_array_equal(peaks[:, rotary:], plain[:, rotary:])


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_off_by_half_a_step(bits: int) -> None:
    values = np.random.default_rng(0).normal(size=(1, 2, 50, 8)).astype(np.float32)
    values[:, 1, :, 3] = 0  # a channel without anything in it
    scales = cache_scales(value_peaks(values), bits)
    assert scales.shape == (1, 2, 1, 8)
    error = np.abs(round_cache(values, scales, bits) - values)
    assert (error <= scales / 2 * (1 + 1e-5)).all()
