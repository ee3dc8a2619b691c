"""The reference numerics: what every quantized number in qgraph means, in plain numpy.

This file is the specification. Passes, function bodies and backends are tested against it.
Rounding is half to even; the zero point is added after rounding; clamping comes last, as in the
ONNX operators QuantizeLinear and DynamicQuantizeLinear.

Arrays are float32 unless said. `scale` and `zero_point` broadcast against the array they belong to:
use :func:`along` to shape a per-axis vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qgraph.spec import FLOAT8, QuantSpec

Float = NDArray[np.float32]
Int = NDArray[np.int32]
Scale = Float | np.float32
Number = TypeVar("Number", bound=np.generic)

SMALLEST_SCALE = np.float32(2.0**-60)
"""A channel of zeros gets this scale: small enough never to matter, and its square, the scale of a
bias, is still a normal float32."""
INT32_MAX = 2**31 - 1
GROUP_CLIPPING = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Shares of a block's range that are tried: finer steps can be worth a clipped peak."""


@dataclass(frozen=True)
class TokenGrid:
    """Where per-token quantization puts its 256 levels, relative to the token's largest magnitude.

    Attributes:
        step: distance of levels, in units of the largest magnitude.
        zero: the level of 0.
        floor: magnitudes are taken to be at least this, so that levels reach the lowest value.
    """

    step: np.float32
    zero: int
    floor: np.float32


SYMMETRIC_GRID = TokenGrid(np.float32(1 / 127), 128, SMALLEST_SCALE)
"""For values of either sign: 128 ± 127."""
_NEGATIVE_LEVELS = 32


def token_grid(lowest: float | None) -> TokenGrid:
    """The grid for values that are never below `lowest`, None = unknown.

    Where an activation function bounds its output (Relu by 0, Gelu by -0.17), half of a symmetric
    range would stay empty; the negative side gets no more levels than it needs.
    """
    if lowest is None or lowest < -1:
        return SYMMETRIC_GRID
    zero = _NEGATIVE_LEVELS if lowest < 0 else 0
    floor = max(-lowest * (255 - zero) / max(zero, 1), float(SMALLEST_SCALE))
    return TokenGrid(np.float32(1 / (255 - zero)), zero, np.float32(floor))


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
        best = _search_clipping(w, axis, spec, low, high)
    scale, zero = best
    if spec.dtype in FLOAT8:
        wide = scale if axis is None else along(scale, axis, w.ndim)
        return quantize_float8(w, wide, spec), scale, zero
    if axis is None:
        return quantize(w, scale, zero, spec.qmin, spec.qmax), scale, zero
    wide_scale, wide_zero = along(scale, axis, w.ndim), along(zero, axis, w.ndim)
    return quantize(w, wide_scale, wide_zero, spec.qmin, spec.qmax), scale, zero


def _search_clipping(
    w: Float, axis: int | None, spec: QuantSpec, low: Float, high: Float
) -> tuple[Float, Int]:
    others = None if axis is None else tuple(i for i in range(w.ndim) if i != axis % w.ndim)
    best_error = np.full(low.shape, np.inf)
    best_scale, best_zero = scale_zero_point(low, high, spec)
    for ratio in np.linspace(1.0, 0.6, 21, dtype=np.float32):
        scale, zero = scale_zero_point(low * ratio, high * ratio, spec)
        wide = (scale, zero)
        if axis is not None:
            wide = along(scale, axis, w.ndim), along(zero, axis, w.ndim)
        q = quantize(w, wide[0], wide[1], spec.qmin, spec.qmax)
        error = np.square(dequantize(q, wide[0], wide[1]) - w, dtype=np.float64).sum(axis=others)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_zero = np.where(better, zero, best_zero)
    return best_scale, best_zero


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
    starts = np.arange(0, w.shape[0], size)
    low = np.minimum.reduceat(w, starts, axis=0)
    high = np.maximum.reduceat(w, starts, axis=0)
    qmin = group_qmin(spec)
    best, q = np.full(low.shape, np.inf), np.zeros(w.shape, np.int32)
    scale, zero = np.empty(low.shape, np.float32), np.zeros(low.shape, np.int32)
    for ratio in GROUP_CLIPPING if spec.observer == "mse" else (1.0,):
        tried = group_scales(low * np.float32(ratio), high * np.float32(ratio), spec)
        wide_scale, wide_zero = (
            blockwise(tried[0], size, len(w)), blockwise(tried[1], size, len(w))
        )  # fmt: skip
        rounded = quantize(w, wide_scale, wide_zero, qmin, spec.qmax)
        noise = np.square((rounded - wide_zero) * wide_scale - w, dtype=np.float32)
        error = np.add.reduceat(noise, starts, axis=0)
        better = error < best
        best = np.where(better, error, best)
        scale, zero = np.where(better, tried[0], scale), np.where(better, tried[1], zero)
        q = np.where(blockwise(better, size, w.shape[0]), rounded, q)
    return q, scale.astype(np.float32), zero


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


def quantize_per_token(x: Float, grid: TokenGrid = SYMMETRIC_GRID) -> tuple[Int, Float]:
    """ZeroQuant's token-wise activations, in uint8 with a fixed zero point.

    Unsigned, because u8·s8 products are what CPUs without dot-product instructions are fast at.
    The grid's step stays out of the returned scale, so that a kernel takes it as its fixed
    activation scale and only the token's own magnitude is multiplied in afterwards.

    Args:
        x: any shape; the last axis is one token's vector.
        grid: where the levels lie.

    Returns:
        q (int32 in 0..255, shape of x) and the token's largest magnitude (float32, last axis 1);
        x ≈ (q - zero) * step * largest.
    """
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), grid.floor).astype(np.float32)
    return quantize(x / largest, grid.step, grid.zero, 0, 255), largest


def dequantize_per_token(q: Int, largest: Float, grid: TokenGrid = SYMMETRIC_GRID) -> Float:
    """The inverse of :func:`quantize_per_token`, up to rounding."""
    return (dequantize(q, grid.step, grid.zero) * largest).astype(np.float32)


def round_in_blocks(x: Float, size: int) -> Float:
    """Each block of a token rounded to 8 bits with a scale of its own, and back.

    What kernels for weights in blocks do to the activations that they meet: symmetric, 255 levels.

    Args:
        x: any shape; the last axis is one token's vector, whose last block may be shorter.
    """
    spare = -x.shape[-1] % size
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)])
    blocks = padded.reshape(-1, size)
    largest = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), SMALLEST_SCALE)
    scale = (largest * np.float32(1 / 127)).astype(np.float32)
    rounded: Float = (np.rint(blocks / scale) * scale).astype(np.float32)
    return rounded.reshape(padded.shape)[..., : x.shape[-1]]


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


def can_saturate(q: Int, activation_max: int | Int) -> NDArray[np.bool_]:
    """Which weight pairs can overflow int16 in `vpmaddubsw`: a[2k]·w[2k] + a[2k+1]·w[2k+1].

    Args:
        q: integer weights, int32, pairs along the first axis (the reduction axis K), shape (K, N).
        activation_max: largest unsigned activation that can occur, one or one a pair (K // 2, 1).

    Returns:
        bool (K // 2, N): the pair can exceed 32,767 or fall below -32,768.
    """
    a, b = q[0 : q.shape[0] // 2 * 2 : 2], q[1::2]
    high = np.maximum(a, 0) + np.maximum(b, 0)
    low = np.minimum(a, 0) + np.minimum(b, 0)
    return np.asarray((high * activation_max > 32767) | (low * activation_max < -32768))


def repair_saturation(q: Int, activation_max: int | Int) -> Int:
    """Move each pair that can overflow to the nearest pair that cannot (least squares).

    Both weights of an offending pair give up half of the excess; all other weights stay. In a
    Gaussian channel of 8-bit weights 1 to 7 % of the pairs are offending (more in short columns),
    so this alone costs more than 7-bit weights would: see :func:`quantize_unsaturated`.

    Args, returns: as :func:`can_saturate`; the result has the shape of `q`.
    """
    fixed = q.copy()
    even = q.shape[0] // 2 * 2
    a, b = fixed[0:even:2], fixed[1:even:2]
    for sign, bound in ((1, 32767), (-1, 32768)):
        limit = bound // np.maximum(activation_max, 1)
        excess = np.where((sign * a > 0) & (sign * b > 0), sign * (a + b) - limit, 0)
        excess = np.maximum(excess, 0)
        take = np.minimum((excess + 1) // 2, sign * a * (excess > 0))
        take = np.maximum(take, excess - np.maximum(sign * b, 0))
        a -= sign * take
        b -= sign * (excess - take)
    return fixed


def quantize_unsaturated(w: Float, scale: Float, activation_max: int | Int) -> tuple[Int, Float]:
    """Symmetric int8 columns in which no pair can overflow, at the least squared error.

    Widening the scale makes offending pairs rare, repair takes care of the rest: each column gets
    the factor between 1 and 127/64 (7-bit weights: nothing to repair) at which the two together
    cost least. For Gaussian columns that is about 1.6 and 4 dB of SQNR; repair alone costs 12-24.

    Args:
        w: (K, N), pairs along K.
        scale: (N,), that covers the weights.
        activation_max: largest unsigned activation that can occur.

    Returns:
        q (int32 in -127..127, shape of w) and scale (N,).
    """
    q, scale = quantize(w, scale, 0, -127, 127), scale.copy()
    open_ = np.flatnonzero(can_saturate(q, activation_max).any(axis=0))
    best = np.full(open_.size, np.inf)
    columns, narrow = w[:, open_], scale[open_]
    for factor in np.linspace(1, 127 / 64, 6, dtype=np.float32):
        wide = narrow * factor
        tried = repair_saturation(quantize(columns, wide, 0, -127, 127), activation_max)
        error = np.square(dequantize(tried, wide, 0) - columns, dtype=np.float64).sum(axis=0)
        better = error < best
        best[better] = error[better]
        q[:, open_[better]], scale[open_[better]] = tried[:, better], wide[better]
    return q, scale


def sqnr_db(reference: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    """Signal-to-quantization-noise ratio, 10·log10(Σ ref² / Σ (ref - other)²) dB; inf if equal."""
    ref = np.asarray(reference, np.float64)
    noise = float(np.square(ref - np.asarray(other, np.float64)).sum())
    signal = float(np.square(ref).sum())
    if noise == 0.0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal else float("-inf")


def pack(q: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Values of 2, 4 or 8 bits in bytes, the first in the low bits; each row ends with its byte.

    Args:
        q: (rows, count), values below 2^bits.

    Returns:
        (rows, ceil(count · bits / 8)).
    """
    each = 8 // bits
    padded = np.pad(q, [(0, 0), (0, -q.shape[1] % each)])
    packed = padded[:, ::each].copy()
    for place in range(1, each):
        packed |= padded[:, place::each] << np.uint8(place * bits)
    return packed


def pack_int4(q: Int) -> NDArray[np.uint8]:
    """Two 4-bit values a byte, the first in the low half (ONNX order), from a flat array."""
    flat = np.asarray(q, np.int32).reshape(-1) & 0xF
    if flat.size % 2:
        flat = np.append(flat, 0)
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)


def unpack_int4(packed: NDArray[np.uint8], count: int, signed: bool) -> Int:
    """The first `count` values of :func:`pack_int4`."""
    flat = np.empty(packed.size * 2, np.int32)
    flat[0::2], flat[1::2] = packed & 0xF, packed >> 4
    flat = flat[:count]
    return np.where(flat >= 8, flat - 16, flat).astype(np.int32) if signed else flat
