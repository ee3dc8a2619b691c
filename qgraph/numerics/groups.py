"""Elements that share a scale: how a granularity groups them, and a first scale for each group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.blocks import group_scales, lowest
from qgraph.numerics.reference import (
    Float,
    Int,
    dequantize,
    quantize,
    scale_zero_point,
    search_clipping,
)
from qgraph.numerics.spec import PerAxis, PerBlock, QuantSpec

CLIPPING = (*np.linspace(1, 0.6, 21).tolist(), *np.geomspace(0.57, 0.1, 20).tolist())
"""Shares of a range that are tried as the first one: at 2 bits, the best is a third of it."""


def layout(spec: QuantSpec) -> tuple[int | None, int]:
    """The axis along which scales differ, None if there is one scale; and the elements along it
    that share one, 0 if each index has its own."""
    kind = spec.granularity
    if isinstance(kind, PerBlock):
        return kind.axis, kind.size
    return (kind.axis, 0) if isinstance(kind, PerAxis) else (None, 0)


def shape_of(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape."""
    kind = spec.granularity
    if isinstance(kind, PerAxis):
        return (shape[kind.axis],)
    if not isinstance(kind, PerBlock):
        return ()
    count = -(-shape[kind.axis] // kind.size)
    return (*shape[: kind.axis], count, *shape[kind.axis + 1 :])


def rows_of(w: NDArray[Any], spec: QuantSpec) -> Float:
    """The elements that share a scale as one row each, float32; short blocks filled with zeros."""
    kind, exact = spec.granularity, np.asarray(w, np.float32)
    if isinstance(kind, PerAxis):
        return np.moveaxis(exact, kind.axis, 0).reshape(exact.shape[kind.axis], -1)
    if not isinstance(kind, PerBlock):
        return exact.reshape(1, -1)
    columns = np.moveaxis(exact, kind.axis, -1)
    padded = np.pad(columns, [(0, 0)] * (columns.ndim - 1) + [(0, -columns.shape[-1] % kind.size)])
    return padded.reshape(-1, kind.size)


def first_scales(rows: Float, spec: QuantSpec) -> tuple[Float, Int]:
    """Scale and zero point of each row at the least squared error, over shares of its range.

    Rows of zeros, which say nothing, get the mean of the others; rows that are not finite get 1.

    Args:
        rows: (count, elements).

    Returns:
        float32 and int32, (count,).
    """
    qmin, low, high = lowest(spec), rows.min(axis=1), rows.max(axis=1)

    def error(scale: Float, zero: Int) -> NDArray[np.float64]:
        wide = scale[:, np.newaxis], zero[:, np.newaxis]
        rounded = dequantize(quantize(rows, *wide, qmin, spec.qmax), *wide)
        return np.asarray(np.square(rounded - rows, dtype=np.float64).sum(axis=1))

    cover = group_scales if isinstance(spec.granularity, PerBlock) else scale_zero_point
    scale, zero = search_clipping(low, high, spec, CLIPPING, error, cover)
    finite, silent = np.isfinite(low) & np.isfinite(high), (low == 0) & (high == 0)
    scale, zero = np.where(finite, scale, np.float32(1)), np.where(finite, zero, np.int32(0))
    if silent.any():
        scale[silent] = 1.0 if silent.all() else np.abs(scale[~silent]).mean()
    return scale, zero
