"""Integers with one scale, or one for each channel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.editing import add_constant
from qgraph.graph.sites import Site
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import along, quantize, quantize_weight
from qgraph.numerics.spec import FLOAT8, NIBBLES, NUMPY, PerAxis, PerTensor, QuantSpec
from qgraph.weights.formats.dequantize_linear import Stored
from qgraph.weights.formats.format import Format, Reader, by_columns, unfit_product, unknown_types

CHUNK_BYTES = 16 << 20
"""Weights are quantized in slices of about this size, so that temporaries stay small."""


class Linear(Format):
    """Integers of 4 or 8 bits behind a DequantizeLinear.

    ::

        W:int8 (K, N) ── DequantizeLinear(axis) ── W
        scale (N,), zero (N,) ──┘
    """

    def owns(self, spec: QuantSpec) -> bool:
        integers = spec.dtype in NUMPY and spec.dtype not in FLOAT8
        return integers and isinstance(spec.granularity, PerTensor | PerAxis)

    def fits(self, spec: QuantSpec, site: Site, data: QuantSpec | None, version: int) -> str | None:
        if spec.dtype not in NIBBLES:
            return None
        if why := unfit_product(site, data, tables=False):
            return why
        if by_columns(data) and not spec.symmetric:
            return "kernels for int8 columns know no zero points of weights"
        return unknown_types(version, "blocks or 4-bit integers")

    def quantize(self, w: np.ndarray, spec: QuantSpec) -> Quantized:
        return self.quantize_above(w, spec, None)

    def quantize_above(self, w: np.ndarray, spec: QuantSpec, floor: np.ndarray | None) -> Quantized:
        """:meth:`quantize` with no channel's scale below `floor`, 1-D, where it is given."""
        axis = spec.granularity.axis if isinstance(spec.granularity, PerAxis) else None
        return Quantized(*quantize_in_slices(w, axis, spec, floor), axis)

    def write(self, model: ir.Model, base: str, weight: Quantized, spec: QuantSpec) -> Reader:
        q = add_constant(model, f"{base}_q", weight.q, spec.dtype)
        scale = add_constant(model, f"{base}_scale", weight.scale)
        zero = add_constant(model, f"{base}_zero", weight.zero.astype(weight.q.dtype), spec.dtype)
        axis = {} if weight.axis is None else {"axis": weight.axis}
        return Stored(model, base, (q, scale, zero), axis)

    def substitute(self, spec: QuantSpec, axis: int) -> QuantSpec | None:
        return super().substitute(spec, axis) if spec.dtype in NIBBLES else None


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
