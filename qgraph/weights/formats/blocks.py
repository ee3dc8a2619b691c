"""Integers in blocks of a matrix, each block with its scale."""

from __future__ import annotations

import numpy as np

from qgraph.numerics.blocks import quantize_groups
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import NUMPY, PerBlock, QuantSpec

CACHED_BYTES = 1 << 18
"""Where many candidates are tried, slices of this size, so that they stay in the CPU's cache."""


def quantize_in_groups(w: np.ndarray, blocks: PerBlock, spec: QuantSpec) -> Quantized:
    """:func:`blocks.quantize_groups` of a matrix of any size, (K, N) or (N, K).

    Args:
        w: float weight, memory-mapped or not.
        blocks: their size, and which axis of `w` is K.
    """
    rows = w.T if blocks.axis else w
    k, n = rows.shape
    q, count = np.empty(rows.shape, NUMPY[spec.dtype]), -(-k // blocks.size)
    scale, zero = np.empty((count, n), np.float32), np.empty((count, n), np.int32)
    step = max(1, CACHED_BYTES // (4 * max(k, 1)))
    for start in range(0, n, step):
        part = (slice(None), slice(start, start + step))
        piece = np.asarray(rows[part], np.float32)
        q[part], scale[part], zero[part] = quantize_groups(piece, blocks.size, spec)
    if blocks.axis:
        q, scale, zero = (np.ascontiguousarray(a.T) for a in (q, scale, zero))
    return Quantized(q, scale, zero, blocks.axis, block=blocks.size)
