"""Integers with one scale, or one for each channel."""

from __future__ import annotations

import numpy as np

from qgraph.numerics.reference import along, quantize, quantize_weight
from qgraph.numerics.spec import NUMPY, QuantSpec

CHUNK_BYTES = 16 << 20
"""Weights are quantized in slices of about this size, so that temporaries stay small."""


def quantize_in_slices(
    w: np.ndarray, axis: int | None, spec: QuantSpec, floor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round-to-nearest of a weight of any size, holding little more than the result.

    Args:
        w: float weight, memory-mapped or not.
        axis: one scale for each index of this axis, or None for one scale.
        spec: integer dtype and range.
        floor: smallest scale allowed for each channel, 1-D, or None.

    Returns:
        q in the spec's dtype, scale float32, zero point int32, as those of
        :func:`reference.quantize_weight`.
    """
    dtype = NUMPY[spec.dtype]
    if axis is None:
        whole = np.asarray(w, np.float32)
        q, scale, zero = quantize_weight(whole, None, spec)
        if floor is not None and floor.max() > scale:
            scale = floor.max()
            q = quantize(whole, scale, zero, spec.qmin, spec.qmax)
        return q.astype(dtype), scale, zero
    channels = w.shape[axis]
    step = max(1, CHUNK_BYTES * channels // max(w.nbytes, 1))
    result = np.empty(w.shape, dtype)
    scales, zeros = np.empty(channels, np.float32), np.empty(channels, np.int32)
    for start in range(0, channels, step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        piece = np.asarray(w[part], np.float32)
        q, scale, zero = quantize_weight(piece, axis, spec)
        if floor is not None and (floor[start : start + step] > scale).any():
            scale = np.maximum(scale, floor[start : start + step]).astype(np.float32)
            wide = along(scale, axis, w.ndim), along(zero, axis, w.ndim)
            q = quantize(piece, *wide, spec.qmin, spec.qmax)
        result[part], scales[start : start + step], zeros[start : start + step] = q, scale, zero
    return result, scales, zeros
