"""Activations with a scale for each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qgraph.numerics.reference import (
    Float,
    Int,
    dequantize,
    dequantize_float8,
    quantize,
    quantize_float8,
    scale_zero_point,
)
from qgraph.numerics.spec import FLOAT8, PerBlock, PerToken, QuantSpec


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


SMALLEST_TOKEN = np.float32(2.0**-110)
"""A token of zeros gets this magnitude: a 255th of it is still a normal float32."""
SYMMETRIC_GRID = TokenGrid(np.float32(1 / 127), 128, SMALLEST_TOKEN)
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
    floor = max(-lowest * (255 - zero) / max(zero, 1), float(SMALLEST_TOKEN))
    return TokenGrid(np.float32(1 / (255 - zero)), zero, np.float32(floor))


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
    largest = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), SMALLEST_TOKEN)
    scale = (largest * np.float32(1 / 127)).astype(np.float32)
    rounded: Float = (np.rint(blocks / scale) * scale).astype(np.float32)
    return rounded.reshape(padded.shape)[..., : x.shape[-1]]


def rounded_data(
    x: Float,
    spec: QuantSpec | None,
    span: tuple[float, float] | None = None,
    lowest: float | None = None,
) -> Float:
    """Activations, quantized and back.

    Args:
        x: (tokens, channels).
        spec: token by token, in blocks of a token, or with one scale; None: not quantized.
        span: range of a fixed scale; None: that of these tokens.
        lowest: a bound below which values never are, for scales token by token.
    """
    if spec is None:
        return x
    if isinstance(spec.granularity, PerToken):
        grid = token_grid(lowest)
        return dequantize_per_token(*quantize_per_token(x, grid), grid)
    if isinstance(spec.granularity, PerBlock):
        return round_in_blocks(x, spec.granularity.size)
    low, high = span or (x.min(), x.max())
    scale, zero = scale_zero_point(np.float32(low), np.float32(high), spec)
    if spec.dtype in FLOAT8:
        return dequantize_float8(quantize_float8(x, scale, spec), scale)
    return dequantize(quantize(x, scale, zero, spec.qmin, spec.qmax), scale, zero)
