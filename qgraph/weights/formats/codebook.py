"""Codes of 4 bits that stand for the levels of a table: NF4 and FP4."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qgraph.graph.builder import Builder
from qgraph.graph.editing import add_constant, shared_constant
from qgraph.graph.functions import DEQUANTIZE_CODEBOOK, DOMAIN, declare, is_call
from qgraph.graph.reading import is_op, source_of
from qgraph.graph.sites import Site
from qgraph.numerics.codebooks import (
    FACTORS,
    LEVELS,
    SCALES_PER_BLOCK,
    NestedScales,
    best_of,
    codes_at,
    integer_levels,
    nest_scales,
    quantize_to_levels,
)
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import PerBlock, QuantSpec
from qgraph.weights.formats.blocks import CACHED_BYTES
from qgraph.weights.formats.format import (
    COMPUTED_IN_FLOAT,
    Format,
    Reader,
    by_columns,
    unfit_product,
    unknown_types,
)

_ON_INT8 = (
    "4 bits on disk, multiplied as int8: levels are rounded to 127ths, by 0.4 % of the block's "
    "largest weight at most"
)


class Codebook(Format):
    """Codes of 4 bits that are places in a table: NF4, FP4.

    ::

        codes:uint4 (N, blocks, size) ── DequantizeCodebook ── Reshape ── Transpose ── W (K, N)
        table (16,), scale (N, blocks) ──┘

    A last block that is shorter is filled up, and cut off again by a Slice. The weight of a Gemm
    with transB stays (N, K). Runtimes compute all of it once, when they load the model: it stands
    first of all in the main graph.
    """

    even = False

    def owns(self, spec: QuantSpec) -> bool:
        return spec.codebook is not None

    def fits(self, spec: QuantSpec, site: Site, data: QuantSpec | None, version: int) -> str | None:
        if why := unfit_product(site, data, tables=True):
            return why
        if by_columns(data):
            return "kernels for int8 columns know no codebooks"
        return unknown_types(version, "blocks or 4-bit integers")

    def quantize(self, w: np.ndarray, spec: QuantSpec) -> Quantized:
        assert isinstance(spec.granularity, PerBlock)
        return quantize_in_codebook(w, spec.granularity, spec)

    def write(self, model: ir.Model, base: str, weight: Quantized, spec: QuantSpec) -> Reader:
        computed = _write(model, base, weight)
        return lambda _: computed

    def beside(self, weight: Quantized, data: QuantSpec | None) -> Quantized:
        """With integers for levels, where the data is integers, too."""
        if weight.table is None or data is None:
            return weight
        return replace(weight, table=integer_levels(weight.table))

    def note(self, data: QuantSpec | None) -> str | None:
        return COMPUTED_IN_FLOAT if data is None else _ON_INT8


def _write(model: ir.Model, base: str, weight: Quantized) -> ir.Value:
    """The float matrix (K, N), or (N, K), behind the codes."""
    assert weight.table is not None
    codes, scale = weight.q, weight.scale
    if not weight.axis:
        codes, scale = codes.T, scale.T
    (n, k), size = codes.shape, weight.block
    filler = int(np.abs(weight.table).argmin())
    filled = np.pad(codes, [(0, 0), (0, -k % size)], constant_values=filler)
    graph = Builder(model, model.graph[0], f"{base}_")
    declare(model, DEQUANTIZE_CODEBOOK)
    blocks = graph.op(
        DEQUANTIZE_CODEBOOK,
        add_constant(model, f"{base}_codes", filled.reshape(n, -1, size), ir.DataType.UINT4),
        shared_constant(model, "qgraph/levels", weight.table),
        _scales(graph, base, weight.nested, scale),
        domain=DOMAIN,
        shape=(n, filled.shape[1] // size, size),
    )
    rows = graph.op("Reshape", blocks, _numbers(model, n, -1), shape=filled.shape)
    if k % size:
        rows = _cut(graph, rows, k, axis=1, shape=(n, k))
    return rows if weight.axis else graph.op("Transpose", rows, perm=[1, 0], shape=(k, n))


def codebook_call(weight: ir.Value | None, *, turned: bool) -> ir.Node | None:
    """The DequantizeCodebook that computes a product's weight, as
    :class:`Codebook` writes it; or None.

    Args:
        turned: the weight is (K, N).
    """
    for op_type, expected in (("Transpose", turned), ("Slice", False), ("Reshape", True)):
        node = source_of(weight)
        if is_op(node, op_type):
            weight = node.inputs[0]
        elif expected:
            return None
    call = source_of(weight)
    return call if is_call(call, DEQUANTIZE_CODEBOOK) else None


def _scales(graph: Builder, base: str, nested: NestedScales | None, scale: np.ndarray) -> ir.Value:
    """The scales (N, blocks) as they are, or computed from eight bits each."""
    model = graph.model
    if nested is None:
        return add_constant(model, f"{base}_scale", np.ascontiguousarray(scale))
    count, rows = nested.codes.size, nested.scale.size
    spare = rows * SCALES_PER_BLOCK - count
    codes = np.pad(nested.codes, (0, spare)).reshape(rows, SCALES_PER_BLOCK)
    rest = graph.op(
        DEQUANTIZE_CODEBOOK,
        add_constant(model, f"{base}_scale_codes", codes),
        shared_constant(model, "qgraph/scale_levels", nested.table),
        add_constant(model, f"{base}_scale_scale", nested.scale),
        domain=DOMAIN,
        shape=codes.shape,
    )
    offset = add_constant(model, f"{base}_scale_offset", nested.offset)
    scales = graph.op("Add", rest, offset, shape=codes.shape)
    if spare:
        scales = graph.op("Reshape", scales, _numbers(model, -1), shape=(codes.size,))
        scales = _cut(graph, scales, count, axis=0, shape=(count,))
    return graph.op("Reshape", scales, _numbers(model, *scale.shape), shape=scale.shape)


def _numbers(model: ir.Model, *values: int) -> ir.Value:
    name = "qgraph/shape_" + "_".join(map(str, values))
    return shared_constant(model, name, np.array(values, np.int64))


def _cut(
    graph: Builder, value: ir.Value, count: int, *, axis: int, shape: tuple[int, ...]
) -> ir.Value:
    """The first `count` elements along an axis."""
    bounds = [_numbers(graph.model, number) for number in (0, count, axis)]
    return graph.op("Slice", value, *bounds, shape=shape)


def quantize_in_codebook(w: np.ndarray, blocks: PerBlock, spec: QuantSpec) -> Quantized:
    """:func:`codebooks.quantize_to_levels` of a matrix of any size, (K, N) or (N, K).

    Args:
        w: float weight, memory-mapped or not.
        blocks: their size, and which axis of `w` is K.
        spec: names the codebook; `observer="mse"` seeks each block's scale, anything else covers
            the whole range.
    """
    assert spec.codebook is not None
    columns, table = w if blocks.axis else w.T, LEVELS[spec.codebook]
    n, k = columns.shape
    codes = np.empty(columns.shape, np.uint8)
    scale = np.empty((n, -(-k // blocks.size)), np.float32)
    step = max(1, CACHED_BYTES // (4 * max(k, 1)))
    parts = [slice(start, start + step) for start in range(0, n, step)]
    seek = spec.observer == "mse"
    factors = FACTORS if seek else (1.0,)
    for part in parts:
        piece = np.asarray(columns[part], np.float32)
        codes[part], scale[part] = quantize_to_levels(piece, blocks.size, table, factors)
    nested = nest_scales(scale) if spec.double else None
    if nested is not None:  # codes for the scales as they come back: that undoes most of the loss
        shifts = (0, -1, 1) if seek else (0,)
        tried = np.stack([nested.shifted(by).float().reshape(scale.shape) for by in shifts])
        chosen = np.empty(scale.shape, np.intp)
        for part in parts:
            piece = np.asarray(columns[part], np.float32)
            chosen[part] = best_of(tried[:, part], piece, blocks.size, table)
            scale[part] = np.choose(chosen[part], tried[:, part])
            codes[part] = codes_at(piece, scale[part], blocks.size, table)
        nested = nested.shifted(np.take(shifts, chosen.reshape(-1)))
    if not blocks.axis:
        codes, scale = (np.ascontiguousarray(a.T) for a in (codes, scale))
    zero = np.zeros(scale.shape, np.int32)
    return Quantized(codes, scale, zero, blocks.axis, block=blocks.size, table=table, nested=nested)
