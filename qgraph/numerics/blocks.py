"""Scales and integers of weights in blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.reference import (
    SMALLEST_SCALE,
    Float,
    Int,
    Number,
    dequantize,
    quantize,
    scale_zero_point,
    search_clipping,
)
from qgraph.numerics.spec import PerBlock, QuantSpec

Scales = tuple[Float, Int]
"""Scale (float32) and zero point (int32) of each block, (blocks, N)."""


def block_size(spec: QuantSpec, k: int) -> int:
    """Rows that share a scale: all `k` of them where each channel has one."""
    return spec.granularity.size if isinstance(spec.granularity, PerBlock) else k


def block_sums(values: NDArray[np.float32], spec: QuantSpec) -> Float:
    """Sums over the rows of each block, (blocks, N)."""
    starts = np.arange(0, len(values), block_size(spec, len(values)))
    return np.add.reduceat(values, starts, axis=0)


def spread(values: Scales, spec: QuantSpec, k: int) -> Scales:
    """What blocks have, for each of their rows: (k, N)."""
    size = block_size(spec, k)
    return blockwise(values[0], size, k), blockwise(values[1], size, k)


def lowest(spec: QuantSpec) -> int:
    """The lowest integer: in blocks the dtype's own."""
    return group_qmin(spec) if isinstance(spec.granularity, PerBlock) else spec.qmin


def full_range(w: Float, spec: QuantSpec) -> Scales:
    """The scales at which no weight is clipped: those of rounding to nearest."""
    starts = np.arange(0, len(w), block_size(spec, len(w)))
    low, high = np.minimum.reduceat(w, starts, axis=0), np.maximum.reduceat(w, starts, axis=0)
    own = isinstance(spec.granularity, PerBlock)
    return group_scales(low, high, spec) if own else scale_zero_point(low, high, spec)


def integers(w: Float, scale: Float, zero: Int, spec: QuantSpec) -> Int:
    """w rounded with these scales, int32 (K, N)."""
    wide = spread((scale, zero), spec, len(w))
    return quantize(w, *wide, lowest(spec), spec.qmax)


def rounding_error(w: Float, scale: Float, zero: Int, spec: QuantSpec) -> Float:
    """What that rounding adds to w."""
    wide = spread((scale, zero), spec, len(w))
    return dequantize(quantize(w, *wide, lowest(spec), spec.qmax), *wide) - w


GROUP_CLIPPING = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Shares of a block's range that are tried: finer steps can be worth a clipped peak."""


def blockwise(scale: NDArray[Number], size: int, count: int) -> NDArray[Number]:
    """(blocks, N) as (count, N): each row repeated `size` times, the last one where it ends."""
    return np.repeat(scale, size, axis=0)[:count]


def quantize_groups(w: Float, size: int, spec: QuantSpec) -> tuple[Int, Float, Int]:
    """Round-to-nearest of a matrix in blocks, each with a scale of its own.

    In symmetric blocks the value of largest magnitude becomes the lowest integer, -8 at 4 bits,
    which has no counterpart: scales can be negative, and steps are a seventh finer.

    Args:
        w: (K, N).
        size: rows of a block; the last one may be shorter.
        spec: integer range and symmetry; `observer="mse"` shrinks each block's range as far as its
            squared error gains by it, anything else covers the whole range.

    Returns:
        q (int32, (K, N)), scale (float32) and zero point (int32), (blocks, N) each;
        w ≈ (q - blockwise(zero)) · blockwise(scale).
    """
    starts, qmin = np.arange(0, len(w), size), group_qmin(spec)
    low, high = np.minimum.reduceat(w, starts, axis=0), np.maximum.reduceat(w, starts, axis=0)

    def rounded(scale: Float, zero: Int) -> tuple[Int, Float, Int]:
        wide = blockwise(scale, size, len(w)), blockwise(zero, size, len(w))
        return quantize(w, *wide, qmin, spec.qmax), *wide

    def error(scale: Float, zero: Int) -> Float:
        q, wide_scale, wide_zero = rounded(scale, zero)
        noise = np.square((q - wide_zero) * wide_scale - w, dtype=np.float32)
        return np.add.reduceat(noise, starts, axis=0)

    scale, zero = group_scales(low, high, spec)
    if spec.observer == "mse":
        scale, zero = search_clipping(low, high, spec, GROUP_CLIPPING, error, group_scales)
    return rounded(scale, zero)[0], scale, zero


def group_qmin(spec: QuantSpec) -> int:
    """The lowest integer of weights in blocks with scales of their own: the dtype's own."""
    return -spec.qmax - 1 if spec.symmetric and spec.qmin < 0 else spec.qmin


def group_scales(low: Float, high: Float, spec: QuantSpec) -> tuple[Float, Int]:
    """Scale and zero point of blocks that range from low to high: see :func:`quantize_groups`."""
    if not (spec.symmetric and spec.qmin < 0):
        return scale_zero_point(low, high, spec)
    scale = np.where(high > -low, high, low) / np.float32(group_qmin(spec))
    scale = np.where(np.abs(scale) < SMALLEST_SCALE, SMALLEST_SCALE, scale)
    return scale.astype(np.float32), np.zeros(scale.shape, np.int32)
