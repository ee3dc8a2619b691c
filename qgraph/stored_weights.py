"""Weights that no DequantizeLinear can read, written with the nodes that compute them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.codebooks import SCALES_PER_BLOCK, NestedScales
from qgraph.functions import DEQUANTIZE_CODEBOOK, DOMAIN, declare, is_call
from qgraph.graph import add_constant, insert, is_op, shared_constant
from qgraph.numerics import along
from qgraph.weights import Quantized


def write_codebook(model: ir.Model, base: str, weight: Quantized) -> ir.Value:
    """The float matrix behind codes of 4 bits.

    ::

        codes:uint4 (N, blocks, size) ── DequantizeCodebook ── Reshape ── Transpose ── W (K, N)
        table (16,), scale (N, blocks) ──┘

    A last block that is shorter is filled up, and cut off again by a Slice. The weight of a Gemm
    with transB stays (N, K). Runtimes compute all of it once, when they load the model.

    Args:
        base: what to call the parts.
        weight: in blocks, with a table.

    Returns:
        float32 with the weight's shape, computed first of all in the main graph.
    """
    assert weight.table is not None
    codes, scale = weight.q, weight.scale
    if not weight.axis:
        codes, scale = codes.T, scale.T
    (n, k), size = codes.shape, weight.block
    filler = int(np.abs(weight.table).argmin())
    filled = np.pad(codes, [(0, 0), (0, -k % size)], constant_values=filler)
    graph = _Nodes(model, base)
    blocks = graph.op(
        DEQUANTIZE_CODEBOOK,
        add_constant(model, f"{base}_codes", filled.reshape(n, -1, size), ir.DataType.UINT4),
        shared_constant(model, "qgraph/levels", weight.table),
        _scales(graph, weight.nested, scale),
        domain=DOMAIN,
        shape=(n, filled.shape[1] // size, size),
    )
    rows = graph.op("Reshape", blocks, graph.numbers(n, -1), shape=filled.shape)
    if k % size:
        rows = graph.cut(rows, k, axis=1, shape=(n, k))
    return rows if weight.axis else graph.op("Transpose", rows, perm=[1, 0], shape=(k, n))


def codebook_call(weight: ir.Value | None, *, turned: bool) -> ir.Node | None:
    """The DequantizeCodebook that computes a product's weight, as
    :func:`write_codebook` wrote it; or None.

    Args:
        turned: the weight is (K, N).
    """
    for op_type, expected in (("Transpose", turned), ("Slice", False), ("Reshape", True)):
        node = weight.producer() if weight is not None else None
        if node is not None and is_op(node, op_type):
            weight = node.inputs[0]
        elif expected:
            return None
    call = weight.producer() if weight is not None else None
    return call if is_call(call, DEQUANTIZE_CODEBOOK) else None


def _scales(graph: _Nodes, nested: NestedScales | None, scale: np.ndarray) -> ir.Value:
    """The scales (N, blocks) as they are, or computed from eight bits each."""
    model, base = graph.model, graph.base
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
        scales = graph.op("Reshape", scales, graph.numbers(-1), shape=(codes.size,))
        scales = graph.cut(scales, count, axis=0, shape=(count,))
    return graph.op("Reshape", scales, graph.numbers(*scale.shape), shape=scale.shape)


def write_float8(model: ir.Model, base: str, weight: Quantized) -> ir.Value:
    """The float weight behind a float8 one.

    ::

        W:float8e4m3fn ── Cast(float) ── Mul(scale) ── W

    No DequantizeLinear: onnxruntime would neither compute it once, when it loads the model, nor
    leave a product of two of them to float in every version.

    Returns:
        float32 with the weight's shape, computed first of all in the main graph.
    """
    graph, shape = _Nodes(model, base), weight.q.shape
    scale = weight.scale if weight.axis is None else along(weight.scale, weight.axis, len(shape))
    q = add_constant(model, f"{base}_q", weight.q)
    wide = graph.op("Cast", q, to=int(ir.DataType.FLOAT), shape=shape)
    return graph.op("Mul", wide, add_constant(model, f"{base}_scale", scale), shape=shape)


class _Nodes:
    """Puts nodes at the start of the main graph, in order."""

    def __init__(self, model: ir.Model, base: str) -> None:
        self.model, self.base, self._anchor = model, base, model.graph[0]

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        shape: tuple[int, ...],
        domain: str = "",
        **attributes: int | list[int],
    ) -> ir.Value:
        if domain == DOMAIN:
            declare(self.model, op_type)
        node = insert(
            self.model, self._anchor, op_type, inputs,
            base=f"{self.base}_{op_type}", attributes=attributes, domain=domain,
        )  # fmt: skip
        result = node.outputs[0]
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        return result

    def numbers(self, *values: int) -> ir.Value:
        name = "qgraph/shape_" + "_".join(map(str, values))
        return shared_constant(self.model, name, np.array(values, np.int64))

    def cut(self, value: ir.Value, count: int, *, axis: int, shape: tuple[int, ...]) -> ir.Value:
        """The first `count` elements along an axis."""
        bounds = [self.numbers(0), self.numbers(count), self.numbers(axis)]
        return self.op("Slice", value, *bounds, shape=shape)
