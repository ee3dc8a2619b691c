"""What the kernels compute, in plain numpy: the CPU implementations of the operators and every test
are held to these, bit for bit.

Activations are kept as int8, the uint8 of the ONNX file less 128 (xor 0x80); `zero` is always the
uint8 zero point, 128 of a symmetric grid.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.backends.cuda.packing import pad_columns

Float = NDArray[np.float32]
Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]


def quantize_per_token(x: NDArray[Any], step: float, zero: int, floor: float) -> tuple[Int8, Float]:
    """clamp(rint(x / largest / step) + zero, 0, 255) - 128, with largest = max(max |x|, floor).

    Args:
        x: (..., K), float16, bfloat16 or float32.

    Returns:
        q (M, K up to a multiple of 64, filled up with 0) and largest (M,); a token with a NaN has a
        NaN for its largest.
    """
    columns = x.shape[-1]
    rows = x.astype(np.float32).reshape(math.prod(x.shape[:-1]), columns)
    # Bits of floats that are not negative compare as the floats do, and NaN is above all of them.
    bits = rows.view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest = bits.max(1, initial=np.float32(floor).view(np.uint32)).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint(rows / largest[:, None] / np.float32(step)) + np.float32(zero - 128)
    q = np.where(np.isnan(steps), np.float32(-128), np.clip(steps, -128, 127)).astype(np.int8)
    return pad_columns(q), largest


def int8_linear(
    q: Int8,
    largest: Float,
    w: Int8,
    scale: Float,
    sums: Int32 | None,
    bias: Float | None,
    zero: int,
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """float(q . w[n] - (zero - 128) * sums[n]) * scale[n] * largest + bias[n], rounded to `dtype`.

    Args:
        q, largest: as `quantize_per_token` gives them.
        w: (N, K), K a multiple of 64.
        sums: (N,), of w by rows; None where `zero` is 128.

    Returns:
        (M, N).
    """
    acc = (q.astype(np.float64) @ w.astype(np.float64).T).astype(np.int32)  # exact in float64
    if sums is not None:
        acc = acc - np.int32(zero - 128) * sums
    with np.errstate(invalid="ignore", over="ignore"):
        y = acc.astype(np.float32) * scale * largest[:, None]
        return (y if bias is None else y + bias).astype(dtype)


def fits_int32(columns: int, zero: int) -> bool:
    """Whether the sum of so many products of activations and weights can never overflow."""
    return columns * 128 * max(zero, 255 - zero, 128) < 2**31
