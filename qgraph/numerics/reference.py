"""The reference numerics: what every quantized number in qgraph means, in plain numpy.

This file is the specification. Passes, function bodies and backends are tested against it.
Rounding is half to even; the zero point is added after rounding; clamping comes last, as in the
ONNX operators QuantizeLinear and DynamicQuantizeLinear.

Arrays are float32 unless said. `scale` and `zero_point` broadcast against the array they belong to:
use :func:`along` to shape a per-axis vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.spec import FLOAT8, QuantSpec

Float = NDArray[np.float32]
Int = NDArray[np.int32]
Scale = Float | np.float32
Number = TypeVar("Number", bound=np.generic)

SMALLEST_SCALE = np.float32(2.0**-60)
"""A channel of zeros gets this scale: small enough never to matter, and its square, the scale of a
bias, is still a normal float32."""
INT32_MAX = 2**31 - 1
CLIPPING = tuple(np.linspace(1.0, 0.6, 21, dtype=np.float32).tolist())
"""Shares of a channel's range that are tried: finer steps can be worth a clipped peak."""


def along(vector: NDArray[Number], axis: int, rank: int) -> NDArray[Number]:
    """Reshape a 1-D `vector` so that it broadcasts along `axis` of a `rank`-dimensional array."""
    shape = [1] * rank
    shape[axis] = vector.size
    return vector.reshape(shape)


def quantize(x: Scale, scale: Scale, zero_point: Int | int, qmin: int, qmax: int) -> Int:
    """clip(round(x / scale) + zero_point, qmin, qmax), as int32."""
    with np.errstate(over="ignore"):  # an infinite quotient is clamped like any other
        steps = np.rint(np.asarray(x, np.float32) / np.asarray(scale, np.float32))
    # Clamping before the zero point is added is the same, and exact in float32 up to 16 bits.
    low, high = np.float32(qmin) - zero_point, np.float32(qmax) - zero_point
    return np.clip(steps, low, high).astype(np.int32) + zero_point


def dequantize(q: Int, scale: Scale, zero_point: Int | int) -> Float:
    """(q - zero_point) * scale, as float32."""
    return ((np.asarray(q, np.int32) - zero_point).astype(np.float32) * scale).astype(np.float32)


def quantize_float8(x: Float, scale: Scale, spec: QuantSpec) -> NDArray[Any]:
    """x / scale as the nearest float8 of the spec's dtype; what is too large becomes the largest.

    Returns:
        array of the dtype that ml_dtypes has for it, shape of x.
    """
    with np.errstate(over="ignore"):
        ratio = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    return np.clip(ratio, spec.qmin, spec.qmax).astype(spec.dtype.numpy())


def dequantize_float8(q: NDArray[Any], scale: Scale) -> Float:
    """q * scale, as float32."""
    return (q.astype(np.float32) * scale).astype(np.float32)


def scale_zero_point(low: Scale, high: Scale, spec: QuantSpec) -> tuple[Float, Int]:
    """Scale and zero point that cover [low, high] and represent 0 exactly.

    Args:
        low, high: range of the values, any shape. Widened to hold 0.
        spec: gives the integer range and whether it is symmetric.

    Returns:
        scale (float32, > 0) and zero point (int32) of the same shape.
    """
    low = np.minimum(np.asarray(low, np.float32), np.float32(0))
    high = np.maximum(np.asarray(high, np.float32), np.float32(0))
    if spec.symmetric:
        center = (spec.qmin + spec.qmax + 1) // 2 if spec.qmin >= 0 else 0
        scale = np.maximum(-low, high) / np.float32(spec.qmax - center)
        scale = np.maximum(scale, SMALLEST_SCALE)
        return scale.astype(np.float32), np.full(scale.shape, center, np.int32)
    levels = np.float32(spec.qmax - spec.qmin)
    with np.errstate(over="ignore"):
        span = (high - low) / levels  # as DynamicQuantizeLinear computes it, bit for bit
    span = np.where(np.isfinite(span), span, high / levels - low / levels)
    scale = np.maximum(span, SMALLEST_SCALE).astype(np.float32)
    zero = np.rint(spec.qmin - low / scale)
    return scale, np.clip(zero, spec.qmin, spec.qmax).astype(np.int32)


def weight_range(w: Float, axis: int | None) -> tuple[Float, Float]:
    """Smallest and largest value for each index of `axis` (1-D), or of all of `w` (0-D)."""
    others = None if axis is None else tuple(i for i in range(w.ndim) if i != axis % w.ndim)
    return w.min(axis=others), w.max(axis=others)


def quantize_weight(w: Float, axis: int | None, spec: QuantSpec) -> tuple[Int, Float, Int]:
    """Round-to-nearest of a constant tensor.

    Args:
        w: the weight.
        axis: one scale for each index of this axis, or None for one scale.
        spec: integer range and symmetry; `observer="mse"` searches the clipping that minimises the
            squared error of each channel, anything else covers the whole range.

    Returns:
        q (int32 or float8, shape of w), scale and zero point (1-D along `axis`, or 0-D).
    """
    low, high = weight_range(w, axis)
    best = scale_zero_point(low, high, spec)
    if spec.observer == "mse" and spec.dtype not in FLOAT8:
        best = _least_squares(w, axis, spec, low, high)
    scale, zero = best
    if spec.dtype in FLOAT8:
        wide = scale if axis is None else along(scale, axis, w.ndim)
        return quantize_float8(w, wide, spec), scale, zero
    if axis is None:
        return quantize(w, scale, zero, spec.qmin, spec.qmax), scale, zero
    wide_scale, wide_zero = along(scale, axis, w.ndim), along(zero, axis, w.ndim)
    return quantize(w, wide_scale, wide_zero, spec.qmin, spec.qmax), scale, zero


def _least_squares(
    w: Float, axis: int | None, spec: QuantSpec, low: Float, high: Float
) -> tuple[Float, Int]:
    others = None if axis is None else tuple(i for i in range(w.ndim) if i != axis % w.ndim)

    def error(scale: Float, zero: Int) -> NDArray[np.float64]:
        wide = scale, zero
        if axis is not None:
            wide = along(scale, axis, w.ndim), along(zero, axis, w.ndim)
        rounded = dequantize(quantize(w, *wide, spec.qmin, spec.qmax), *wide)
        return np.asarray(np.square(rounded - w, dtype=np.float64).sum(axis=others))

    return search_clipping(low, high, spec, CLIPPING, error)


def search_clipping(
    low: Float,
    high: Float,
    spec: QuantSpec,
    shares: Iterable[float],
    error: Callable[[Float, Int], NDArray[np.floating[Any]]],
    cover: Callable[[Float, Float, QuantSpec], tuple[Float, Int]] = scale_zero_point,
) -> tuple[Float, Int]:
    """The scales and zero points at which clipping costs least, each of them by itself.

    Args:
        low, high: the full ranges, any shape.
        shares: of them that are tried; the first of equals counts.
        error: of rounding with these scales and zero points, shape of `low`.
        cover: scale and zero point of a range.

    Returns:
        scale (float32) and zero point (int32), shape of `low`.
    """
    first, *others = (np.float32(share) for share in shares)
    scale, zero = cover(low * first, high * first, spec)
    least = error(scale, zero)
    for share in others:
        tried = cover(low * share, high * share, spec)
        cost = error(*tried)
        better = cost < least
        least = np.where(better, cost, least)
        scale, zero = np.where(better, tried[0], scale), np.where(better, tried[1], zero)
    return scale, zero


def quantize_bias(bias: Float, x_scale: Scale, w_scale: Scale) -> tuple[Int, Float]:
    """Bias as int32 with scale x·w and zero point 0, the only form that integer kernels add.

    Returns:
        q (int32) and its scale. Use :func:`weight_scale_for_bias` first where q would overflow.
    """
    scale = (np.asarray(x_scale, np.float32) * np.asarray(w_scale, np.float32)).astype(np.float32)
    scale = np.broadcast_to(scale, bias.shape).astype(np.float32)
    steps = np.rint(bias.astype(np.float64) / scale)
    return np.clip(steps, -INT32_MAX, INT32_MAX).astype(np.int32), scale


def weight_scale_for_bias(w_scale: Float, x_scale: Scale, bias: Float) -> Float:
    """The smallest weight scales, at least `w_scale`, at which no bias overflows int32.

    A channel whose weights are nearly zero gets a tiny scale, and bias / (x·w) no longer fits.
    Half of the int32 range is left to the accumulated products.
    """
    needed = np.abs(bias.astype(np.float64)) / (np.float64(x_scale) * (INT32_MAX // 2))
    return np.maximum(w_scale, needed).astype(np.float32)
