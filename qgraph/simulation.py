"""What a product computes once it is quantized, in plain numpy: for passes that try candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics import (
    dequantize,
    dequantize_float8,
    dequantize_per_token,
    quantize,
    quantize_float8,
    quantize_per_token,
    round_in_blocks,
    scale_zero_point,
    token_grid,
)
from qgraph.spec import FLOAT8, PerAxis, PerBlock, PerToken, QuantSpec
from qgraph.weights import (
    Quantized,
    quantize_in_codebook,
    quantize_in_groups,
    quantize_in_slices,
)

Float = NDArray[np.float32]


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


def rounded_weight(w: Float, spec: QuantSpec) -> Float:
    """A weight, quantized and back; products that could saturate are not looked for."""
    if isinstance(spec.granularity, PerBlock):
        if spec.codebook:
            return quantize_in_codebook(w, spec.granularity, spec).float()
        return quantize_in_groups(w, spec.granularity, spec).float()
    axis = spec.granularity.axis if isinstance(spec.granularity, PerAxis) else None
    return Quantized(*quantize_in_slices(w, axis, spec), axis).float()


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
