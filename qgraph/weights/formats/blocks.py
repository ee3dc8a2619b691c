"""Integers in blocks of a matrix, each block with its scale."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.editing import add_constant
from qgraph.graph.sites import Site
from qgraph.numerics.blocks import quantize_groups
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import FLOAT8, NUMPY, PerBlock, QuantSpec
from qgraph.weights.formats.dequantize_linear import Stored
from qgraph.weights.formats.format import Format, Reader, unfit_product, unknown_types

CACHED_BYTES = 1 << 18
"""Where many candidates are tried, slices of this size, so that they stay in the CPU's cache."""


class Blocks(Format):
    """Integers of 4 or 8 bits behind a DequantizeLinear that knows blocks.

    ::

        W:int4 (K, N) ── DequantizeLinear(axis, block_size) ── W
        scale (blocks, N), zero (blocks, N) if any is not 0 ──┘
    """

    def owns(self, spec: QuantSpec) -> bool:
        integers = spec.dtype in NUMPY and spec.dtype not in FLOAT8 and not spec.codebook
        return integers and isinstance(spec.granularity, PerBlock)

    def fits(self, spec: QuantSpec, site: Site, data: QuantSpec | None, version: int) -> str | None:
        why = unfit_product(site, data, tables=True)
        return why or unknown_types(version, "blocks or 4-bit integers")

    def quantize(self, w: np.ndarray, spec: QuantSpec) -> Quantized:
        assert isinstance(spec.granularity, PerBlock)
        return quantize_in_groups(w, spec.granularity, spec)

    def write(self, model: ir.Model, base: str, weight: Quantized, spec: QuantSpec) -> Reader:
        q = add_constant(model, f"{base}_q", weight.q, spec.dtype)
        parts = [q, add_constant(model, f"{base}_scale", weight.scale)]
        if weight.zero.any():
            zeros = weight.zero.astype(weight.q.dtype)
            parts.append(add_constant(model, f"{base}_zero", zeros, spec.dtype))
        blocks = {"axis": weight.axis or 0, "block_size": weight.block}
        return Stored(model, base, parts, blocks)


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
